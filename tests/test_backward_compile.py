"""One-pass backward kernels compiled for devices that need not be here: do they fit?"""

import pytest

pytest.importorskip("triton")

import triton

from fullres.kernels import aot
from fullres.kernels.backward import (
    PIXELS_CONFIGS,
    ROWS_CONFIGS,
    WIDE_ROWS_CONFIGS,
    conv2d_backward_fits,
    conv2d_backward_kernel,
    conv2d_backward_variant,
)

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)
SPILL_LIMIT = 64  # bytes a thread: a few rarely used values, which L1 holds
FUSED = {"norm": True, "act": "leaky_relu", "coef": True, "sums": True}
ALL = {**FUSED, "residual": True, "add": True, "bias": True}
EVERY, NVIDIA, HOPPER = ("sm_80", "sm_90", "gfx942"), ("sm_80", "sm_90"), ("sm_90",)
AMD = ("gfx942",)

CASES = {  # name: dtype, C, K, R, options, the targets that its configuration is for
    "16-16-first": ("bf16", 16, 16, 3, ALL, EVERY),
    "16-16-config1": ("bf16", 16, 16, 3, {**ALL, "config": ROWS_CONFIGS[1]}, EVERY),
    "16-16-config2": ("bf16", 16, 16, 3, {**ALL, "config": ROWS_CONFIGS[2]}, NVIDIA),
    "16-16-config3": ("bf16", 16, 16, 3, {**ALL, "config": ROWS_CONFIGS[3]}, EVERY),
    "16-16-plain": ("bf16", 16, 16, 3, {}, EVERY),
    # With a residual 168 bytes, where config2 has none.
    "32-32-first": ("bf16", 32, 32, 3, FUSED, HOPPER),
    "32-32-config1": ("bf16", 32, 32, 3, {**FUSED, "config": WIDE_ROWS_CONFIGS[1]}, HOPPER),
    "32-32-config2": ("bf16", 32, 32, 3, {**FUSED, "config": WIDE_ROWS_CONFIGS[2]}, NVIDIA),
    "32-32-config2-all": ("bf16", 32, 32, 3, {**ALL, "config": WIDE_ROWS_CONFIGS[2]}, HOPPER),
    "32-32-config3": ("bf16", 32, 32, 3, {**ALL, "config": WIDE_ROWS_CONFIGS[3]}, AMD),
    "32-32-config4": ("bf16", 32, 32, 3, {**ALL, "config": WIDE_ROWS_CONFIGS[4]}, EVERY),
    "16-32": ("bf16", 16, 32, 3, ALL, HOPPER),
    "32-16": ("bf16", 32, 16, 3, ALL, HOPPER),
    "24-20-fp16": ("fp16", 24, 20, 3, FUSED, HOPPER),
    "24-20-fp16-last": ("fp16", 24, 20, 3, {**FUSED, "config": WIDE_ROWS_CONFIGS[-1]}, EVERY),
    "16-16-fp32": ("fp32", 16, 16, 3, ALL, EVERY),
    "16-16-tf32": ("fp32", 16, 16, 3, {**ALL, "precision": "tf32"}, NVIDIA),
    "1x1-64-64-first": ("bf16", 64, 64, 1, ALL, EVERY),
    "1x1-64-64-config1": ("bf16", 64, 64, 1, {**ALL, "config": PIXELS_CONFIGS[1]}, NVIDIA),
    "1x1-64-64-config2": ("bf16", 64, 64, 1, {**ALL, "config": PIXELS_CONFIGS[2]}, HOPPER),
    "1x1-16-32-first": ("bf16", 16, 32, 1, ALL, EVERY),
    "1x1-16-16-config1": ("bf16", 16, 16, 1, {**ALL, "config": PIXELS_CONFIGS[1]}, EVERY),
    "1x1-32-fp32": ("fp32", 32, 32, 1, ALL, EVERY),
}
WARP_GROUPS = [
    *((16, config) for config in ROWS_CONFIGS[:3]),
    *((32, config) for config in WIDE_ROWS_CONFIGS[:2]),
]
RUNS = [(case, target) for case, (*_, targets) in CASES.items() for target in targets]


@pytest.mark.parametrize(("case", "target"), RUNS, ids=map("-".join, RUNS))
def test_conv2d_backward_fits_and_uses_the_device(case, target):
    dtype, C, K, R, options, _ = CASES[case]
    itemsize = 4 if dtype == "fp32" else 2
    config = options.get("config") or conv2d_backward_kernel(C, K, R, itemsize).every_config[0]
    assert conv2d_backward_fits(C, K, R, R, itemsize)
    report = aot.report(conv2d_backward_variant(dtype, C, K, R, **options), target)
    assert report.shared_bytes <= aot.SHARED_LIMIT[target]
    if report.registers is None:
        pytest.skip("needs cuobjdump and nvdisasm beside triton for the rest")
    assert report.spill_bytes <= SPILL_LIMIT
    if C % 8 == 0 and K % 8 == 0:
        assert report.loads_16 > 0 and report.stores_16 > 0
    if dtype != "fp32" or target == "gfx942" or "precision" in options:
        # Warp groups take products of 64 rows and more, others are a warp's.
        assert report.wgmma or report.mma_sync or report.mfma
    if target == "sm_90" and itemsize == 2 and R == 3 and (max(C, K), config) in WARP_GROUPS:
        assert report.wgmma > 0 and not report.mma_sync
    if config.num_stages > 1 and target != "gfx942":
        assert report.async_copies > 0


def test_registers_hold_no_more_channels():
    """The bound is not for show: twice the channels spill by the hundred bytes."""
    assert not conv2d_backward_fits(64, 64, 3, 3, 2)
    report = aot.report(conv2d_backward_variant("bf16", 64, 64, 3, **FUSED), "sm_90")
    assert report.spill_bytes is None or report.spill_bytes > SPILL_LIMIT


@pytest.mark.parametrize("R", [1, 3])
def test_conv2d_backward_compiles_for_sizes_of_one(R):
    """Triton turns an argument that equals 1 into a constant: the addresses must still be built."""
    variant = conv2d_backward_variant("bf16", 16, 16, R, **ALL)
    ones = {name: 1 for name, type_ in variant.signature.items() if type_ == "i32"}
    signature = {k: v for k, v in variant.signature.items() if k not in ones}
    constexprs = {**variant.constexprs, **ones}
    aot.compile_variant(aot.Variant(variant.kernel, signature, constexprs, variant.config), "sm_90")
