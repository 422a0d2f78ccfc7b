"""The page about results: failures are told, a wrong result has no ratio, README is up to date."""

import json

import pytest

from fullres.bench import SECTIONS, convergence, headline, record, summary
from fullres.bench.record import NOT_BEGUN

FACTS = {**record.environment(), "card": "NVIDIA H200", "commit": "abc1234", "date": "2026-01-02"}


def saved(folder, name, rows, **facts):
    text = json.dumps({"environment": {**FACTS, **facts}, "rows": rows})
    (folder / f"{name}.json").write_text(text)


def timed(layer, provider, ms, wrong=""):
    row = {"layer": layer, "uses": "a21 12", "pass": "layer", "provider": provider, "ms": ms}
    return row | {"ms_20": ms, "ms_80": ms, "roof_ms": 0.5, "of_roof": 0.5, "wrong": wrong}


def batch(network, provider, batch, predicted, failed="", memory=40.0):
    return {
        "network": network, "provider": provider, "image": "3x1260x2048", "memory_gib": memory,
        "batch": batch, "predicted_batch": predicted, "peak_gib": 39.0, "predicted_peak_gib": 39.5,
        "reserved_gib": 39.9, "device": "NVIDIA H200", "failed": failed,
    }  # fmt: skip


def trained(network, provider, setting, speed, wrong="", failed=""):
    row = dict.fromkeys(("of_roof", "peak_gib", "over_eager"), 0.5) | {"images_per_s": speed}
    row |= {"step_s": speed and 1 / speed, "step_s_20": 0.9, "step_s_80": 1.1, "batch": 4}
    row |= {"network": network, "provider": provider, "setting": setting, "memory_gib": 40.0}
    return row | {"wrong": wrong, "failed": failed}


@pytest.fixture
def card(tmp_path):
    """Results of a card, as two calls would have left them."""
    calls = [{"date": "2026-01-02", "command": f"gpu.py {n}", "seconds": 570.0} for n in range(2)]
    saved(tmp_path, "calls", calls)
    outcomes = {"tests": "FAILED", "kernels": "INCOMPLETE", "largest": "passed"}
    saved(tmp_path, "gpu", [
        {"section": k, "outcome": v, "seconds": 1.0, "detail": f"how {k} went"}
        for k, v in outcomes.items()
    ])  # fmt: skip
    saved(tmp_path, "tests", [
        {"test": "test_a.py::test_x", "outcome": "passed", "seconds": 1.0, "failed": ""},
        {"test": "test_a.py::test_y", "outcome": "failed", "seconds": 1.0, "failed": "1 != 2"},
        {"test": "test_b.py::test_z", "outcome": "left", "seconds": 0.0, "failed": NOT_BEGUN},
    ])  # fmt: skip
    saved(tmp_path, "kernels", [
        timed("3x3", "fullres", 1.0), timed("3x3", "eager", 3.0), timed("3x3", "compile", 2.0),
        timed("1x1", "fullres", 1.0), timed("1x1", "eager", 3.0), timed("1x1", "compile", 8.0, "y"),
        timed("5x5", "fullres", 1.0, "dw"), timed("5x5", "eager", 97.0),
        {**timed("7x7", "", None, NOT_BEGUN), "pass": ""},
    ])  # fmt: skip
    saved(tmp_path, "largest", [
        batch("uresnet", "eager bf16", 1, 1), batch("uresnet", "fullres, bf16", 41, 42),
        batch("a21", "eager bf16", None, 9, "batch 9: its process died"),
        batch("a21", "fullres, bf16", 60, 96, f"not finished {record.NOT_FINISHED}"),
        batch("a21", "fullres, bf16", 190, 200, memory=80.0),
    ])  # fmt: skip
    return tmp_path


def section(page, name):
    return page.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_the_page_tells_where_it_comes_from_and_how_every_section_went(card):
    page = summary.page(card)
    assert page.startswith("# fullres on NVIDIA H200\n")
    for fact in ("NVIDIA H200", FACTS["torch"], FACTS["triton"], "abc1234", "2026-01-02"):
        assert f"| {fact} |" in page
    assert "`gpu.py 0`" in page and "`gpu.py 1`" in page
    outcomes = section(page, "Sections")
    assert "| tests | **FAILED** | 1 | how tests went |" in outcomes
    assert "| kernels | **INCOMPLETE** |" in outcomes and "| largest | passed |" in outcomes
    assert outcomes.count("**NOT RUN**") == len(SECTIONS) - 3
    assert section(page, "training").strip() == "No result: not yet measured."


def test_failures_are_listed(card):
    tests = section(summary.page(card), "tests")
    assert "| test_a.py | 1 | 1 | 0 | 0 | 2 |" in tests
    assert "FAILED `test_a.py::test_y`: 1 != 2" in tests and "test_z" not in tests
    assert "1 passed, 1 failed, 0 skipped, 1 not run yet" in summary.page(card)


def test_a_wrong_result_has_no_ratio(card):
    page = summary.page(card)
    lines = {line.split(" | ")[0][2:]: line for line in section(page, "kernels").splitlines()}
    assert "| 3.00 | 2.00 |" in lines["3x3"]
    assert "| 3.00 | WRONG |" in lines["1x1"]
    assert "| WRONG |" in lines["5x5"] and lines["5x5"].rstrip("| ").endswith("dw")
    assert "97" not in page  # which a wrong result of ours would have been faster by
    said = section(page, "In short")
    assert "eager takes 3.00 times as long as ours (geometric mean of 2 layers" in said
    assert "1 WRONG" in said and "1 layers not yet measured" in said


def test_measured_stands_beside_predicted(card):
    said = section(summary.page(card), "In short")
    assert "| **fullres, bf16** | **41 (predicted 42)** | **at least 60 (predicted 96)** |" in said
    assert "| eager bf16 | 1 (predicted 1) | FAILED (predicted 9) |" in said
    assert "Scaling: not yet measured" in said
    assert "Predicted on fake tensors" not in said


def test_speed_is_told_of_right_results_and_its_bottleneck_named(card):
    ours, eager, equal, own = headline.OURS, "eager bf16", "equal batch", "largest batch"
    saved(card, "training", [
        trained("a21", ours, "one image", 1.0), trained("a21", eager, "one image", 1.0),
        trained("a21", ours, equal, 3.0), trained("a21", ours, own, 5.0),
        trained("a21", eager, equal, 2.0), trained("a21", eager, own, None, failed="no memory"),
        trained("uresnet", ours, "one image", 7.77, wrong="gradient_error 0.3"),
        trained("uresnet", ours, own, None, failed=NOT_BEGUN),
    ])  # fmt: skip
    kernel = {"network": "a21", "provider": ours, "setting": equal, "batch": 4, "calls": 3}
    saved(card, "training_kernels", [
        {**kernel, "kernel": "wgrad", "ms": 4.0, "share": 0.4},
        {**kernel, "kernel": "dgrad", "ms": 3.0, "share": 0.3},
        {**kernel, "kernel": "7 others", "ms": 9.0, "share": 0.3},
        {**kernel, "kernel": "cast", "ms": 5.0, "share": 0.9, "provider": eager},
        {**kernel, "kernel": "start", "ms": 6.0, "share": 0.9, "batch": 1},
    ])  # fmt: skip
    page = summary.page(card)
    said = section(page, "In short")
    assert f"| **{ours}** | **3 / 5** | **WRONG / not yet measured** |" in said
    assert "| eager bf16 | 2 / FAILED | - / - |" in said
    assert "a21: `wgrad`, 40 % of a step of 4 images" in said
    lines = section(page, "training").splitlines()
    wrong = next(line for line in lines if "gradient_error" in line)
    assert "| WRONG |" in wrong and "7.77" in wrong  # what it took is no secret
    assert "0.3333 (0.9 to 1.1)" in section(page, "training")
    assert "| dgrad | 3 | 3 | 30.0 % |" in lines


def test_a_small_card_shows_what_it_has(card):
    rows = headline.Results(card).rows("largest")
    saved(card, "largest", [{**row, "memory_gib": 23.6} for row in rows[:2]])
    said = section(summary.page(card), "In short")
    assert "| largest batch in 23.6 GiB, 3 x 1260 x 2048 | uresnet |" in said
    assert "| **fullres, bf16** | **41 (predicted 42)** |" in said


def test_without_a_card_nothing_looks_measured(card):
    for name in headline.Results(card).files:
        rows = headline.Results(card).rows(name)
        saved(card, name, rows, card="none")
    page = summary.page(card)
    assert page.startswith("# fullres: NOT RUN ON A CARD")
    said = section(page, "In short")
    assert "| predicted largest batch in 40 GiB" in said and "41" not in said
    assert said.count("not yet measured") == len(headline.LINES) + 2
    assert "**NOT RUN ON A CARD.**" in section(page, "largest")


def test_of_rows_that_cannot_be_read_the_page_says_so(card):
    saved(card, "largest", [{"what": 1}])
    saved(card, "scaling", [{"what": 1}])
    page = summary.page(card)
    assert "FAILED to read the results: KeyError" in section(page, "scaling")
    assert "FAILED to read the results: KeyError" in section(page, "In short")
    assert "| 3.00 | 2.00 |" in page
    (card / "largest.json").write_text("{")
    assert "No result" in section(summary.page(card), "largest")


def test_results_of_another_commit_are_told_apart(card):
    saved(card, "focal_loss", [], commit="fff0000")
    assert "**Of another run: commit fff0000.**" in section(summary.page(card), "focal_loss")


def test_convergence_and_scaling_are_summed_up(card):
    row = dict.fromkeys(convergence.METRICS, 0.5) | {"final_loss": 1.0, "held_out_loss": 1.0}
    row |= {"device": "NVIDIA H200", "network": "a21", "image": "3x1260x2048", "of_steps": 240}
    row |= {"wrong": "", "failed": "", "outside_spread": None}
    rows = [{**row, "provider": name} for name in convergence.RUNS]
    ours = next(row for row in rows if row["provider"] == headline.OURS)
    ours["outside_spread"] = ""
    saved(card, "convergence", rows)
    fit = {"network": "a21", "provider": "fullres, keep, bf16", "device": "NVIDIA H200"}
    fit |= {"axis": "image", "peak_exponent": 0.981, "step_exponent": 1.02, "left": 0, "ends": ""}
    saved(card, "scaling_fits", [fit])
    said = section(summary.page(card), "In short")
    assert "fullres, bf16: all 5 ends are within eager float32's own spread" in said
    assert "growing image: memory as pixels^0.98 and time as pixels^1.02" in said


def test_readme_is_what_the_recorded_results_say():
    """Where this fails, run `python -m fullres.bench.summary --readme`."""
    text = summary.README.read_text()
    assert summary.with_block(text) == text
    with pytest.raises(ValueError, match="want one"):
        summary.with_block(text.replace(summary.END, ""))


def test_readme_shows_a_cards_newest_results(card, monkeypatch, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    monkeypatch.setattr(summary, "ROOT", root)
    monkeypatch.setattr(summary, "RESULTS", root / "bench" / "results")
    for name, commit in (("2026-01-01-old", "old"), ("2026-01-02-abc1234", "abc1234")):
        folder = root / "bench" / "results" / "nvidia-h200" / name
        folder.mkdir(parents=True)
        for path in card.iterdir():
            (folder / path.name).write_text(path.read_text().replace("abc1234", commit))
    (folder / "largest.png").write_bytes(b"")
    (root / "bench" / "results" / "none" / "2026-01-03-new").mkdir(parents=True)
    lines = "\n".join(summary.block())
    assert "**41 (predicted 42)**" in lines
    assert "(bench/results/nvidia-h200/2026-01-02-abc1234/largest.png)" in lines
    assert "From [bench/results/nvidia-h200/2026-01-02-abc1234]" in lines and "old" not in lines
