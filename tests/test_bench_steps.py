"""The steps that are measured: the same network, batch and optimizer for whoever runs them."""

import functools

import pytest
import torch
import triton
from torch._functorch import config as functorch

from fullres.bench import steps
from fullres.models import UResNetConfig, uresnet

IMAGE = (2, 24, 40)
CONFIG = UResNetConfig(
    filters=2, depth=1, level_blocks=1, deepest_blocks=1, deepest_channels=4, final_blocks=1,
    residual=True, planes=2,
)  # fmt: skip
TINY = steps.Network(lambda: uresnet(CONFIG), steps.pixel_labels, steps.pixel_loss)
LIMIT = 300_000  # bytes, a twentieth less than the step takes without a limit
FLOAT32 = [name for name in steps.PROVIDERS if name.endswith("float32")]
BF16 = [n for n in steps.PROVIDERS if n.endswith("bf16") and not n.startswith("torch.compile")]


def step(provider, batch=2, memory=None, **options):
    make = steps.PROVIDERS[provider]
    return make(TINY, IMAGE, batch, device="cpu", memory=memory, **options)


def gap(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.fixture(scope="module")
def truth():
    return step("eager float32").double().gradients()


@pytest.mark.parametrize("provider", FLOAT32)
def test_float32_steps_are_the_same_step(provider, truth):
    loss, gradients = step(provider).gradients()
    assert loss == pytest.approx(truth[0], rel=1e-5)
    assert gap(gradients, truth[1]) < 1e-4


@pytest.mark.parametrize("provider", BF16)
def test_bf16_steps_compute_in_bf16(provider, truth):
    loss, gradients = step(provider).gradients()
    assert loss == pytest.approx(truth[0], rel=0.02)
    assert 1e-4 < gap(gradients, truth[1]) < 0.2


@pytest.mark.parametrize("seed", [0, 1])
def test_batches_are_sparse_with_all_classes_and_follow_the_seed(seed):
    images, labels = steps.draw_batch(TINY, IMAGE, 3, "cpu", seed)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert 0.01 < (images != 0).float().mean() < 0.06 and images.isfinite().all()
    for image, label in zip(images, labels, strict=True):
        assert {*label.unique().tolist()} == {0, 1, 2}
        assert ((image == 0) >= (label == 0)).all()
    first, _ = steps.draw_batch(TINY, IMAGE, 1, "cpu", seed)
    other, _ = steps.draw_batch(TINY, IMAGE, 1, "cpu", 7)
    assert torch.equal(first, images[:1]) and not torch.equal(first, other)


def test_labels_of_images_are_of_all_classes():
    network = steps.Network(TINY.build, steps.image_labels, TINY.loss)
    assert steps.draw_batch(network, IMAGE, 4, "cpu", 0)[1].tolist() == [0, 1, 2, 0]


def test_a_step_is_that_of_a_plain_loop():
    """With the optimizer's state there before, and no trace of how it was made."""
    made = step("eager float32")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TINY.build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss = TINY.loss(model(made.images), made.labels)
        loss.backward()
        optimizer.step()
        assert torch.equal(made.run(), loss)
    for ours, theirs in zip(made.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(p in made.optimizer.state for p in made.model.parameters())


def test_our_step_runs_by_the_plan_for_its_memory():
    free, tight = step(steps.OURS), step(steps.OURS, memory=LIMIT)
    assert free.plan.time_ratio == 1 < tight.plan.time_ratio
    assert tight.plan.peak_bytes <= LIMIT < free.plan.peak_bytes
    plan = tight.plan
    assert step(steps.OURS, plan=plan).plan is plan
    # The part of a batch that a check looks at runs by the same plan.
    loss, gradients = tight.gradients(1)
    wanted, truth = step("eager float32").double().gradients(1)
    assert loss == pytest.approx(wanted, rel=0.02) and gap(gradients, truth) < 0.2


def test_who_waits_is_told_when_the_device_is_needed():
    for provider in ("eager bf16", steps.OURS):
        told = []
        made = step(provider, ready=lambda told=told: told.append(True))
        assert told == [True]
        made.run()
        assert told == [True]


def test_compiling_precedes_the_first_kernel_and_no_code_is_shared(monkeypatch):
    events = []

    def compile_fx(graph, inputs):
        events.append(functorch.activation_memory_budget)
        return lambda *given: events.append("runs") or graph(*given)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    made, other = (
        steps.compiled(budget, None)(
            TINY, IMAGE, 1, device="cpu", ready=lambda: events.append("ready")
        )
        for budget in (0.5, 0.1)
    )
    assert events == []
    loss, gradients = made.gradients()
    wanted, truth = step("eager float32", 1).double().gradients()
    assert loss == pytest.approx(wanted, rel=1e-5) and gap(gradients, truth) < 1e-4
    assert events == [0.5, "ready", "runs"]
    other.backward()
    assert events[3:] == [0.1, "ready", "runs"]
    assert functorch.activation_memory_budget == 1.0


def test_exact_products_are_so_inside_alone():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with steps.exact_products():
        assert not torch.backends.cudnn.allow_tf32
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)


def test_a_steps_kernels_are_compiled_into_the_shared_cache(tmp_path, monkeypatch):
    asked = []

    def build(launches, out):
        asked.append({launch.kernel.split(":")[1] for launch in launches})
        assert {launch.target for launch in launches} == {"sm_90"}
        (out / "cache" / "kernel").touch()

    monkeypatch.setattr("fullres.kernels.launches.build", build)
    plan = steps.make_plan(TINY, IMAGE, 2)
    given = TINY, IMAGE, 2, plan, tmp_path / "build"
    steps.compile_kernels(*given)
    assert not asked  # there is no card
    monkeypatch.setattr(steps, "compile_target", lambda: "sm_90")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(2):
        steps.compile_kernels(*given)
    assert asked[0] == asked[1]
    wanted = {"conv2d_fwd_kernel", "conv2d_dgrad_kernel", "softmax_focal_loss_backward_kernel"}
    assert wanted <= asked[0]
    assert (tmp_path / "cache" / "kernel").exists()


def test_tuners_take_the_first_configuration_or_are_quick():
    from triton.runtime.autotuner import Autotuner

    class Kernel:
        configs = [triton.Config({"BLOCK": 1}), triton.Config({"BLOCK": 2})]

        class fn:  # noqa: N801
            run = staticmethod(lambda *args, **options: (args, options["BLOCK"]))

    run = Autotuner.run
    with steps.untuned():
        kernel = Kernel()
        assert Autotuner.run(kernel, "x") == (("x",), 1) and kernel.best_config.kwargs["BLOCK"] == 1
    assert Autotuner.run is run
    with steps.quick_tuning():
        assert Autotuner.do_bench.keywords == {"warmup": 2, "rep": 15}
    assert isinstance(vars(Autotuner)["do_bench"], functools.cached_property)
