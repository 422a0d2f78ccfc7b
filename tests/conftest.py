"""What all tests share: seeded inputs, the device marker, and the real events where present."""

import os
import subprocess
import sys
from pathlib import Path

# Small tensors on few cores: threads that wait for each other cost ten times what they save. Set
# before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Skip device tests where there is no device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU: run `make gpu` on a machine with one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def rng() -> torch.Generator:
    """The one source of random inputs, so that every test can be repeated."""
    return torch.Generator().manual_seed(20_260_101)


@pytest.fixture
def fullres(monkeypatch, capsys):
    """Run the command line here; return exit code, standard output and standard error."""
    from fullres import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fullres", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def real_events() -> Path:
    """Three simulated SBND events, where a checkout has them beside it."""
    path = REPOSITORY.parent / "shared" / "data" / "sbnd_sim_3_events.h5"
    if not path.exists():
        pytest.skip("needs the real event file shared/data/sbnd_sim_3_events.h5")
    return path


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    """The published network's parameter shapes, where a checkout has them beside it."""
    path = REPOSITORY.parent / "shared" / "reference"
    if not path.exists():
        pytest.skip("needs the published shapes in shared/reference")
    return path


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory) -> list:
    """What the test's own file, run as a program, left as rank 0 and as rank 1.

    It is given a rank and a folder, and saves into folder/rank.pt.
    """
    folder = tmp_path_factory.mktemp("two_ranks")
    ranks = [
        subprocess.Popen([sys.executable, request.path, str(rank), folder]) for rank in range(2)
    ]
    try:
        assert [p.wait(timeout=120) for p in ranks] == [0, 0]
    finally:
        for p in ranks:
            p.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def pytest_addoption(parser):
    """Add --emulate, which runs what the interpreter would as compiled for a device."""
    parser.addoption(
        "--emulate",
        choices=["sm_80", "sm_90"],
        help="where tests interpret kernels, run what the compiler makes of them for this target",
    )


def pytest_configure(config):
    """Emulate what the interpreter would run, if asked: before test files import its name."""
    if target := config.getoption("--emulate"):
        from fullres.kernels import _tune
        from fullres.kernels.emulator import emulated

        _tune.interpreted = lambda: emulated(target)
