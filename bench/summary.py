"""The page about a folder of results, and README's block about the newest ones.

`python -m fullres.bench.summary FOLDER` writes FOLDER/summary.md from the JSON files that lie
there; `python -m fullres.bench.summary --readme` writes what stands between README's markers, from
the newest results of a card under bench/results and, where there are none, from predictions.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from . import SECTIONS
from .headline import (
    NOT_YET,
    SHOWN,
    Results,
    guarded,
    headline,
    how_failed,
    markdown,
    over,
    spread,
    text_of,
)
from .record import NOT_BEGUN, ROOT

PAGE = "summary.md"
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- results, written by `python -m fullres.bench.summary --readme` -->"
END = "<!-- end of results -->"
NO_CARD = "NOT RUN ON A CARD"
FACTS = ("card", "driver", "processor", "python", "torch", "triton", "commit", "date")


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
    lines += ["", "## Sections", "", *guarded(lambda: _outcomes(results))]
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
    lines += guarded(lambda: make(results, rows)) if rows else markdown(rows)
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
    lines += [f"- FAILED `{row['test']}`: {text_of(row['failed'])}" for row in failed[:SHOWN]]
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
            f"| {text_of(row['kernel'])} | {row['calls']} | {text_of(row['ms'])} "
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
