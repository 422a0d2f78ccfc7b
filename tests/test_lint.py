"""Rules that no other tool checks, each learnt from a failure; the source is read, nothing runs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A room imports itself and rooms of a lower rank.
RANK = {"kernels": 0, "ops": 1, "engine": 2, "models": 2, "events": 2, "training": 3, "bench": 4}
KERNELS = sorted((ROOT / "kernels").glob("**/*.py"))
MODULES = sorted(path for room in RANK for path in (ROOT / room).glob("**/*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> list[tuple[int, str]]:
    """Every import of a file, also those inside functions: (line, absolute dotted name)."""
    package = ("fullres", *path.relative_to(ROOT).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            found += [(node.lineno, ".".join((*module, alias.name))) for alias in node.names]
    return found


def masked_loads_without_other(source: str) -> list[int]:
    """Lines of tl.load calls with a mask and no `other`: 0 when interpreted, garbage on a GPU."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keywords = {keyword.arg for keyword in node.keywords}
            if node.func.attr == "load" and getattr(node.func.value, "id", "") in (
                "tl",
                "language",
            ):
                masked = "mask" in keywords or len(node.args) > 1
                if masked and "other" not in keywords and len(node.args) < 3:
                    lines.append(node.lineno)
    return lines


def test_the_lint_finds_what_it_looks_for():
    bad = "tl.load(p, mask=m)\ntl.load(p, m)\nx = f(tl.load(p + 1, mask=a & b).to(t))\n"
    good = "tl.load(p)\ntl.load(p, mask=m, other=0.0)\ntl.load(p, m, 0.0)\nfile.load(p, mask=m)\n"
    assert masked_loads_without_other(bad) == [1, 2, 3]
    assert masked_loads_without_other(good) == []
    assert KERNELS and MODULES


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_masked_loads_state_other(path):
    assert masked_loads_without_other(path.read_text()) == []


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_kernels_never_import_torch(path):
    assert [(n, m) for n, m in imports(path) if m.split(".")[0] == "torch"] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    room = path.relative_to(ROOT).parts[0]
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] != "fullres" or len(parts) == 1:
            continue
        target = parts[1]
        if target in RANK:
            assert target == room or RANK[target] < RANK[room], f"line {line} imports {module}"
        else:
            assert not (ROOT / f"{target}.py").exists(), f"line {line} imports {module} from above"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_room_needs_the_libraries_we_compare_with(path):
    # Where a benchmark compares with them, it imports them inside the function that does.
    tree = ast.parse(path.read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in top for a in n.names} | {getattr(n, "module", None) for n in top}
    assert not {(name or "").split(".")[0] for name in names} & {"torchvision", "timm"}


def test_every_test_named_in_the_readme_exists():
    names = {p.name: p.read_text() for p in (ROOT / "tests").glob("test_*.py")}
    text = (ROOT / "tests" / "README.md").read_text()
    named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", text)
    assert len(named) > 20
    file = ""
    for new, test in named:  # a name without a file is in the file named last
        file = new or file
        assert f"def {test}(" in names[file], f"{file}::{test}"
