"""Input gradient kernels compiled for devices that need not be here: do they fit and use them?"""

import pytest

pytest.importorskip("triton")

import triton

from fullres.kernels import aot
from fullres.kernels.dgrad import CONFIGS, DEPTHWISE_CONFIGS, ROWS_CONFIGS, conv2d_dgrad_variant

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)
FUSED = {"coef": True, "norm": True, "act": "leaky_relu", "sums": True}
ALL = {**FUSED, "residual": True, "add": True}

CASES = {  # name: dtype, C, K, R, options
    **{
        f"64-64-fused-config{i}": ("bf16", 64, 64, 3, {**FUSED, "config": config})
        for i, config in enumerate(CONFIGS)
    },
    **{
        f"rows-{channels}-{channels}-config{i}": (
            "bf16", channels, channels, 3, {**FUSED, "config": config},
        )
        for i, config in enumerate(ROWS_CONFIGS)
        for channels in (16, 32)
    },
    "rows-32-32-residual-add": ("bf16", 32, 32, 3, {**ALL, "config": ROWS_CONFIGS[0]}),
    "rows-24-16-fp16-plain": ("fp16", 24, 16, 3, {"config": ROWS_CONFIGS[0]}),
    # With the first configuration, which runs everywhere.
    "64-64-residual-add": ("bf16", 64, 64, 3, ALL),
    "5x5-16-16-fused": ("bf16", 16, 16, 5, FUSED),
    "256-256-plain": ("bf16", 256, 256, 3, {}),
    "256-256-plain-config2": ("bf16", 256, 256, 3, {"config": CONFIGS[2]}),
    "128-128-residual-add-config2": ("bf16", 128, 128, 3, {**ALL, "config": CONFIGS[2]}),
    "1x1-64-256-fused": ("bf16", 64, 256, 1, FUSED),
    "3x3-stride-2-64-128-fused": ("bf16", 64, 128, 3, {"stride": 2, **FUSED}),
    "2x2-stride-2-16-32-transposed": (
        "bf16", 16, 32, 2, {"stride": 2, "padding": 0, "bias": True},
    ),
    "groups-of-4": ("bf16", 128, 128, 3, {"groups": 32, **FUSED}),
    "fp32": ("fp32", 64, 64, 3, {}),
    "tf32": ("fp32", 64, 64, 3, {"precision": "tf32"}),
}  # fmt: skip


def tensor_core_instructions(report: aot.Report) -> int:
    return {"sm_80": report.mma_sync, "sm_90": report.wgmma, "gfx942": report.mfma}[report.target]


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_conv2d_dgrad_fits_and_uses_the_device(case, target):
    dtype, C, K, R, options = CASES[case]
    if (case, target) == ("tf32", "gfx942"):
        pytest.skip("the op never asks for TF32 on AMD")
    variant = conv2d_dgrad_variant(dtype, C, K, R, **options)
    report = aot.report(variant, target)
    label = " ".join(f"{name}={value}" for name, value in variant.config.kwargs.items())
    for what, figure in aot.excess(report).items():
        assert aot.excuse(report, label, what), f"{what}: {figure}"
    if report.registers is None:
        pytest.skip("needs cuobjdump and nvdisasm beside triton for the rest")
    assert report.loads_16 > 0
    if case != "fp32" or target == "gfx942":
        assert tensor_core_instructions(report) > 0
    stages = options.get("config", CONFIGS[0]).num_stages
    if stages > 1 and R > 1 and target != "gfx942":
        assert report.async_copies > 0


@pytest.mark.parametrize("target", aot.TARGETS)
def test_conv2d_dgrad_depthwise_fits_the_device(target):
    variant = conv2d_dgrad_variant(
        "bf16", 96, 96, 7, groups=96, config=DEPTHWISE_CONFIGS[1], **FUSED
    )
    report = aot.report(variant, target)
    assert not aot.excess(report)
    if report.registers is None:
        pytest.skip("needs cuobjdump and nvdisasm beside triton for the rest")
    assert report.loads_16 > 0


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_conv2d_dgrad_compiles_for_channels_below_a_vector(C, target):
    report = aot.report(conv2d_dgrad_variant("bf16", C, 64, 7, stride=2), target)
    assert report.shared_bytes <= aot.SHARED_LIMIT[target]
    assert not report.spill_bytes


def test_a_filter_as_wide_as_its_stride_multiplies_without_a_loop():
    """Each row of 2 x 2 at stride 2 is one product: its phases' columns side by side."""
    variant = conv2d_dgrad_variant("bf16", 16, 32, 2, stride=2, padding=0)
    compiled = aot.compile_variant(variant, "sm_90")
    products = compiled.asm["ttgir"].count("ttng.warp_group_dot ")
    assert products == 1 and "128x32xf32" in compiled.asm["ttgir"]
