"""The package installs, imports lightly, and ships what it should and nothing else."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import fullres

REPOSITORY = Path(__file__).resolve().parents[1]


def python(code: str, **options) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_torch_and_nothing_heavier():
    heavy = ["triton", "lightning", "torchmetrics", "h5py", "matplotlib", "typer", "tensorboard"]
    loaded = python(f"import sys, fullres; print([m for m in {heavy} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_models_ops_and_engine_work_where_triton_is_not_installed():
    python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fullres\n"
        "from fullres.ops.conv import conv2d\n"
        "y = conv2d(torch.ones(1, 3, 5, 7), torch.ones(4, 3, 3, 3), padding=1)\n"
        "assert y.shape == (1, 4, 5, 7) and y[0, 0, 2, 2] == 27\n"
        "assert fullres.resnet18(num_classes=2)(torch.ones(2, 3, 33, 47)).shape == (2, 2)\n"
        "assert fullres.meter(torch.nn.Linear(4, 4), (1, 4)).peak > 0\n"
    )


def test_every_public_name_exists():
    for name in dir(fullres):
        assert getattr(fullres, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'resnet19'"):
        _ = fullres.resnet19


def test_installed_version_is_that_of_the_code():
    assert metadata.version("fullres") == fullres.__version__


def test_tested_versions_satisfy_what_is_required():
    from packaging.requirements import Requirement

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in project["dependencies"] + sum(extras.values(), [])]
    pins = [
        Requirement(line)
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    tested = {pin.name.lower(): str(pin.specifier).removeprefix("==") for pin in pins}
    for requirement in wanted:
        if requirement.name != "fullres":
            version = tested[requirement.name.lower()]
            assert requirement.specifier.contains(version), requirement


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "demo", "runs")
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(folder), str(source)],
        check=True,
    )
    (built,) = folder.glob("fullres-*.whl")
    return built


def test_wheel_holds_every_module_and_neither_tests_nor_results(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    rooms = [p.parent.name for p in REPOSITORY.glob("*/__init__.py")]
    modules = {f"fullres/{p.name}" for p in REPOSITORY.glob("*.py")}
    modules |= {
        f"fullres/{room}/{p.name}" for room in rooms for p in (REPOSITORY / room).glob("*.py")
    }
    assert names == modules | {"fullres/py.typed"}
    assert not any({"tests", "results"} & {*name.split("/")} for name in names)


def test_installed_wheel_works_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        + [str(wheel)],
        check=True,
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    where = python("import fullres; print(fullres.__file__)", cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(target)
    done = subprocess.run(
        [sys.executable, str(target / "bin" / "fullres"), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("train", "predict", "generate", "display", "bench"):
        assert command in done.stdout
