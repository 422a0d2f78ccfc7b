"""`fullres plan`: what it prints, writes and refuses."""

import json
import re

import pytest
import torch

from fullres import Plan, cli, plan
from fullres.training import memory
from fullres.training.loss import SegmentationLoss

TINY = "filters=2,depth=2,level_blocks=1,deepest_blocks=1,deepest_channels=8,deepest_kernel=3"
NETWORK = ("--preset", "a21", "--network", TINY, "--image-size", "32x48")


def test_plan_prints_its_table_and_writes_files(fullres, tmp_path):
    saved, drawn = tmp_path / "plan.json", tmp_path / "memory.png"
    files = ("--save", saved, "--plot", drawn)
    code, out, _ = fullres("plan", *NETWORK, "--batch-size", 2, "--memory", "1GiB", *files)
    assert code == 0
    assert out.startswith("UResNet, 2 x 3 x 32 x 48, bfloat16, adamw: ")
    assert str(Plan.load(saved)) in out
    for word in ("policy", "made again", "1.00 times the time", f"wrote {saved}", f"wrote {drawn}"):
        assert word in out
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_plan_prints_nothing_but_json_where_that_is_asked(fullres, tmp_path):
    saved = tmp_path / "plan.json"
    more = ("--precision", "fp32", "--optimizer", "sgd", "--hardware", "h200", "--json")
    code, out, _ = fullres(
        "plan", *NETWORK, "--batch-size", 2, "--memory", "1GiB", "--save", saved, *more
    )
    assert code == 0
    told = json.loads(out)
    assert told == json.loads(json.dumps(Plan.load(saved).as_dict()))
    assert (told["input_shape"], told["dtype"], told["optimizer"]) == (
        [2, 3, 32, 48], "float32", "sgd",
    )  # fmt: skip
    assert told["memory"] == 2**30 and told["reserve"] == 2 * 3 * 32 * 48
    assert told["reserve"] < told["peak_bytes"] < told["memory"]


def test_labels_count_once():
    """Where the loss is computed at the peak, labels that it made itself would count as much."""
    build, channels = cli._network("uresnet", "a21", TINY)
    size, options = (64, 96), {"memory": "1GiB", "dtype": torch.float32}

    def with_labels(logits):
        labels = torch.zeros(4, channels, *size, dtype=torch.uint8)
        return SegmentationLoss("focal")(logits, labels)

    own = plan(build(), (4, channels, *size), criterion=with_labels, **options)
    labels = memory.label_bytes(1, channels, size)
    beside = memory.plan_step(
        build(), 4, (channels, *size), labels=labels, criterion=memory.pixel_criterion(), **options
    )
    assert own.report.peak_at.phase in ("criterion", "backward")
    assert 0 <= beside.peak_bytes - own.peak_bytes <= 8
    assert beside.reserve == 4 * labels


def test_impossible_budget_ends_with_one_line_and_the_least(fullres):
    code, out, err = fullres("plan", *NETWORK, "--batch-size", 2, "--memory", "10KiB")
    assert code == 1 and out == ""
    assert err.count("\n") == 1
    least = re.search(r"error: memory: want at least (.*) for 2 x 3 x 32 x 48 in bfloat16", err)[1]
    arguments = ("plan", *NETWORK, "--batch-size", 2, "--memory", least)
    assert fullres(*arguments)[0] == 0


def test_largest_batch_fits_and_the_next_does_not(fullres):
    budget = ("--memory", "2MiB")
    code, out, _ = fullres("plan", *NETWORK, "--batch-size", "max", *budget)
    assert code == 0
    n = int(re.match(r"largest batch: (\d+)\nUResNet, (\d+) x", out)[1])
    assert n > 2 and f"UResNet, {n} x 3" in out
    assert fullres("plan", *NETWORK, "--batch-size", n, *budget)[0] == 0
    assert fullres("plan", *NETWORK, "--batch-size", n + 1, *budget)[0] == 1
    code, _, err = fullres("plan", *NETWORK, "--batch-size", "max", "--memory", "10KiB")
    assert code == 1 and "for 1 x 3 x 32 x 48" in err


def test_stored_maps_may_wait_in_host_memory(fullres):
    arguments = (
        "plan",
        "--preset",
        "uresnet",
        "--network",
        TINY,
        "--image-size",
        "128x192",
        "--json",
    )
    whole = json.loads(fullres(*arguments, "--batch-size", 2, "--memory", "1GiB")[1])
    memory = ("--batch-size", 2, "--memory", whole["peak_bytes"] // 2)
    alone = json.loads(fullres(*arguments, *memory)[1])
    beside = json.loads(fullres(*arguments, *memory, "--host-memory", "1GiB")[1])
    assert alone["host_bytes"] == 0 < beside["host_bytes"]
    assert beside["time_ratio"] < alone["time_ratio"]


def test_resnets_are_planned_to_their_outputs(fullres):
    code, out, _ = fullres(
        "plan", "--model", "resnet18", "--image-size", "64x64", "--memory", "1GiB", "--json"
    )
    assert code == 0
    told = json.loads(out)
    assert (told["model"], told["reserve"]) == ("ResNet", 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--precision", "fp8"], "want precision from bf16, fp16, fp32; got 'fp8'"),
        (["--batch-size", "0"], "want batch_size >= 1, or max; got '0'"),
        (["--batch-size", "most"], "want batch_size >= 1, or max; got 'most'"),
        (["--model", "vgg"], "want model from resnet18, .*; got 'vgg'"),
        (["--model", "resnet50", "--network", "filters=3"], "want network with the model uresnet"),
        (["--image-size", "12"], "want image_size as ROWSxCOLUMNS"),
        (["--memory", "plenty"], "memory: want bytes, or text such as '40GiB', got 'plenty'"),
        (["--host-memory", "-1"], "host_memory: want bytes, or text such as '40GiB', got '-1'"),
        (["--hardware", "abacus"], "hardware: want one of .*, got 'abacus'"),
        (["--optimizer", "magic"], "optimizer: want one of adamw, .*, got 'magic'"),
    ],
)
def test_plan_refuses(fullres, arguments, message):
    code, out, err = fullres("plan", *(NETWORK if "--model" not in arguments else ()), *arguments)
    assert code == 1 and out == ""
    assert re.search(message, err)


def test_criterion_is_the_focal_loss_of_labels_of_zero():
    logits = [torch.randn(2, 3, 4, 5) for _ in range(3)]
    labels = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    for scheme in ("focal", "lin"):
        want = SegmentationLoss(scheme)(logits, labels)
        assert memory.pixel_criterion(scheme)(logits) == want
    assert memory.label_bytes(2, 3, (4, 5)) == labels.untyped_storage().nbytes()
