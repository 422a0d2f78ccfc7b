"""What a folder of results says first: measured beside predicted, and "not yet measured".

A number of a card stands beside the predicted one, which is called so. A ratio needs two results
that were found right in the same run; else it is WRONG.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .record import NOT_FINISHED

NOT_YET = "not yet measured"
MEMORY = 40  # GiB
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
    lines += [[text_of(row.get(name)) for name in names] for row in rows[:most]]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    more = len(rows) - most
    return table if more <= 0 else [*table, "", f"... and {more} more lines."]


def text_of(value: object) -> str:
    """Return a cell of a table."""
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
    text = text_of(float(row[name]))
    return text if None in between else f"{text} ({text_of(between[0])} to {text_of(between[1])})"


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
    return "WRONG" if failed else text_of(float(row["images_per_s"]))


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
    lines = guarded(lambda: largest_table(results, predicted)) if some else []
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
    speeds = guarded(lambda: speed_table(results)) if results else []
    lines += ["", *speeds, ""] if speeds else ["", f"- Training, images a second: {NOT_YET}"]
    for name, line in LINES.items():
        found = guarded(lambda line=line: [line(results)]) if results else [NOT_YET]
        lines.append(f"- {name}: {' '.join(found)}")
    return lines


def guarded(make: Callable[[], list[str]]) -> list[str]:
    """Return what make does, or that it failed: the rest of a page stands all the same."""
    try:
        return make()
    except Exception as error:
        return [f"FAILED to read the results: {type(error).__name__}: {error}"]
