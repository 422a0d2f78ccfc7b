import pytest
import torch

from fullres.ops import dispatch
from fullres.ops.dispatch import Shape, implementation, prefer, read_table, write_table

CARD = torch.device("meta")  # its card's name is its type: no table has it
SLOW = Shape("forward", torch.bfloat16, 128, 128, (3, 3))
FAST = Shape("forward", torch.bfloat16, 16, 16, (3, 3))
ONE_PASS = Shape("backward", torch.bfloat16, 16, 16, (3, 3))
TWO_PASS = Shape("backward", torch.bfloat16, 64, 64, (3, 3))
TIMES = {SLOW: (0.5, 0.4), FAST: (0.1, 0.3), ONE_PASS: (0.2, 0.4), TWO_PASS: (0.7, 0.6)}


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "folder" / "card.csv"
    write_table(path, [(shape, *times) for shape, times in TIMES.items()])
    return path


def test_ours_where_nothing_was_measured():
    assert implementation(SLOW, CARD) == implementation(TWO_PASS, CARD) == "triton"


def test_a_table_decides_by_its_times(monkeypatch, table):
    monkeypatch.setenv(dispatch.VARIABLE, str(table))
    assert implementation(SLOW, CARD) == "cudnn"
    assert implementation(FAST, CARD) == "triton"
    assert implementation(ONE_PASS, CARD) == "triton"
    assert implementation(TWO_PASS, CARD) == "two_pass"


def test_a_table_comes_back_as_it_was_written(table):
    assert read_table(table) == TIMES


def test_a_table_that_is_written_again_decides_at_once(monkeypatch, table):
    monkeypatch.setenv(dispatch.VARIABLE, str(table))
    assert implementation(SLOW, CARD) == "cudnn"
    write_table(table, [(SLOW, 0.3, 0.4)])
    assert implementation(SLOW, CARD) == "triton"


def test_pairs_may_be_lists_as_operators_have_them(monkeypatch, table):
    monkeypatch.setenv(dispatch.VARIABLE, str(table))
    given = Shape("forward", torch.bfloat16, 128, 128, [3, 3], [1, 1], [1, 1])
    assert given == SLOW
    assert implementation(given, CARD) == "cudnn"


@pytest.mark.parametrize(
    "other",
    [
        Shape("dgrad", torch.bfloat16, 128, 128, (3, 3)),
        Shape("forward", torch.float16, 128, 128, (3, 3)),
        Shape("forward", torch.bfloat16, 128, 128, (3, 3), stride=(2, 2)),
        Shape("forward", torch.bfloat16, 128, 128, (3, 3), groups=2),
    ],
    ids=["pass", "dtype", "stride", "groups"],
)
def test_a_shape_that_is_not_in_the_table_takes_ours(monkeypatch, table, other):
    monkeypatch.setenv(dispatch.VARIABLE, str(table))
    assert implementation(other, CARD) == "triton"


def test_a_cards_own_table_is_found_by_its_name(monkeypatch, table):
    monkeypatch.setattr(dispatch, "TABLES", table.parent)
    table.rename(table.parent / dispatch.table_name("meta"))
    dispatch._slower_on.cache_clear()
    try:
        assert implementation(SLOW, CARD) == "cudnn"
    finally:
        dispatch._slower_on.cache_clear()
    assert dispatch.table_name("NVIDIA H200") == "nvidia-h200.csv"


def test_a_table_is_read_by_people(table):
    lines = table.read_text().splitlines()
    assert lines[0].split(",")[:3] == ["pass", "dtype", "channels"]
    assert lines[1] == "forward,bfloat16,128,128,3x3,1x1,1x1,1,0.5,0.4"


@pytest.mark.parametrize("choice", ["triton", "cudnn"])
def test_the_environment_and_then_the_code_override(monkeypatch, choice):
    other = {"triton": "cudnn", "cudnn": "triton"}[choice]
    monkeypatch.setenv(dispatch.VARIABLE, other)
    assert implementation(FAST, CARD) == other
    with prefer(choice):
        assert implementation(FAST, CARD) == choice
        with prefer(other):
            assert implementation(FAST, CARD) == other
        assert implementation(FAST, CARD) == choice
        one_pass = "triton" if choice == "triton" else "two_pass"  # cuDNN has no such pass
        assert implementation(ONE_PASS, CARD) == one_pass
    assert implementation(FAST, CARD) == other


@pytest.mark.parametrize("cut", ["whole file", "columns", "times", "dtype"])
def test_what_is_no_table_is_named(monkeypatch, table, cut):
    if cut == "whole file":
        table.unlink()
    elif cut == "columns":
        table.write_text(table.read_text().replace("stride", "strides"))
    elif cut == "dtype":
        table.write_text(table.read_text().replace("bfloat16", "bfloat17"))
    else:
        table.write_text(table.read_text()[: -len(",0.6\n")])
    monkeypatch.setenv(dispatch.VARIABLE, str(table))
    with pytest.raises(ValueError, match=r"FULLRES_DISPATCH: want .*card\.csv"):
        implementation(SLOW, CARD)


def test_other_choices_are_named():
    with pytest.raises(ValueError, match="choice: want one of triton, cudnn, got 'fast'"):
        with prefer("fast"):
            pass
