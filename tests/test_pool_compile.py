"""Pooling, interpolation and their passes compiled for devices that need not be here."""

import pytest
import torch

pytest.importorskip("triton")

import triton

from fullres.engine.precompile import record_launches
from fullres.kernels import aot
from fullres.kernels.launches import compile_launch
from fullres.ops import interpolate, pool

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)
SPILL_LIMIT = 64  # bytes a lane: a few rarely used values, which L1 holds
WINDOW = [3, 3], [2, 2], [1, 1]
SIZE = [2, 16, 64, 96]


def max_pool(x):
    y, taps = pool.max_pool(x, *WINDOW, [1, 1], False, None, True)
    pool.max_pool_backward(y, taps, list(x.shape), *WINDOW, [1, 1], False, None)


def avg_pool(x):
    y = pool.avg_pool(x, *WINDOW, False, True, None, None)
    pool.avg_pool_backward(y, list(x.shape), *WINDOW, False, True, None, None)


def global_mean(x):
    y = pool.avg_pool(x, [], [], [], False, True, None, [1, 1])
    pool.avg_pool_backward(y, list(x.shape), [], [], [], False, True, None, [1, 1])


def enlarge(x):
    for arguments in ([100, 300], [], "bilinear", False), ([128, 192], [], "nearest", False):
        z = interpolate.resize(x, *arguments)
        interpolate.resize_backward(z, list(x.shape), *arguments)


def enlarge_twice(x):
    arguments = [2 * side for side in x.shape[2:]], [2.0, 2.0], "bilinear", False
    z = interpolate.resize(x, *arguments)
    interpolate.resize_backward(z, list(x.shape), *arguments)


def reports(function, target, size=SIZE, dtype=torch.bfloat16, elements="ELEMENTS"):
    """Compile what function launches; of autotuned kernels the configurations of those elements."""

    def step():
        function(torch.empty(size, dtype=dtype).to(memory_format=torch.channels_last))

    launches = record_launches(step, target)
    return [compile_launch(launch) for launch in launches if elements in launch.label]


FIRST = {max_pool: "=1024 ", avg_pool: "=1024 ", global_mean: "", enlarge: "=1024 "}
FIRST |= {enlarge_twice: "=1024 "}


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("function", FIRST, ids=lambda f: f.__name__)
def test_kernels_fit_and_read_vectors(function, target):
    made = reports(function, target, elements=FIRST[function])
    assert made
    for report in made:
        assert report.shared_bytes <= aot.SHARED_LIMIT[target]
        if report.registers is None:
            pytest.skip("needs cuobjdump and nvdisasm beside triton for the rest")
        assert report.spill_bytes == 0, report
        # 1,024 elements are 8 a lane of 128, and on AMD 4 of 256.
        if target != "gfx942":
            assert report.loads_16 > 0, report
            assert report.stores_16 > 0 or report.kernel == "window_sums_kernel", report


@pytest.mark.parametrize("size", [[1, 1, 1, 1], [1, 3, 9, 5], [1, 136, 8, 8]], ids=str)
@pytest.mark.parametrize("function", FIRST, ids=lambda f: f.__name__)
def test_kernels_compile_for_sizes_of_one_and_odd_channels(function, size):
    """Triton turns an argument that equals 1 into a constant: the addresses must still be built."""
    for report in reports(function, "sm_90", size, torch.float32, FIRST[function]):
        assert not report.spill_bytes or report.spill_bytes <= SPILL_LIMIT, report
