"""Kernels compiled for devices that need not be here: do they fit, and use what the device has?"""

import pytest

pytest.importorskip("triton")

import triton

from fullres.kernels import aot
from fullres.kernels.conv import CONFIGS, ROWS_CONFIGS, conv2d_fwd_kernel, conv2d_fwd_variant

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)
SPILL_LIMIT = 64  # bytes a thread: a few rarely used values, which L1 holds
# Configurations made for another device, which the tuner here passes over: what they spill.
KNOWN_SPILLS = {("rows-32-32-bf16-config2", "gfx942"): 160}

VARIANTS = {  # name: dtype, C, K, R, precision
    "3x3-16-16-bf16": ("bf16", 16, 16, 3, "ieee"),
    "3x3-64-64-bf16": ("bf16", 64, 64, 3, "ieee"),
}
OTHERS = {  # with the first configuration, which runs everywhere
    "3x3-32-32-fp16": ("fp16", 32, 32, 3, "ieee"),
    "1x1-16-32-fp16": ("fp16", 16, 32, 1, "ieee"),
    "1x1-32-16-bf16": ("bf16", 32, 16, 1, "ieee"),
    "3x3-112-112-bf16": ("bf16", 112, 112, 3, "ieee"),
    "3x3-24-40-bf16": ("bf16", 24, 40, 3, "ieee"),
    "3x3-32-32-fp32": ("fp32", 32, 32, 3, "ieee"),
    "3x3-32-32-tf32": ("fp32", 32, 32, 3, "tf32"),
}
CASES = {
    **{f"{name}-config{i}": (*v, c) for name, v in VARIANTS.items() for i, c in enumerate(CONFIGS)},
    **{f"{name}-config0": (*v, CONFIGS[0]) for name, v in OTHERS.items()},
    **{
        f"rows-{C}-{C}-bf16-config{i}": ("bf16", C, C, 3, "ieee", config)
        for C in (16, 32)
        for i, config in enumerate(ROWS_CONFIGS)
    },
}


def tensor_core_instructions(report: aot.Report) -> int:
    return {"sm_80": report.mma_sync, "sm_90": report.wgmma, "gfx942": report.mfma}[report.target]


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_conv2d_fwd_fits_and_uses_the_device(case, target):
    dtype, C, K, R, precision, config = CASES[case]
    if (precision, target) == ("tf32", "gfx942"):
        pytest.skip("the op never asks for TF32 on AMD")
    report = aot.report(
        conv2d_fwd_variant(dtype, C, K, R, precision=precision, config=config), target
    )
    assert report.shared_bytes <= aot.SHARED_LIMIT[target]
    if report.registers is None:
        pytest.skip("needs cuobjdump and nvdisasm beside triton for the rest")
    assert report.spill_bytes <= KNOWN_SPILLS.get((case, target), SPILL_LIMIT)
    assert report.loads_16 > 0
    if (dtype, precision) != ("fp32", "ieee") or target == "gfx942":
        assert tensor_core_instructions(report) > 0
    if config.num_stages > 1 and R == 3 and target != "gfx942":
        assert report.async_copies > 0


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("config", [CONFIGS[0], ROWS_CONFIGS[0]], ids=["any", "rows"])
@pytest.mark.parametrize("target", aot.TARGETS)
def test_conv2d_fwd_compiles_for_channels_below_a_vector(C, config, target):
    report = aot.report(conv2d_fwd_variant("bf16", C, 16, 3, bias=False, config=config), target)
    assert report.shared_bytes <= aot.SHARED_LIMIT[target]
    assert not report.spill_bytes


def test_conv2d_fwd_compiles_for_sizes_of_one():
    """Triton turns an argument that equals 1 into a constant: the addresses must still be built."""
    variant = conv2d_fwd_variant("bf16", 16, 16, 3)
    for size in ("H", "W"):
        signature = {k: v for k, v in variant.signature.items() if k != size}
        constexprs = {**variant.constexprs, size: 1}
        aot.compile_variant(
            aot.Variant(variant.kernel, signature, constexprs, variant.config), "sm_90"
        )


def test_compiles_after_kernels_were_interpreted(monkeypatch):
    import torch

    from fullres.kernels._tune import interpreted
    from fullres.ops.conv import conv2d_triton

    with interpreted():
        y = conv2d_triton(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), None, 0)
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
