"""Each kernel of the package as compiled, run by the emulator: in bfloat16, against float64.

What the interpreter cannot run (it takes bfloat16 operands of a product for integers) and does not
show: layouts, vectors, pipelines, barriers. Cases and allowances are those of the other test files;
`pytest --emulate sm_90` runs all of theirs. Each test names the kernels that it has to have run.
"""

import importlib.util
import re
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fullres.kernels import _tune  # noqa: E402
from fullres.kernels.emulator import emulated  # noqa: E402
from fullres.ops import interpolate, pool  # noqa: E402

BF16 = torch.bfloat16


def beside(name):
    """Return a test file of this folder, which pytest imports under no name of its own."""
    spec = importlib.util.spec_from_file_location(f"beside_{name}", Path(__file__).with_name(name))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


backward = beside("test_backward.py")
dgrad, wgrad, poisoned = backward.dgrad, backward.wgrad, backward.poisoned
conv_fwd, conv_transpose = beside("test_conv_fwd.py"), beside("test_conv_transpose.py")
focal_loss, linear = beside("test_focal_loss.py"), beside("test_linear_focal_loss.py")
interpolation, norm, pointwise = map(
    beside, ("test_interpolate.py", "test_norm.py", "test_pointwise.py")
)
pooling, sigmoid = beside("test_pool.py"), beside("test_focal_loss_sigmoid.py")

TARGET = pytest.mark.parametrize("target", ["sm_80", "sm_90"])


@contextmanager
def running(target, *kernels):
    """Launch kernels as compiled for a target; fail unless each of these ran."""
    with emulated(target) as made, ExitStack() as stack:
        for module in (_tune, norm, pointwise):  # helpers of other files would interpret
            stack.enter_context(patch.object(module, "interpreted", nullcontext))
        yield
    missing = {f"{kernel}_kernel" for kernel in kernels} - made.counts.keys()
    assert not missing, f"{missing} did not run, but {list(made.counts)}"


# Convolutions


FORWARD = {  # case, kernel
    "odd-sizes-across-tiles": "conv2d_fwd_rows",
    "several-strips-and-columns": "conv2d_fwd_rows",
    "colour-image-7x7-stride-2": "conv2d_fwd",
    "channels-in-several-blocks": "conv2d_fwd",
    "1x1-widens": "conv2d_fwd",
    "two-groups": "conv2d_fwd",
    "all": "conv2d_fwd_rows",
    "all-general": "conv2d_fwd",
    "depthwise-fused": "conv2d_fwd_depthwise",
    "pooled-odd": "conv2d_fwd",
    "enlarged": "conv2d_fwd",
    "two-images": "conv2d_fwd",
}


@TARGET
@pytest.mark.parametrize("case", FORWARD)
def test_forward(case, target, rng, poisoned):
    given = conv_fwd.arguments(conv_fwd.CASES[case], BF16, rng)
    with running(target, FORWARD[case]):
        results = conv_fwd.conv2d_fwd_triton(*given)
    conv_fwd.assert_close(results, given)


DGRAD = {
    "odd-sizes-across-tiles": "conv2d_dgrad_rows",
    "channels-in-several-blocks": "conv2d_dgrad",
    "4x4-stride-2-shifted": "conv2d_dgrad",
    "all": "conv2d_dgrad_rows",
    "all-2x2-stride-2": "conv2d_dgrad",
    "grouped-fused": "conv2d_dgrad",
    "depthwise-fused": "conv2d_dgrad_depthwise",
    "rows-of-several-blocks": "conv2d_dgrad_rows",
    "pooled-1x1-stride-2": "conv2d_dgrad",
    "dilation-and-stride": "conv2d_dgrad",
}


@TARGET
@pytest.mark.parametrize("case", DGRAD)
def test_dgrad(case, target, rng, poisoned):
    given = dgrad.arguments(dgrad.CASES[case], BF16, rng)
    with running(target, DGRAD[case]):
        results = dgrad.conv2d_dgrad_triton(*given)
    dgrad.assert_close(results, given)


WGRAD = {
    "channels-in-several-blocks": "conv2d_wgrad",
    "3x3-by-the-general-kernel": "conv2d_wgrad",
    "silu-strided": "conv2d_wgrad",
    "grouped-fused": "conv2d_wgrad",
    "depthwise-fused": "conv2d_wgrad_depthwise",
    "pooled-odd": "conv2d_wgrad",
    "enlarged": "conv2d_wgrad",
    "several-strips-the-last-shorter": "conv2d_wgrad_rows",
    "two-blocks-of-outputs": "conv2d_wgrad_rows",
    "all": "conv2d_wgrad_rows",
}


@TARGET
@pytest.mark.parametrize("case", WGRAD)
def test_wgrad(case, target, rng, poisoned):
    rows = WGRAD[case] == "conv2d_wgrad_rows"
    cases = wgrad.ROWS_CASES if rows else wgrad.CASES
    given = wgrad.arguments(cases.get(case, wgrad.CASES["all"]), BF16, rng)
    with running(target, WGRAD[case]), wgrad.rows_kernel(rows):
        results = wgrad.conv2d_wgrad_triton(*given)
    wgrad.assert_close(results, given)


@TARGET
@pytest.mark.parametrize(
    "case", ["odd-sizes-across-tiles", "several-strips-the-last-shorter", "all", "1x1",
             "1x1-all-in-two-ranges", "1x1-silu"],
)  # fmt: skip
def test_backward_in_one_pass(case, target, rng, poisoned):
    case = backward.CASES[case]
    given = backward.arguments(case, BF16, rng)
    kernel = "conv2d_backward_rows" if case.R == 3 else "conv2d_backward_pixels"
    parts = ["sum_parts"] if case.R == 3 else []  # small images of 1 x 1 are one part
    with running(target, kernel, *parts), backward.one_pass():
        results = backward.conv2d_backward_triton(*given)
    backward.assert_close(results, given)


@TARGET
@pytest.mark.parametrize("case", ["2x2-stride-2", "patches", "dilated"])
def test_transposed(case, target, rng, poisoned):
    given = conv_transpose.arguments(conv_transpose.CASES[case], BF16, rng)
    with running(target, "conv2d_dgrad"):
        y = conv_transpose.conv_transpose2d_triton(*given)
    conv_transpose.forward_close(y, given)


@TARGET
def test_every_first_configuration_has_whole_tiles(target, rng, poisoned):
    """Full tiles in each direction, where the masks are true and pipelines are long."""
    case = conv_fwd.Case(C=64, K=64, H=16, W=32, residual="norm", **conv_fwd.FUSED)
    given = conv_fwd.arguments(case, BF16, rng)
    with running(target, "conv2d_fwd"):
        conv_fwd.assert_close(conv_fwd.conv2d_fwd_triton(*given), given)
    case = replace(backward.CASES["all-32"], H=16, W=64)
    given = backward.arguments(case, BF16, rng)
    with running(target, "conv2d_backward_rows"), backward.one_pass():
        backward.assert_close(backward.conv2d_backward_triton(*given), given)


# Losses on features, whose products are small


@TARGET
@pytest.mark.parametrize("case", ["norm-leaky-relu", "several-tiles", "all-options"])
def test_linear_focal_loss(case, target, rng, poisoned):
    case = linear.CASES[case]
    given = linear.arguments(case, BF16, rng)
    with running(target, "linear_focal_loss", "linear_focal_loss_backward"), linear.on_kernels():
        got = linear.run(case, given)
    linear.assert_close(got, case, given)


# Kernels without a tensor core


@pytest.mark.parametrize("shape", ["odd-sizes", "classes-not-a-power-of-two", "several-tiles"])
def test_softmax_focal_loss(shape, rng, poisoned):
    logits, labels = focal_loss.batch(rng, focal_loss.SHAPES[shape], BF16)
    labels.view(-1)[-1] = -100
    kernels = "softmax_focal_loss", "softmax_focal_loss_backward"
    for reduction in ("weighted_mean", "none"):
        with running("sm_90", *kernels), focal_loss.on_kernels():
            got = focal_loss.value_and_gradient(logits, labels, reduction=reduction)
        focal_loss.assert_close(got, logits, labels, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_sigmoid_focal_loss(reduction, rng):
    inputs, targets = sigmoid.batch(rng, dtype=BF16)
    kernels = "sigmoid_focal_loss", "sigmoid_focal_loss_backward"
    with running("sm_90", *kernels), sigmoid.on_kernels():
        got = sigmoid.value_and_gradient(inputs, targets, reduction=reduction)
    sigmoid.assert_close(got, inputs, targets, reduction=reduction)


@pytest.mark.parametrize("act", pointwise.ACTS)
def test_prologue_and_its_gradient(act, rng, poisoned):
    shape = pointwise.SHAPES["channels-in-two-tiles"]
    with running("sm_90", "prologue", "prologue_backward"):
        pointwise.test_prologue_is_the_formula(shape, BF16, "cpu", act, rng)
        pointwise.test_prologue_backward_is_the_gradient(shape, BF16, "cpu", act, rng)


@pytest.mark.parametrize(
    ("resample", "kernel"), [("pool2", "pooled_backward"), ("up2", "prologue_backward")]
)
def test_resampled_prologue_and_its_gradient(resample, kernel, rng, poisoned):
    shape = pointwise.RESAMPLED["odd-both"]
    with running("sm_90", "prologue", kernel):
        pointwise.test_resampled_prologue_is_the_formula(
            shape, BF16, "cpu", resample, rng, poisoned
        )
        pointwise.test_resampled_backward_is_the_gradient(
            shape, BF16, "cpu", resample, rng, poisoned
        )


def test_moments_and_normalised_gradients(rng, poisoned):
    shape = pointwise.SHAPES["odd-sizes-16"]
    with running("sm_90", "moments", "gradient"):
        pointwise.test_moments_are_those_of_float64(shape, BF16, "cpu", 100.0, rng)
        pointwise.test_normalised_gradient_is_the_formula(shape, BF16, "cpu", rng)


def test_batch_normalisation(rng):
    with running("sm_90", "merge_moments", "merge_sums", "batch_norm", "batch_norm_backward"):
        norm.test_merged_parts_are_the_moments_of_the_whole([5, 0, 2] * 70, 1e4, "cpu", rng)
        norm.test_merged_sums_are_sums(65, "cpu", rng)
        norm.test_five_steps_are_torchs({}, 1e4, "cpu", rng)
        norm.test_backward_is_autograds(True, "cpu", rng)


@pytest.mark.parametrize("case", ["2x2-odd-sizes", "3x3-stride-2-resnet", "overlapping-5x5"])
def test_pooling(case, rng, poisoned):
    shape, window = pooling.CASES[case]
    with running("sm_90", "max_pool", "max_pool_backward"):
        pooling.test_max_pool_takes_the_first_of_equals(shape, window, BF16, "cpu", rng, poisoned)
    with running("sm_90", "avg_pool", "avg_pool_backward"):
        pooling.test_avg_pool_is_the_mean(shape, window, BF16, "cpu", rng, poisoned)


def test_large_windows_are_summed_in_parts(rng):
    x = pooling.image((1, 3, 90, 110), BF16, rng)
    with running("sm_90", "window_sums", "avg_parts"), pooling.launching("cpu"):
        got = pool.adaptive_avg_pool2d(x, 1)
    wanted, magnitude = (F.adaptive_avg_pool2d(t.double(), 1) for t in (x, x.abs()))
    pooling.close(got, wanted, magnitude, BF16, terms=64)


@pytest.mark.parametrize(
    "case", ["larger", "smaller", "rows-smaller-columns-larger", "nearest-larger"]
)
def test_interpolation(case, rng, poisoned):
    shape, arguments = interpolation.CASES[case]
    with running("sm_90", "interpolate", "interpolate_backward"):
        interpolation.test_is_torchs(shape, arguments, BF16, "cpu", rng, poisoned)


def test_every_kernel_of_the_package_is_run_here():
    """Each name in `running` above; what a kernel file adds is missed at once."""
    folder = Path(interpolate.__file__).parents[1] / "kernels"
    here = Path(__file__).read_text()
    for file in folder.glob("*.py"):
        for name in re.findall(r"^@triton\.jit.*\ndef (\w+)_kernel\(", file.read_text(), re.M):
            assert f'"{name}"' in here, f"{file.name}: {name}_kernel"
