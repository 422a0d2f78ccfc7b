"""Weight gradient kernels compiled for devices that need not be here: do they fit and use them?"""

import pytest

pytest.importorskip("triton")

import triton

from fullres.kernels import aot
from fullres.kernels.wgrad import CONFIGS, DEPTHWISE_CONFIGS, conv2d_wgrad_variant
from fullres.kernels.wgrad_rows import CONFIGS as ROWS_CONFIGS
from fullres.kernels.wgrad_rows import conv2d_wgrad_rows_variant

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)
SPILL_LIMIT = 64  # bytes a thread: a few rarely used values, which L1 holds
FUSED = {"norm": True, "act": "leaky_relu", "coef": True}

CASES = {  # name: dtype, C, K, R, options
    **{
        f"{name}-config{i}": ("bf16", channels, channels, 3, {**options, "config": config})
        for i, config in enumerate(CONFIGS)
        for name, channels, options in (
            ("16-16-plain", 16, {}),
            ("16-16-fused", 16, FUSED),
            ("64-64-fused", 64, FUSED),
            ("256-256-plain", 256, {}),
        )
    },
    # With the first configuration, which runs everywhere.
    "24-40-fp16": ("fp16", 24, 40, 3, {}),
    "1x1-256-64-fused": ("bf16", 256, 64, 1, FUSED),
    "1x1-64-256-stride-2": ("bf16", 64, 256, 1, {"stride": 2, "padding": 0}),
    "residual": ("bf16", 32, 32, 3, {**FUSED, "residual": True}),
    "bias": ("bf16", 32, 32, 3, {"bias": True}),
    "groups-of-4": ("bf16", 128, 128, 3, {"groups": 32, **FUSED}),
    "fp32": ("fp32", 32, 32, 3, {}),
    "tf32": ("fp32", 32, 32, 3, {"precision": "tf32"}),
}


def tensor_core_instructions(report: aot.Report) -> int:
    return {"sm_80": report.mma_sync, "sm_90": report.wgmma, "gfx942": report.mfma}[report.target]


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_conv2d_wgrad_fits_and_uses_the_device(case, target):
    dtype, C, K, R, options = CASES[case]
    if (case, target) == ("tf32", "gfx942"):
        pytest.skip("the op never asks for TF32 on AMD")
    report = aot.report(conv2d_wgrad_variant(dtype, C, K, R, **options), target)
    assert report.shared_bytes <= aot.SHARED_LIMIT[target]
    if report.registers is None:
        pytest.skip("needs cuobjdump and nvdisasm beside triton for the rest")
    assert report.spill_bytes <= SPILL_LIMIT
    # Hopper multiplies 32-bit numbers along contiguous pixels only: copies turn them, one by one.
    if "groups" not in options and (case, target) != ("tf32", "sm_90"):
        assert report.loads_16 > 0
    if "groups" in options:  # 12 rows of products do not fill a warp group's 64
        assert report.wgmma or report.mma_sync or report.mfma
    elif case != "fp32" or target == "gfx942":
        assert tensor_core_instructions(report) > 0
    stages = options.get("config", CONFIGS[0]).num_stages
    if stages > 1 and "groups" not in options and target != "gfx942":
        assert report.async_copies > 0


@pytest.mark.parametrize("config", DEPTHWISE_CONFIGS, ids=["config0", "config1"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_conv2d_wgrad_depthwise_fits_the_device(config, target):
    variant = conv2d_wgrad_variant("bf16", 96, 96, 7, groups=96, config=config, **FUSED)
    report = aot.report(variant, target)
    assert report.shared_bytes <= aot.SHARED_LIMIT[target]
    if report.registers is None:
        pytest.skip("needs cuobjdump and nvdisasm beside triton for the rest")
    assert report.spill_bytes <= SPILL_LIMIT
    assert report.loads_16 > 0


ROWS_CASES = {  # name: dtype, C, K, options
    **{
        f"{C}-{K}-config{i}": ("bf16", C, K, {**FUSED, "config": config})
        for i, config in enumerate(ROWS_CONFIGS)
        for C, K in ((16, 16), (32, 32), (64, 64))
    },
    "48-24-residual-bias": ("bf16", 48, 24, {**FUSED, "residual": True, "bias": True}),
    "24-40-fp16": ("fp16", 24, 40, {**FUSED, "residual": True}),
    "plain": ("bf16", 16, 16, {}),
    "fp32": ("fp32", 16, 16, {**FUSED, "residual": True}),
    "tf32": ("fp32", 16, 16, {**FUSED, "precision": "tf32"}),
}


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", ROWS_CASES)
def test_conv2d_wgrad_rows_fits_and_uses_the_device(case, target):
    dtype, C, K, options = ROWS_CASES[case]
    if (case, target) == ("tf32", "gfx942"):
        pytest.skip("the op never asks for TF32 on AMD")
    if (case, target) == ("32-32-config2", "gfx942"):
        pytest.skip("made for NVIDIA: at 512 lanes it spills 96 bytes, and the first does not")
    report = aot.report(conv2d_wgrad_rows_variant(dtype, C, K, **options), target)
    assert report.shared_bytes <= aot.SHARED_LIMIT[target]
    if report.registers is None:
        pytest.skip("needs cuobjdump and nvdisasm beside triton for the rest")
    assert report.spill_bytes <= SPILL_LIMIT
    assert report.loads_16 > 0
    if dtype != "fp32" or target == "gfx942":
        assert tensor_core_instructions(report) > 0
    if target == "sm_90" and dtype != "fp32":
        assert not report.mma_sync  # all of it by warp groups
    if options.get("config", ROWS_CONFIGS[0]).num_stages > 1 and target != "gfx942":
        assert report.async_copies > 0


@pytest.mark.parametrize("resample", ["pool2", "up2"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_conv2d_wgrad_of_resampled_images_fits_the_device(resample, target):
    variant = conv2d_wgrad_variant("bf16", 32, 16, 1, resample=resample, **FUSED)
    report = aot.report(variant, target)
    assert report.shared_bytes <= aot.SHARED_LIMIT[target]
    assert not report.spill_bytes or report.spill_bytes <= SPILL_LIMIT


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_conv2d_wgrad_compiles_for_channels_below_a_vector(C, target):
    report = aot.report(conv2d_wgrad_variant("bf16", C, 64, 7, stride=2), target)
    assert report.shared_bytes <= aot.SHARED_LIMIT[target]
    assert not report.spill_bytes


def test_conv2d_wgrad_compiles_for_sizes_of_one():
    """Triton turns an argument that equals 1 into a constant: the addresses must still be built."""
    variant = conv2d_wgrad_variant("bf16", 16, 16, 3, **FUSED)
    ones = dict.fromkeys(("N", "H", "W", "P", "Q", "splits"), 1)
    signature = {k: v for k, v in variant.signature.items() if k not in ones}
    constexprs = {**variant.constexprs, **ones}
    aot.compile_variant(aot.Variant(variant.kernel, signature, constexprs, variant.config), "sm_90")
