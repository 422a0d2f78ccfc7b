"""The page about a folder of results, and README's block about the newest ones.

`python -m fullres.bench.summary FOLDER` writes FOLDER/summary.md from the JSON files that lie
there; `python -m fullres.bench.summary --readme` writes what stands between README's markers, from
the newest results of a card under bench/results and, where there are none, from predictions.

A number is printed with where it came from: measured ones of a card beside predicted ones, which
are called so. A ratio needs two results that were found right; else it is WRONG.
"""

import json
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import SECTIONS
from .record import NOT_BEGUN, NOT_FINISHED, ROOT

PAGE = "summary.md"
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- results, written by `python -m fullres.bench.summary --readme` -->"
END = "<!-- end of results -->"
NOT_YET = "not yet measured"
NO_CARD = "NOT RUN ON A CARD"
MEMORY = 40  # GiB, of the headline
FACTS = ("card", "driver", "processor", "python", "torch", "triton", "commit", "date")
OURS = "fullres, bf16"
SHOWN = 100  # lines of a table; the rest is in the CSV file beside it


class Results:
    """The JSON files of a folder: rows beside what they depend on."""

    def __init__(self, folder: Path):
        """Read them; a file that is broken counts as absent."""
        self.folder = folder
        self.files: dict[str, dict] = {}
        for path in sorted(folder.glob("*.json")):
            try:
                saved = json.loads(path.read_text())
            except ValueError:
                continue
            if isinstance(saved, dict) and {"environment", "rows"} <= {*saved}:
                self.files[path.stem] = saved

    def rows(self, name: str) -> list[dict]:
        """Return a file's rows."""
        return self.files.get(name, {}).get("rows", [])

    def facts(self, name: str | None = None) -> dict:
        """Return what a file's rows depend on; of the whole folder without a name."""
        names = [name] if name else [*({"gpu"} & {*self.files}), *self.files]
        return self.files[names[0]]["environment"] if names and names[0] in self.files else {}

    def on_card(self, name: str | None = None) -> bool:
        """Return whether a file's rows are of a card."""
        return self.facts(name).get("card", "none") != "none"

    def measured(self, name: str) -> list[dict]:
        """Return a file's rows if they are of a card."""
        return self.rows(name) if self.on_card(name) else []


# Text


def markdown(rows: Sequence[dict], most: int = SHOWN) -> list[str]:
    """Return the lines of a table of rows with the same keys; where there are more, it says so."""
    if not rows:
        return ["(no rows)"]
    names = list(rows[0])
    lines = [names, ["---"] * len(names)]
    lines += [[_text(row.get(name)) for name in names] for row in rows[:most]]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    more = len(rows) - most
    return table if more <= 0 else [*table, "", f"... and {more} more lines."]


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def spread(row: dict, name: str, low: str, high: str) -> str:
    """Return a median with where the repeats lie, such as "1.2 (1.1 to 1.4)"."""
    if row.get(name) is None:
        return ""
    between = [row.get(low), row.get(high)]
    text = _text(float(row[name]))
    return text if None in between else f"{text} ({_text(between[0])} to {_text(between[1])})"


def how_failed(row: dict) -> str:
    """Return what a row says of why it has no number, or a wrong one; "" for nothing."""
    return str(row.get("failed") or row.get("wrong") or "")


def over(other: dict | None, ours: dict | None, name: str) -> str:
    """Return how many times ours `other` is in a column; WRONG where one of them is."""
    if other is None or ours is None or None in (other.get(name), ours.get(name)):
        return NOT_YET
    if how_failed(other) or how_failed(ours):
        return "WRONG"
    return f"{other[name] / ours[name]:.2f}"


def _mean(ratios: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


# The headline: a function each, from results; NOT_YET where that is the truth


def largest_table(results: Results | None, predicted: Sequence[dict]) -> list[str]:
    """Return the table of the largest batches: measured beside predicted, a column a network."""
    measured = [] if results is None else results.measured("largest")
    memory, image = _memory(measured), (measured or predicted)[0]["image"]
    rows = {(r["network"], r["provider"]): r for r in measured if r["memory_gib"] == memory}
    foretold = {
        (r["network"], r["provider"].replace(", budget 1.0", "")): r["batch"]
        for r in predicted
        if r["memory_gib"] == memory and r["image"] == image and not r["failed"]
    }
    own = {of: row["predicted_batch"] for of, row in rows.items()}
    foretold |= {of: batch for of, batch in own.items() if batch is not None}
    networks, providers = (
        list(dict.fromkeys(names)) for names in zip(*foretold, *rows, strict=True)
    )
    size = image.replace("x", " x ")
    what = f"{'' if rows else 'predicted '}largest batch in {memory:g} GiB, {size}"
    lines = []
    for provider in providers:
        line = {what: provider}
        for network in networks:
            of = network, provider
            if rows:
                line[network] = _batch(rows.get(of), foretold.get(of))
            else:
                line[network] = foretold.get(of, "")
        lines.append(_bold(line, provider))
    return markdown(lines)


def _memory(rows: Sequence[dict]) -> float:
    """Return the headline's memory; of a card that has less, the most that it was asked for."""
    found = {row["memory_gib"] for row in rows} - {None}
    return MEMORY if MEMORY in found or not found else max(found)


def _batch(measured: dict | None, predicted: int | None) -> str:
    foretold = "" if predicted is None else f"predicted {predicted}"
    if measured is None:
        return foretold
    count, failed = measured.get("batch"), measured.get("failed")
    if failed and NOT_FINISHED not in failed:
        text = "FAILED"
    elif failed:
        text = f"at least {count}" if count else NOT_YET
    else:
        text = str(count)
    return f"{text} ({foretold})" if foretold else text


def kernels_line(results: Results) -> str:
    """Return how whole layers compare, as dispatched."""
    rows = [row for row in results.measured("kernels") if row["pass"] == "layer"]
    known = {(row["layer"], row["provider"]): row for row in rows}
    ours = [row for row in rows if row["provider"] == "fullres"]
    said = []
    for baseline in ("eager", "compile"):
        texts = [over(known.get((row["layer"], baseline)), row, "ms") for row in ours]
        ratios = [float(text) for text in texts if text not in (NOT_YET, "WRONG")]
        if ratios:
            line = f"{baseline} takes {_mean(ratios):.2f} times as long as ours (geometric mean of"
            line += f" {len(ratios)} layers, {min(ratios):.2f} to {max(ratios):.2f}"
            wrong = texts.count("WRONG")
            said.append(f"{line}{f'; {wrong} WRONG' if wrong else ''})")
        elif "WRONG" in texts:
            said.append(f"{baseline}: WRONG")
    of_roof = [row["of_roof"] for row in ours if row.get("of_roof") and not how_failed(row)]
    if of_roof:
        said.append(f"ours reach {100 * statistics.median(of_roof):.0f} % of the roof (median)")
    left = sum(NOT_FINISHED in how_failed(row) for row in results.measured("kernels"))
    return "; ".join([*said, *([f"{left} layers {NOT_YET}"] if left else [])]) or NOT_YET


def speed_table(results: Results) -> list[str]:
    """Return images a second, a column a network: at the equal batch, and at everyone's largest."""
    rows = results.measured("training")
    memory = _memory(rows)
    rows = [row for row in rows if row["memory_gib"] == memory]
    known = {(r["network"], r["provider"], r["setting"]): r for r in rows}
    if not any(row["images_per_s"] for row in rows):
        return []
    # Where eager bf16 holds one image, that is the equal batch.
    settings = {"equal batch": ("equal batch", "one image"), "largest batch": ("largest batch",)}
    networks = list(dict.fromkeys(row["network"] for row in rows))
    what = f"images a second: {' / '.join(settings)} in {memory:g} GiB"
    lines = []
    for provider in dict.fromkeys(row["provider"] for row in rows):
        line = {what: provider}
        for network in networks:
            found = [
                next(filter(None, (known.get((network, provider, name)) for name in names)), None)
                for names in settings.values()
            ]
            line[network] = " / ".join(map(_speed, found))
        lines.append(_bold(line, provider))
    return markdown(lines)


def _speed(row: dict | None) -> str:
    if row is None:
        return "-"
    failed = how_failed(row)
    if row["images_per_s"] is None:
        return NOT_YET if not failed or NOT_FINISHED in failed else "FAILED"
    return "WRONG" if failed else _text(float(row["images_per_s"]))


def _bold(line: dict, provider: str) -> dict:
    mark = "**" if provider == OURS else ""
    return {name: f"{mark}{cell}{mark}" for name, cell in line.items()}


def bottleneck_line(results: Results) -> str:
    """Return the kernel in which most of our step's time goes, a network each."""
    found: dict[str, dict] = {}
    for row in results.measured("training_kernels"):
        best = found.get(row["network"])
        if row["provider"] != OURS or row["kernel"].endswith(" others"):
            continue
        if best is None or _weight(row) > _weight(best):
            found[row["network"]] = row
    said = []
    for network, row in found.items():
        share = f"{100 * row['share']:.0f} % of a step of {row['batch']} images"
        said.append(f"{network}: `{row['kernel'][:80]}`, {share}")
    return "; ".join(said) or NOT_YET


def _weight(row: dict) -> tuple[int, float]:
    return row["batch"], row["ms"]


def scaling_line(results: Results) -> str:
    """Return the exponents of ours: cost as a power of the pixels."""
    said = []
    for row in results.measured("scaling_fits"):
        powers = {name: row.get(f"{name}_exponent") for name in ("peak", "step")}
        if row["device"] in ("cpu", "none, predicted") or None in powers.values():
            continue
        text = " and ".join(
            f"{what} as pixels^{powers[name]:.2f}"
            for name, what in (("peak", "memory"), ("step", "time"))
        )
        left = f", {row['left']} sizes left" if row["left"] else ""
        said.append(f"{row['network']}, {row['provider']}, growing {row['axis']}: {text}{left}")
    return "; ".join(said) or NOT_YET


def convergence_line(results: Results) -> str:
    """Return how training ends, beside eager float32."""
    from .convergence import verdict

    return "; ".join(verdict(results.measured("convergence"))) or NOT_YET


def tests_line(results: Results) -> str:
    """Return how many device tests came out how."""
    rows = results.measured("tests")
    count = {k: sum(r["outcome"] == k for r in rows) for k in ("passed", "failed", "skipped")}
    left = len(rows) - sum(count.values())
    said = ", ".join(f"{number} {name}" for name, number in count.items())
    return f"{said}{f', {left} not run yet' if left else ''}" if rows else NOT_YET


LINES: dict[str, Callable[[Results], str]] = {
    "Tests on a card": tests_line,
    "Convolution layers, forward and backward": kernels_line,
    "The next bottleneck of ours": bottleneck_line,
    "Convergence": convergence_line,
    "Scaling": scaling_line,
}


def headline(results: Results | None, predicted: Sequence[dict]) -> list[str]:
    """Return what there is to say first; results of no card say that nothing was measured."""
    measured = results is not None and results.measured("largest")
    some = bool(measured or predicted)
    lines = _guarded(lambda: largest_table(results, predicted)) if some else []
    if lines and not measured:
        slower = [
            f"{row['time_ratio']:.1f}"
            for row in predicted
            if row["provider"] == OURS and row["memory_gib"] == MEMORY and row.get("time_ratio")
        ]
        lines += ["", f"Predicted on fake tensors; largest batches on a card: {NOT_YET}."]
        if slower:
            lines[-1] += f" Ours take {', '.join(slower)} times as long for an image there as"
            lines[-1] += " without a limit, by rooflines."
    speeds = _guarded(lambda: speed_table(results)) if results else []
    lines += ["", *speeds, ""] if speeds else ["", f"- Training, images a second: {NOT_YET}"]
    for name, line in LINES.items():
        found = _guarded(lambda line=line: [line(results)]) if results else [NOT_YET]
        lines.append(f"- {name}: {' '.join(found)}")
    return lines


def _guarded(make: Callable[[], list[str]]) -> list[str]:
    """Return what make does, or that it failed: the rest of a page stands all the same."""
    try:
        return make()
    except Exception as error:
        return [f"FAILED to read the results: {type(error).__name__}: {error}"]


# The page


def write(folder: Path) -> Path:
    """Write the folder's summary.md; return its path."""
    path = folder / PAGE
    try:
        text = page(folder)
    except Exception:  # the run whose page it is goes on
        text = f"# The page could not be written\n\n```\n{traceback.format_exc()}```\n"
    path.write_text(text)
    return path


def page(folder: Path) -> str:
    """Return the page about a folder of results, in Markdown."""
    results = Results(folder)
    facts, card = results.facts(), results.on_card()
    lines = [f"# fullres on {facts['card']}" if card else f"# fullres: {NO_CARD}", ""]
    if not card:
        lines += ["Everything below is predicted, or ran on a CPU at a small size.", ""]
    lines += markdown([{"what": name, "value": facts.get(name)} for name in FACTS])
    lines += ["", "Commands:", ""]
    calls = [f"{c['date']}, {c['seconds']} s: `{c['command']}`" for c in results.rows("calls")]
    others = {f"`{saved['environment'].get('command')}`": None for saved in results.files.values()}
    lines += [f"- {call}" for call in calls or others]
    lines += ["", "## In short", "", *headline(results, predictions(results))]
    lines += ["", "## Sections", "", *_guarded(lambda: _outcomes(results))]
    others = [name for name in results.files if name not in {*SECTIONS, *WITHIN}]
    for name in [*SECTIONS, *others]:
        lines += ["", f"## {name}", "", *_section(results, name)]
    return "\n".join(lines) + "\n"


def predictions(results: Results) -> list[dict]:
    """Return the rows of predicted batches: the folder's own, else the newest recorded ones."""
    own = results.rows("batches")
    newest = _newest("batches")
    return own or (Results(newest).rows("batches") if newest else [])


def _outcomes(results: Results) -> list[str]:
    rows = {row["section"]: row for row in results.rows("gpu")}
    empty = {"outcome": "NOT RUN", "seconds": None, "detail": ""}
    lines = [{"section": name, **empty, **rows.get(name, {})} for name in SECTIONS]
    for line in lines:
        if line["outcome"] not in ("passed", "rehearsed"):
            line["outcome"] = f"**{line['outcome']}**"
    return markdown(lines)


def _section(results: Results, name: str) -> list[str]:
    """Return a section's lines: where it ran, its table and pictures."""
    if name not in results.files:
        return [f"No result: {NOT_YET}."]
    lines, facts, own = [], results.facts(), results.facts(name)
    if not results.on_card(name):
        lines += [f"**{NO_CARD}.**", ""]
    others = [
        f"{k} {own.get(k)}" for k in ("card", "driver", "commit") if own.get(k) != facts.get(k)
    ]
    if others:
        lines += [f"**Of another run: {', '.join(others)}.**", ""]
    every = results.rows(name)
    rows = [row for row in every if how_failed(row) != NOT_BEGUN or name == "tests"]
    make = TABLES.get(name, lambda _, rows: markdown(rows))
    lines += _guarded(lambda: make(results, rows)) if rows else markdown(rows)
    failed = sum(bool(how_failed(row)) for row in every)
    if failed and name != "tests":
        lines += ["", f"{failed} of {len(every)} rows failed, are wrong or not finished."]
    pictures = sorted(results.folder.glob(f"{PICTURES.get(name, name)}*.png"))
    for picture in pictures:
        lines += ["", f"![{picture.stem}]({picture.name})"]
    beside = [f"{name}.csv", f"{name}.log"]
    lines += ["", " ".join(f"[{n}]({n})" for n in beside if (results.folder / n).exists())]
    return lines


PICTURES = {"kernels": "roofline"}
# Files that are told of elsewhere on the page, or are long.
WITHIN = {"gpu", "calls", "scaling_fits", "convergence_curves", "training_kernels"}


def _tests(results: Results, rows: list[dict]) -> list[str]:
    from .device_tests import by_file

    failed = [row for row in rows if row["outcome"] == "failed"]
    lines = [*markdown(by_file(rows)), ""]
    lines += [f"- FAILED `{row['test']}`: {_text(row['failed'])}" for row in failed[:SHOWN]]
    more = len(failed) - SHOWN
    return [*lines, *([f"- ... and {more} more"] if more > 0 else [])]


def _kernels(results: Results, rows: list[dict]) -> list[str]:
    whole = [row for row in rows if row["pass"] in ("layer", "")]
    if not results.on_card("kernels"):
        names = ("layer", "uses", "bound_by", "roof_ms", "predicted_ms", "eager_ms", "compile_ms")
        lines = ["Predicted from bytes and FLOP at an H200's rates, for eager and compile too:", ""]
        return [*lines, *markdown([{k: row.get(k) for k in names} for row in whole])]
    known = {(row["layer"], row["provider"]): row for row in whole}
    lines = []
    for row in whole:
        if row["provider"] not in ("fullres", ""):
            continue
        line = {"layer": row["layer"], "uses": row.get("uses"), "roof ms": row.get("roof_ms")}
        line["ours ms (20 to 80 %)"] = spread(row, "ms", "ms_20", "ms_80")
        line["of roof"] = row.get("of_roof")
        for baseline in ("eager", "compile"):
            line[f"{baseline} over ours"] = over(known.get((row["layer"], baseline)), row, "ms")
        lines.append({**line, "wrong": how_failed(row)})
    return markdown(lines)


def _focal_loss(results: Results, rows: list[dict]) -> list[str]:
    if not results.on_card("focal_loss"):
        return markdown(rows)
    ours = {row["workload"]: row for row in rows if row["provider"] == "fullres"}
    return markdown(
        [
            {
                "workload": row["workload"],
                "images": row["images"],
                "provider": row["provider"],
                "step ms (20 to 80 %)": spread(row, "step_ms", "step_ms_20", "step_ms_80"),
                "of a copy's speed": row["step_of_copy"],
                "MiB beyond inputs": row["peak_beyond_mib"],
                "over ours": over(row, ours.get(row["workload"]), "step_ms"),
                "wrong": how_failed(row),
            }
            for row in rows
        ]
    )


def _largest(results: Results, rows: list[dict]) -> list[str]:
    names = ("network", "provider", "memory_gib", "batch", "predicted_batch", "peak_gib")
    names += ("predicted_peak_gib", "reserved_gib", "device", "failed")
    order = {name: None for row in rows for name in (row["network"],)}
    rows = sorted(rows, key=lambda row: ([*order].index(row["network"]), row["memory_gib"]))
    return markdown([{name: row[name] for name in names} for row in rows])


def _training(results: Results, rows: list[dict]) -> list[str]:
    names = ("network", "setting", "memory_gib", "provider", "batch")
    table = [
        {name: row[name] for name in names}
        | {
            "step s (20 to 80 %)": spread(row, "step_s", "step_s_20", "step_s_80"),
            "images a second": row["images_per_s"],
            "over eager": "WRONG" if row["wrong"] else row["over_eager"],
            "of roof": row["of_roof"],
            "peak GiB": row["peak_gib"],
            "wrong": how_failed(row),
        }
        for row in rows
    ]
    lines = markdown(table)
    for row in results.rows("training_kernels"):
        of = f"{row['network']}, {row['provider']}, {row['setting']}, batch {row['batch']}"
        if f"Time by kernel: {of}" not in lines:
            lines += ["", f"Time by kernel: {of}", "", "| kernel | calls | ms | share |"]
            lines += ["| --- | --- | --- | --- |"]
        lines.append(
            f"| {_text(row['kernel'])} | {row['calls']} | {_text(row['ms'])} "
            f"| {100 * row['share']:.1f} % |"
        )
    return lines


def _convergence(results: Results, rows: list[dict]) -> list[str]:
    from .convergence import verdict

    one = ("device", "network", "image", "of_steps")
    shown = [{k: v for k, v in row.items() if k not in one} for row in rows]
    what = ", ".join(f"{name} {rows[0][name]}" for name in one)
    return [f"{what}.", "", *markdown(shown), "", *(f"- {line}" for line in verdict(rows))]


def _scaling(results: Results, rows: list[dict]) -> list[str]:
    fits = results.rows("scaling_fits")
    shown = [{k: v for k, v in r.items() if not k.endswith("_points")} for r in fits]
    lines = ["Exponents: cost as a power of the pixels; 1 is a line.", "", *markdown(shown), ""]
    names = ("network", "provider", "image", "batch", "predicted_peak_gib", "peak_gib")
    for row in rows:
        row["step s (least to most)"] = spread(row, "step_s", "fastest_s", "slowest_s")
    names += ("step s (least to most)", "device", "ends", "failed")
    return [*lines, *markdown([{name: row[name] for name in names} for row in rows])]


TABLES: dict[str, Callable[[Results, list[dict]], list[str]]] = {
    "tests": _tests,
    "kernels": _kernels,
    "focal_loss": _focal_loss,
    "largest": _largest,
    "training": _training,
    "convergence": _convergence,
    "scaling": _scaling,
}


# README


def _newest(name: str, card: bool = False) -> Path | None:
    """Return the newest folder under bench/results with such a file, of a card or of anything."""
    found = [
        (path.parent.name[:10], path.parent)
        for path in RESULTS.glob(f"*/*/{name}.json")
        if not card or path.parent.parent.name not in ("none", "cpu")
    ]
    return max(found)[1] if found else None


def block() -> list[str]:
    """Return README's lines about the newest recorded results."""
    folder, foretold = _newest("gpu", card=True), _newest("batches")
    results = Results(folder) if folder else None
    predicted = Results(foretold).rows("batches") if foretold else []
    lines = headline(results, predicted)
    pictures = [p for f in (folder, foretold) if f for n in PICTURE for p in [f / n] if p.exists()]
    if pictures:
        lines += ["", f"![largest batches]({pictures[0].relative_to(ROOT)})"]
    sources = [f"[{f.relative_to(ROOT)}]({f.relative_to(ROOT)})" for f in (folder, foretold) if f]
    return [*lines, "", f"From {' and '.join(sources)}."]


PICTURE = ("largest.png", "batches.png")


def with_block(text: str) -> str:
    """Return README's text with the block of the results that are recorded.

    Raises:
        ValueError: it has not one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"README.md: want one {BEGIN} and one {END} behind it")
    before, rest = text.split(BEGIN)
    return "\n".join([f"{before}{BEGIN}", "", *block(), "", END]) + rest.split(END)[1]


def main(arguments: Sequence[str]) -> int:
    """Write what is asked for; return the exit status."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 2
    if arguments[0] == "--readme":
        readme = README
        readme.write_text(with_block(readme.read_text()))
        print(f"wrote {readme}")
    else:
        print(f"wrote {write(Path(arguments[0]))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
