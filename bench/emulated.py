"""What a training step's kernels ask of a card, counted without one: it names the next bottleneck.

The step runs once on fake tensors, at full size, and what it launches is noted. Each different
launch then runs in `kernels/emulator.py`: some of its programs, in memory that takes no more than
they touch. What they carry out, scaled to the grid, is divided by what an H200 can do:

    instructions    those of warps, at one a clock for each of a processor's four schedulers
    shared memory   its turns, one a clock and processor
    L1              pieces of 32 bytes that cross between it and L2, 64 bytes a clock and processor
    bytes           of the arguments, each element once, at a copy's speed
    products        of tensor cores, at a large product's speed

The largest of the five is what a launch needs, and binds. What is not in it makes a card slower,
some kernels by much: latency, and how few programs fit side by side to hide it; a last wave that
does not fill the card; units that take several clocks an instruction (integers two, special
functions eight); what launching takes. Or faster: PTX has about a third more instructions than
ptxas makes of it, the tuner may choose another configuration than the first, arguments may wait in
L2. What torch runs by itself is left out: cuDNN, copies, the optimizer.
"""

import math
import mmap
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from ..engine import convert
from ..engine.cards import HARDWARE
from ..engine.fakes import DevicePath
from ..engine.precompile import training_step
from ..kernels.emulator import Counts, emulated
from ..models import PRESETS, uresnet
from .record import NOT_BEGUN, NOT_FINISHED, resumed, save, table
from .steps import IMAGE, NETWORKS, PUBLISHED, HeldLabels, Network, pixel_labels, pixel_loss

BATCH = 8
DTYPE = torch.bfloat16
POLICY = "keep"  # nothing is made again, as where memory suffices
TARGET, CARD = "sm_90", HARDWARE["h200"]
INTERIOR = 6  # programs that are emulated beside the first and the last
KNOWN = {
    **{n: Network(partial(uresnet, n), pixel_labels, pixel_loss) for n in PRESETS},
    **NETWORKS,
}
# Constants by which a reader knows a launch, and what they are where nothing need be said; images
# and norms that it may be given, or not.
SHOWN = {
    "C": None, "K": None, "C2": 0, "R": None, "S": None, "STRIDE_H": 1, "STRIDE_W": 1, "DIL_H": 1,
    "DIL_W": 1, "ACT": None, "RESAMPLE": "none",
}  # fmt: skip
OPTIONAL = ("norm", "residual", "r", "x2", "add", "keep", "sums")
ROOFS = ("instructions", "shared", "l1", "bytes", "products")
ALIGNED = 128  # elements; whole sectors and vectors, whatever the type
LINES = 25  # of the printed table


# A step's launches


@dataclass(frozen=True)
class Memory:
    """A tensor argument: its place in one of the launch's memories, which arguments may share."""

    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements

    @property
    def end(self) -> int:
        """Return the bytes of the memory, up to its last element."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (self.offset + last + 1) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Return the bytes of its elements; those that a stride of 0 repeats count once."""
        sizes = zip(self.shape, self.stride, strict=True)
        return math.prod(n if s else min(n, 1) for n, s in sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class Launch:
    """A launch that can be made again: the kernel, its arguments by name, its grid."""

    kernel: JITFunction
    arguments: tuple[tuple[str, Any], ...]  # options such as num_warps among them
    grid: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Return the kernel's name."""
        return self.kernel.fn.__name__

    @property
    def programs(self) -> int:
        """Return the size of the grid."""
        return math.prod(self.grid)

    @property
    def memories(self) -> list[Memory]:
        """Return the different tensors that it is given."""
        return list(dict.fromkeys(v for _, v in self.arguments if isinstance(v, Memory)))

    @property
    def constants(self) -> dict[str, Any]:
        """Return what it is compiled for: constants of the kernel, warps, stages."""
        names = {p.name for p in self.kernel.params if p.is_constexpr}
        names |= {"num_warps", "num_stages"}
        return {k: getattr(v, "value", v) for k, v in self.arguments if k in names}

    @property
    def bytes(self) -> int:
        """Return the bytes of its tensors, each element once."""
        return sum(memory.bytes for memory in self.memories)


def launches(step: Callable[[], Any]) -> Counter[Launch]:
    """Return the kernel launches of step(), and how often it makes each; none is made.

    step makes its tensors itself, on the CPU: they are fake. A kernel with several configurations
    is launched in its first.
    """
    found: Counter[Launch] = Counter()

    def note(self, *args, grid, warmup, **kwargs):
        names = [p.name for p in self.params]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        missing = {p.name: p.default for p in self.params if p.has_default}
        sizes = grid(missing | given) if callable(grid) else grid
        found[Launch(self, _described(given), (*sizes, 1, 1)[:3])] += 1

    with mock.patch.object(JITFunction, "run", note), _first_configurations():
        with FakeTensorMode(), DevicePath():
            step()
    return found


@contextmanager
def _first_configurations() -> Iterator[None]:
    def first(self, *args, **kwargs):
        self.best_config = self.configs[0]
        return self.fn.run(*args, **kwargs, **self.best_config.all_kwargs())

    with mock.patch.object(Autotuner, "run", first):
        yield


def _described(arguments: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return arguments as a launch holds them; alike for views that differ in where they begin."""
    of = {k: v.untyped_storage()._cdata for k, v in arguments.items() if isinstance(v, Tensor)}
    numbers = {storage: number for number, storage in enumerate(dict.fromkeys(of.values()))}
    begins = {
        storage: min(arguments[k].storage_offset() for k in of if of[k] == storage)
        for storage in numbers
    }

    def memory(name: str, tensor: Tensor) -> Memory:
        offset = tensor.storage_offset() - begins[of[name]] // ALIGNED * ALIGNED
        place = tuple(tensor.shape), tensor.stride(), offset
        return Memory(numbers[of[name]], tensor.dtype, *place)

    return tuple((k, memory(k, v) if k in of else v) for k, v in arguments.items())


# Emulation


def sparse(size: int) -> Tensor:
    """Return bytes of zeros that take room only where they are touched, more than there is memory.

    Linux promises no room for them (MAP_NORESERVE, which Python names from 3.13 on).
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, max(size, 1), flags=flags), dtype=torch.uint8)


def _arguments(launch: Launch) -> dict[str, Any]:
    """Return what the launch is given, with zeros for its tensors."""
    ends: dict[int, int] = {}
    for memory in launch.memories:
        ends[memory.number] = max(ends.get(memory.number, 0), memory.end)
    room = {number: sparse(-(-end // 16) * 16) for number, end in ends.items()}

    def real(memory: Memory) -> Tensor:
        if 0 in memory.shape:
            return torch.empty(memory.shape, dtype=memory.dtype)
        whole = room[memory.number].view(memory.dtype)
        return whole.as_strided(memory.shape, memory.stride, memory.offset)

    return {k: real(v) if isinstance(v, Memory) else v for k, v in launch.arguments}


def sampled(programs: int) -> tuple[list[int], list[int]]:
    """Return the programs that stand for themselves, and those that stand for all the others.

    The first and the last lie at an image's border, where there may be less to do, or more. Of the
    others one is drawn of each of `INTERIOR` equal ranges, by a seed that is the grid's size: where
    rows of tiles begin and end many others lie at a border, and are drawn as often as they are.
    """
    if programs <= 4 * INTERIOR:
        return list(range(programs)), []
    wide, draw = (programs - 2) / INTERIOR, random.Random(programs).random
    return [0, programs - 1], sorted({1 + int((i + draw()) * wide) for i in range(INTERIOR)})


@dataclass
class Work:
    """What all of a launch's programs carry out."""

    instructions: float = 0.0  # of warps
    wavefronts: float = 0.0  # turns of shared memory
    sectors: float = 0.0  # of 32 bytes
    flop: Counter = field(default_factory=Counter)  # of tensor cores, by "16 bits" and "tf32"

    def add(self, counts: Counts, weight: float) -> None:
        """Add what some programs did, weight times."""
        self.instructions += weight * float(sum(counts.instructions.values()))
        self.wavefronts += weight * float(sum(counts.wavefronts.values()))
        self.sectors += weight * float(sum(counts.sectors.values()))
        for opcode, many in counts.instructions.items():
            if flop := product_flop(opcode):
                kind = "tf32" if "tf32" in opcode else "16 bits"
                self.flop[kind] += weight * float(many) * flop


def product_flop(opcode: str) -> float:
    """Return what one warp multiplies and adds by an instruction of tensor cores, else 0."""
    if not opcode.startswith(("mma.", "wgmma.mma")):
        return 0
    m, n, k = map(int, re.search(r"m(\d+)n(\d+)k(\d+)", opcode).groups())
    return 2 * m * n * k / (4 if opcode.startswith("wgmma") else 1)  # four warps make one


def emulate(launch: Launch) -> tuple[Work, int]:
    """Return what a launch carries out, by some of its programs, and how many those are.

    Raises:
        Exception: the kernel does not compile, or does what a device leaves undefined.
    """
    work, ran, given = Work(), 0, _arguments(launch)
    across, down, _ = launch.grid
    alone, others = sampled(launch.programs)
    weight = (launch.programs - len(alone)) / max(1, len(others))
    for picks, stands_for in ((alone, 1.0), (others, weight)):
        if picks:
            places = [(i % across, i // across % down, i // across // down) for i in picks]
            with emulated(TARGET, lambda _, places=places: places, count=True) as made:
                launch.kernel.run(grid=launch.grid, warmup=False, **given)
            for counts in made.counts.values():
                work.add(counts, stands_for)
            ran += len(picks)
    return work, ran


def needs(launch: Launch, work: Work) -> dict[str, float]:
    """Return the seconds that the card needs for each of ROOFS."""
    clocks = CARD.processors * CARD.clock
    return {
        "instructions": work.instructions / (4 * clocks),
        "shared": work.wavefronts / clocks,
        "l1": work.sectors * 32 / (64 * clocks),
        "bytes": launch.bytes / CARD.copy,
        "products": work.flop["16 bits"] / CARD.product + work.flop["tf32"] / CARD.product_tf32,
    }


# The benchmark


def run(
    out: Path,
    networks: Sequence[str] | None = None,
    image: Sequence[int] = IMAGE,
    batch: int = BATCH,
    seconds: float | None = None,
) -> list[dict]:
    """Emulate networks' steps; print what binds them, save emulated.json and .csv, return its rows.

    Called again with the same out, commit and machine it goes on with what is not there yet. The
    sums by kernel are saved as emulated_kernels.

    Args:
        out: the folder.
        networks: some of KNOWN; None for those of PUBLISHED.
        image: [C, H, W].
        batch: images.
        seconds: begin no other launch after that long; rows say so.

    Raises:
        ValueError: an unknown network.
    """
    until = math.inf if seconds is None else time.monotonic() + seconds
    networks = networks or PUBLISHED
    if unknown := [name for name in networks if name not in KNOWN]:
        raise ValueError(f"networks: want some of {', '.join(KNOWN)}; got {', '.join(unknown)}")
    known = {_key(r): r for r in resumed("emulated", out) if NOT_FINISHED not in r["failed"]}
    rows: list[dict] = []
    print(
        "Kernels of a training step: NOT RUN ON A CARD, but emulated and counted. Milliseconds of"
    )
    print(f"a step at the rates of an {CARD.name}: {CARD.copy / 1e12} TB/s and {CARD.processors}")
    print(
        f"processors at {CARD.clock / 1e9:g} GHz. Latency, occupancy, ptxas (PTX has a third more"
    )
    print("instructions), the tuner and torch's own kernels are not in it.")
    for name in networks:
        found = launches(_step(KNOWN[name], image, batch))
        here = {"network": name, "image": "x".join(map(str, image)), "batch": batch}
        mine = [
            {**here, "launch": number, **_described_row(launch, calls)}
            for number, (launch, calls) in enumerate(found.items())
        ]
        mine = [known.get(_key(row)) or {**row, **_failed(NOT_BEGUN)} for row in mine]
        rows += mine
        for done, (row, launch) in enumerate(zip(mine, found, strict=True)):
            if row["failed"] != NOT_BEGUN:
                continue
            if time.monotonic() >= until:
                break
            _progress(f"{name}: emulated {done} of {len(mine)} launches")
            row |= _figures(launch, row["calls"])
            save("emulated", rows, out)
        _progress("")
    rows.sort(key=lambda row: (networks.index(row["network"]), -(row["needs_ms"] or math.inf)))
    save("emulated", rows, out)
    save("emulated_kernels", by_kernel(rows), out)
    _print(rows)
    return rows


def _step(network: Network, image: Sequence[int], batch: int) -> Callable[[], None]:
    """Return a training step as far as its backward pass; a loss with labels of all zeros."""
    return training_step(
        lambda: convert(network.build(), policy=POLICY, inplace=True),
        (batch, *image),
        DTYPE,
        HeldLabels(network, image),
    )


def _key(row: dict) -> tuple:
    """Return what tells a row: the launches of a step come in the same order at a commit."""
    return tuple(row[k] for k in ("network", "image", "batch", "launch", "kernel", "arguments"))


def _described_row(launch: Launch, calls: int) -> dict:
    memories, constants = launch.memories, launch.constants
    images = (m for m in memories if len(m.shape) == 4)
    first = next(images, memories[0] if memories else None)
    shown = [f"{k}={constants[k]}" for k in SHOWN if constants.get(k, SHOWN[k]) != SHOWN[k]]
    given = {_short(k) for k, v in launch.arguments if isinstance(v, Memory)}
    shown += [name for name in OPTIONAL if name in given]
    return {
        "kernel": launch.name,
        "input": "x".join(map(str, first.shape)) if first else "",
        "constants": " ".join(shown),
        "calls": calls,
        "programs": launch.programs,
        "arguments": " ".join(f"{_short(k)}={_told(v)}" for k, v in launch.arguments),
    }


def _short(name: str) -> str:
    return name.removesuffix("_ptr")


def _told(value: Any) -> str:
    if isinstance(value, Memory):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind}[{'x'.join(map(str, value.shape))}]"
    return str(getattr(value, "value", value))


def _figures(launch: Launch, calls: int) -> dict:
    """Return the figures of a row, all calls of a step together."""
    try:
        work, ran = emulate(launch)
    except Exception as error:  # one launch's: the others are emulated all the same
        return _failed(f"{type(error).__name__}: {error}".replace("\n", " ")[:300])
    milliseconds = {name: 1e3 * calls * s for name, s in needs(launch, work).items()}
    most = max(ROOFS, key=milliseconds.__getitem__)
    return {
        "emulated": ran,
        "warp_instructions": calls * work.instructions,
        "shared_wavefronts": calls * work.wavefronts,
        "sectors": calls * work.sectors,
        "argument_gb": calls * launch.bytes / 1e9,
        "product_tflop": calls * sum(work.flop.values()) / 1e12,
        **{f"{name}_ms": milliseconds[name] for name in ROOFS},
        "needs_ms": milliseconds[most],
        "bound_by": most,
        "failed": "",
    }


FIGURES = ("emulated", "warp_instructions", "shared_wavefronts", "sectors", "argument_gb")
FIGURES += ("product_tflop", *(f"{name}_ms" for name in ROOFS), "needs_ms", "bound_by")


def _failed(why: str) -> dict:
    return {**dict.fromkeys(FIGURES), "failed": why}


def by_kernel(rows: Iterable[dict]) -> list[dict]:
    """Return a row a network and kernel, the costliest first: the sums of its launches.

    `needs_ms` adds up what each launch needs, whatever binds it; `bound_by` is what binds most.
    """
    added: dict[tuple[str, str], dict] = {}
    bound: dict[tuple[str, str], Counter] = {}
    milliseconds = (*(f"{name}_ms" for name in ROOFS), "needs_ms")
    for row in rows:
        key = row["network"], row["kernel"]
        line = added.setdefault(key, {
            **{k: row[k] for k in ("network", "image", "batch", "kernel")},
            **dict.fromkeys(("calls", "launches"), 0), **dict.fromkeys(milliseconds, 0.0),
            "share": 0.0, "bound_by": "", "failed": 0,
        })  # fmt: skip
        line["calls"] += row["calls"]
        line["launches"] += 1
        line["failed"] += bool(row["failed"])
        for name in milliseconds:
            line[name] += row[name] or 0.0
        bound.setdefault(key, Counter())[row["bound_by"] or ""] += row["needs_ms"] or 0.0
    whole: Counter[str] = Counter()
    for (network, _), line in added.items():
        whole[network] += line["needs_ms"]
    for key, line in added.items():
        line["share"] = line["needs_ms"] / (whole[key[0]] or 1.0)
        line["bound_by"] = bound[key].most_common(1)[0][0]
    networks = list(whole)
    return sorted(added.values(), key=lambda r: (networks.index(r["network"]), -r["needs_ms"]))


def _print(rows: Sequence[dict]) -> None:
    kernels = by_kernel(rows)
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        sums = [
            {k: v for k, v in row.items() if k not in ("network", "image", "batch")}
            for row in kernels
            if row["network"] == network
        ]
        total = sum(row["needs_ms"] for row in sums)
        of = f"{network}, {mine[0]['batch']} images of {mine[0]['image']}"
        print(f"\n{of}: {total:.1f} ms. By kernel:\n\n{table(sums)}")
        names = ("calls", "kernel", "input", "constants", "programs")
        names += (*(f"{name}_ms" for name in ROOFS), "bound_by")
        well = [{k: row[k] for k in names} for row in mine if not row["failed"]]
        print(f"\nThe {min(LINES, len(well))} launches that need most, of {len(mine)}:\n")
        print(table(well[:LINES]))
        for row in mine:
            if row["failed"]:
                print(f"FAILED {row['kernel']} {row['input']} {row['constants']}: {row['failed']}")


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
