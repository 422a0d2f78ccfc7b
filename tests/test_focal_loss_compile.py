"""The losses' kernels compiled for devices that need not be here: do they fit and use them?"""

import pytest

pytest.importorskip("triton")

import triton

from fullres.kernels import aot
from fullres.kernels.focal_loss import CONFIGS, softmax_focal_loss_variant
from fullres.kernels.linear_focal_loss import CONFIGS as LINEAR_CONFIGS
from fullres.kernels.linear_focal_loss import linear_focal_loss_variant
from fullres.kernels.sigmoid_focal_loss import sigmoid_focal_loss_variant

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile"
)
SPILL_LIMIT = 64  # bytes a thread: a few rarely used values, which L1 holds

LAST = {"channels_last": True}
FULL = {"alpha": True, "weight": True, "smooth": True, "power": -1}
CASES = {  # name: dtype, C, options
    "planes-forward": ("bf16", 3, {}),
    "planes-backward": ("bf16", 3, {"backward": True}),
    "trainer-forward": ("bf16", 3, {**LAST, "by_class": True, "bins": 16}),
    "trainer-backward": ("bf16", 3, {**LAST, "by_class": True, "detach": True, "backward": True}),
    "fp32-backward": ("fp32", 3, {"backward": True, "labels": "i64"}),
    "21-classes-map": ("fp16", 21, {**LAST, "pixels": True}),
    "80-classes-forward": ("bf16", 80, FULL),
    "80-classes-backward": ("bf16", 80, {**FULL, **LAST, "backward": True}),
    "1000-classes-forward": ("bf16", 1000, {}),
    "1000-classes-backward": ("bf16", 1000, {**LAST, "backward": True}),
}


def assert_fits(report: aot.Report) -> None:
    assert report.shared_bytes <= aot.SHARED_LIMIT[report.target]
    if report.registers is None:
        pytest.skip("needs cuobjdump and nvdisasm beside triton for the rest")
    assert report.spill_bytes <= SPILL_LIMIT
    assert report.loads_16 > 0


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_softmax_focal_loss_fits_and_reads_in_vectors(case, target):
    dtype, C, options = CASES[case]
    report = aot.report(softmax_focal_loss_variant(dtype, C, **options), target)
    assert_fits(report)
    if options.get("backward"):
        assert report.stores_16 > 0


@pytest.mark.parametrize("config", CONFIGS[1:], ids=["config1", "config2"])
@pytest.mark.parametrize("backward", [False, True])
def test_every_configuration_fits_the_card_that_is_tuned(config, backward):
    variant = softmax_focal_loss_variant("bf16", 3, backward=backward, config=config)
    assert_fits(aot.report(variant, "sm_90"))


def test_it_compiles_for_sizes_of_one():
    """Triton turns an argument that equals 1 into a constant: the addresses must still be built."""
    for backward in (False, True):
        variant = softmax_focal_loss_variant("bf16", 3, backward=backward)
        ones = dict.fromkeys(("N", "H", "P", "x_n", "x_c"), 1)
        signature = {k: v for k, v in variant.signature.items() if k not in ones}
        constexprs = {**variant.constexprs, **ones}
        one = aot.Variant(variant.kernel, signature, constexprs, variant.config)
        aot.compile_variant(one, "sm_90")


def test_it_compiles_for_images_beyond_int32():
    for backward in (False, True):
        variant = softmax_focal_loss_variant("bf16", 3, backward=backward)
        wide = {k: "i64" if k in ("P", "x_n", "x_c") else v for k, v in variant.signature.items()}
        aot.compile_variant(
            aot.Variant(variant.kernel, wide, variant.constexprs, variant.config), "sm_90"
        )


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sigmoid_focal_loss_fits_and_reads_in_vectors(dtype, backward, target):
    options = {"backward": backward, "pixels": dtype == "fp32"}
    report = aot.report(sigmoid_focal_loss_variant(dtype, **options), target)
    assert_fits(report)
    assert report.loads - report.loads_16 <= 1  # the scalar above
    if backward:
        assert report.stores_16 > 0


LINEAR = {"norm": True, "act": "leaky_relu"}
LINEAR_CASES = {  # name: F, C, options
    "forward": (16, 3, {"config": LINEAR_CONFIGS[1], "by_class": True, "bins": 16, **LINEAR}),
    "backward": (16, 3, {"backward": True, "config": LINEAR_CONFIGS[1], **LINEAR}),
    "first-backward": (16, 3, {"backward": True, **LINEAR}),
    "wide-backward": (256, 3, {"backward": True, **LINEAR}),
    "square-backward": (64, 64, {"backward": True, **LINEAR}),
}


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", LINEAR_CASES)
def test_linear_focal_loss_fits_and_uses_the_device(case, target):
    F, C, options = LINEAR_CASES[case]
    if options.get("backward") and target == "gfx942":
        options = options | {"products": "ieee"}  # as the op asks for on AMD
    report = aot.report(linear_focal_loss_variant("bf16", F, C, **options), target)
    assert_fits(report)
    assert report.wgmma or report.mma_sync or report.mfma
    if options.get("backward") and target != "gfx942":
        assert report.stores_16 > 0
