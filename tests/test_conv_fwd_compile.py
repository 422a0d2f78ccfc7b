"""Kernels compiled for devices that need not be here: do they fit, and use what the device has?"""

import re

import pytest

pytest.importorskip("triton")

import torch
import triton

from fullres.engine.precompile import record_launches
from fullres.kernels import aot
from fullres.kernels.conv import (
    CONFIGS,
    DEPTHWISE_CONFIGS,
    ROWS_CONFIGS,
    conv2d_fwd_kernel,
    conv2d_fwd_variant,
)
from fullres.ops.conv_fwd import conv2d_fwd

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)
SPILL_LIMIT = 64  # bytes a thread: a few rarely used values, which L1 holds
FUSED = {"norm": True, "act": "leaky_relu", "moments": True}
JOINED = {**FUSED, "residual": True, "keep": True}

CASES = {  # name: dtype, C, K, R, options; all configurations on sm_90, the first everywhere
    **{
        f"64-64-fused-config{i}": ("bf16", 64, 64, 3, {**FUSED, "bias": True, "config": config})
        for i, config in enumerate(CONFIGS)
    },
    **{
        f"rows-{C}-fused-config{i}": ("bf16", C, C, 3, {**FUSED, "config": config})
        for C in (16, 32)
        for i, config in enumerate(ROWS_CONFIGS)
    },
    "rows-16-plain": ("bf16", 16, 16, 3, {"config": ROWS_CONFIGS[0]}),
    "rows-32-joined": ("bf16", 32, 32, 3, {**JOINED, "config": ROWS_CONFIGS[0]}),
    "64-64-plain": ("bf16", 64, 64, 3, {}),
    "64-64-joined": ("bf16", 64, 64, 3, JOINED),
    "64-64-joined-config1": ("bf16", 64, 64, 3, {**JOINED, "config": CONFIGS[1]}),
    "24-40-fp16": ("fp16", 24, 40, 3, {}),
    "1x1-64-256-fused": ("bf16", 64, 256, 1, {**FUSED, "tile_q": 1024}),
    "1x1-two-images": ("bf16", 32, 16, 1, {**FUSED, "channels2": 16, "resample": "up2"}),
    "groups-of-4": ("bf16", 128, 128, 3, {**FUSED, "groups": 32}),
    "fp32": ("fp32", 32, 32, 3, FUSED),
    "tf32": ("fp32", 32, 32, 3, {"precision": "tf32"}),
}
RUNS = [
    (case, target)
    for case, (*_, options) in CASES.items()
    for target in aot.TARGETS
    if target == "sm_90" or options.get("config", CONFIGS[0]) in (CONFIGS[0], ROWS_CONFIGS[0])
]


def tensor_core_instructions(report: aot.Report) -> int:
    return {"sm_80": report.mma_sync, "sm_90": report.wgmma, "gfx942": report.mfma}[report.target]


@pytest.mark.parametrize(("case", "target"), RUNS)
def test_conv2d_fwd_fits_and_uses_the_device(case, target):
    dtype, C, K, R, options = CASES[case]
    if (case, target) == ("tf32", "gfx942"):
        pytest.skip("the op never asks for TF32 on AMD")
    report = aot.report(conv2d_fwd_variant(dtype, C, K, R, **options), target)
    assert report.shared_bytes <= aot.SHARED_LIMIT[target]
    if report.registers is None:
        pytest.skip("needs cuobjdump and nvdisasm beside triton for the rest")
    assert report.spill_bytes <= SPILL_LIMIT
    assert report.loads_16 > 0
    if case != "fp32" or target == "gfx942":
        assert tensor_core_instructions(report) > 0
    if options.get("config", CONFIGS[0]).num_stages > 1 and target != "gfx942":
        assert report.async_copies > 0
        assert report.stores_16 > 0 or "groups" in options


def test_nothing_fused_costs_nothing():
    """All that is read is copied to shared memory, 16 bytes a lane, and multiplied from there."""
    for case in ("rows-16-plain", "64-64-plain"):
        dtype, C, K, R, options = CASES[case]
        variant = conv2d_fwd_variant(dtype, C, K, R, **options)
        ptx = aot.compile_variant(variant, "sm_90").asm["ptx"]
        loop = ptx[ptx.index("cp.async") :]  # before it, the rows kernel loads its filter
        copies = re.findall(r"cp\.async\.c\w\.shared\.global .*", loop)
        assert copies and all(", 0x10, " in copy for copy in copies)
        assert "ld.global" not in loop
        assert "cvt.f32.bf16" not in ptx


@pytest.mark.parametrize("target", aot.TARGETS)
def test_conv2d_fwd_depthwise_fits_the_device(target):
    options = {**JOINED, "groups": 96, "config": DEPTHWISE_CONFIGS[1]}
    report = aot.report(conv2d_fwd_variant("bf16", 96, 96, 7, **options), target)
    assert report.shared_bytes <= aot.SHARED_LIMIT[target]
    if report.registers is None:
        pytest.skip("needs cuobjdump and nvdisasm beside triton for the rest")
    assert report.spill_bytes <= SPILL_LIMIT
    assert report.loads_16 > 0


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("config", [CONFIGS[0], ROWS_CONFIGS[0]], ids=["any", "rows"])
def test_conv2d_fwd_compiles_for_channels_below_a_vector(C, config):
    for target in aot.TARGETS:
        report = aot.report(conv2d_fwd_variant("bf16", C, 16, 3, bias=True, config=config), target)
        assert report.shared_bytes <= aot.SHARED_LIMIT[target]
        assert not report.spill_bytes


def test_sizes_of_images_are_no_variants():
    """Else each new size, and each size of 1, would be compiled in the middle of a run."""

    def step(N, H, W):
        def run():
            x = torch.empty(N, 16, H, W, dtype=torch.bfloat16)
            x = x.contiguous(memory_format=torch.channels_last)
            for channels, size in ((16, 3), (16, 1)):
                weight = torch.empty(channels, 16, size, size, dtype=torch.bfloat16)
                weight = weight.contiguous(memory_format=torch.channels_last)
                nothing = None, None, None, "none", 0.0, "none"
                second = None, None, "none", 0.0, "none"
                geometry = [1, 1], [size // 2] * 2, [1, 1], 1
                conv2d_fwd(x, *nothing, *second, weight, None, *geometry, False, False)

        return run

    found = record_launches(step(1, 64, 64), "sm_90")
    assert {x.kernel.split(":")[1] for x in found} == {
        "conv2d_fwd_kernel", "conv2d_fwd_rows_kernel",
    }  # fmt: skip
    for sizes in ((1, 1, 1), (7, 37, 53), (8, 128, 256)):
        assert record_launches(step(*sizes), "sm_90") == found


def test_compiles_after_kernels_were_interpreted(monkeypatch):
    from fullres.kernels._tune import interpreted
    from fullres.ops.conv import conv2d_triton

    with interpreted():
        ones = torch.ones(1, 1, 3, 3)
        y = conv2d_triton(ones, ones, None, [1, 1], [0, 0], [1, 1], 1)
    assert y.item() == 9
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    assert "wgmma" in aot.compile_variant(conv2d_fwd_variant("fp16", 16, 16, 1), "sm_90").asm["ptx"]


def test_refuses_what_it_cannot_compile():
    variant = conv2d_fwd_variant("bf16", 16, 16, 3)
    with pytest.raises(ValueError, match="want target in .*'sm_90'.*, got 'sm_30'"):
        aot.report(variant, "sm_30")
    short = aot.Variant(conv2d_fwd_kernel, {}, variant.constexprs, variant.config)
    with pytest.raises(ValueError, match="missing arguments .*x_ptr"):
        aot.report(short, "sm_90")


def test_report_is_a_flat_row():
    row = aot.report(conv2d_fwd_variant("bf16", 16, 16, 1), "sm_90").row()
    assert row["kernel"] == "conv2d_fwd_kernel"
    assert row["target"] == "sm_90"
    assert all(v is None or isinstance(v, int | str) for v in row.values())
