"""Running compiled kernels without their device: PTX, carried out thread by thread on the CPU.

Triton's interpreter runs a kernel's Python. Here runs what its compiler made of it: layouts,
vectors, software pipelines, tensor-core instructions, asynchronous copies, integers that wrap.
Whatever a device would leave undefined is an error, with the place in the kernel's source:

- an address outside of every tensor that was passed, or not a multiple of the access's size;
- two warps that touch a byte of shared memory, one of them writing, with no barrier between;
- two programs that touch an element of a tensor, one of them writing;
- a barrier, or an instruction of a whole warp, that some of its threads do not reach;
- a product that reads shared memory (wgmma) whose writes no fence has made visible to it.

Shared memory begins as NaN, and so does the target of an asynchronous copy until it is waited for.
All threads of up to BATCH_THREADS run in step; those that part at a branch run from the earliest
block on until they meet. What ptxas makes of PTX, and clocks, are not modelled.
"""

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from unittest import mock

import numpy as np
import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from . import ptx
from .launches import posing_as

BATCH_THREADS = 4096  # more overflow the cache with registers
WARP = 32
GROUP = 128  # threads of a warp group, which multiply together on sm_90
NOBODY, SEVERAL = -1, -2


class EmulationError(RuntimeError):
    """A kernel did what a device leaves undefined, or answers with a fault."""


@dataclass
class Counts:
    """What a kernel's programs carried out, all launches together.

    `instructions` counts, by opcode and warp, those of PTX; ptxas makes about as many of them.
    `sectors` are the pieces of 32 bytes that accesses to global memory touch, `wavefronts` the
    turns that shared memory takes, by "load" and "store"; `requests` the instructions of warps.
    """

    programs: int = 0
    instructions: Counter = field(default_factory=Counter)
    requests: Counter = field(default_factory=Counter)
    sectors: Counter = field(default_factory=Counter)
    wavefronts: Counter = field(default_factory=Counter)


@dataclass
class Emulation:
    """What `emulated` ran: each kernel's counts by name."""

    target: str
    counts: dict[str, Counts] = field(default_factory=dict)


@contextmanager
def emulated(
    target: str,
    programs: Callable[[tuple[int, int, int]], Iterable[tuple[int, int, int]]] | None = None,
    count: bool = False,
) -> Iterator[Emulation]:
    """Run every kernel launched inside on CPU tensors, as compiled for a target.

    An autotuned kernel runs in its first configuration, or in that of `pinned`.

    Args:
        target: "sm_80" or "sm_90".
        programs: given a launch's grid, returns which of its programs to run; None: all of them.
        count: whether to count sectors and wavefronts, too, which takes as long again.

    Raises:
        ValueError: an unknown target.
        EmulationError: (inside) a kernel did what a device leaves undefined.
    """
    if target not in ("sm_80", "sm_90"):
        raise ValueError(f'target: want "sm_80" or "sm_90"; got {target!r}')
    made = Emulation(target)
    compile_kernel = JITFunction.run

    def launch(self, *args, grid, warmup, **kwargs):
        with posing_as(target):
            compiled = compile_kernel(self, *args, grid=grid, warmup=True, **kwargs)
            binder = self.device_caches[triton.runtime.driver.active.get_current_device()][-1]
            values = binder(*args, **{"debug": self.debug, **kwargs})[0]
        sizes = (tuple(grid(values) if callable(grid) else grid) + (1, 1))[:3]
        kinds = [str(kind) for kind in compiled.src.signature.values()]
        given = [v for v, kind in zip(values.values(), kinds, strict=True) if kind != "constexpr"]
        kernel = read(compiled.asm["ptx"])
        counts = made.counts.setdefault(kernel.name, Counts())
        every = np.ndindex(*sizes[::-1])  # the first index of a grid runs fastest
        chosen = programs(sizes) if programs else (index[::-1] for index in every)
        run(kernel, given, sizes, list(chosen), compiled.metadata.shared, counts, count)
        return compiled

    def first(self, *args, **kwargs):
        self.best_config = self.configs[0]
        return self.fn.run(*args, **kwargs, **self.best_config.all_kwargs())

    with mock.patch.object(JITFunction, "run", launch), mock.patch.object(Autotuner, "run", first):
        yield made


@cache
def read(text: str) -> ptx.Kernel:
    """Return a PTX text's kernel; translated once, however often it is launched."""
    return ptx.parse(text)


def run(
    kernel: ptx.Kernel,
    arguments: Sequence[object],
    grid: tuple[int, int, int],
    programs: Sequence[tuple[int, int, int]],
    shared_bytes: int,
    counts: Counts,
    count: bool = False,
) -> None:
    """Run some of a kernel's programs; their batches one after another.

    arguments are CPU tensors, numbers and None, in the order of the kernel's parameters (which may
    have more: scratch memory that these kernels do not use).
    """
    tensors = [a for a in arguments if hasattr(a, "data_ptr")]
    memory = _Memory(tensors)
    values = []
    for i, (_, kind) in enumerate(kernel.parameters):
        argument = arguments[i] if i < len(arguments) else None
        number = argument.data_ptr() if hasattr(argument, "data_ptr") else argument or 0
        values.append(np.array(number).astype(ptx.TYPES[kind]))
    most = max(1, BATCH_THREADS // kernel.threads)
    for start in range(0, len(programs), most):
        batch = _Batch(
            kernel,
            values,
            grid,
            programs[start : start + most],
            shared_bytes,
            memory,
            counts,
            count,
        )
        with np.errstate(all="ignore"):
            batch.run()


class _Memory:
    """Global memory: the elements of the tensors that a launch was given, and who touched them."""

    def __init__(self, tensors: Sequence):
        self.regions = []
        for tensor in tensors:
            if not tensor.numel():
                continue
            item = tensor.element_size()
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            self.regions.append(_Region(tensor.data_ptr(), (last + 1) * item, item))

    def region(self, low: int, high: int) -> "_Region | None":
        """Return the region that holds the bytes from low up to high."""
        for region in self.regions:
            if region.start <= low and high <= region.end:
                return region
        return None


class _Region:
    """One tensor's bytes, and for each element the programs that read and wrote it last."""

    TRACED = 1 << 26  # elements; of larger tensors, conflicts are not looked for

    def __init__(self, start: int, size: int, item: int):
        self.start, self.end, self.item = start, start + size, item
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
        self.reader = self.writer = None

    def trace(self) -> None:
        if self.reader is None and len(self.bytes) // self.item <= self.TRACED:
            self.reader = np.full(len(self.bytes) // self.item, NOBODY, np.int32)
            self.writer = self.reader.copy()


class _Batch:
    """Some programs' threads in step: their shared memory, registers, and what they do to both."""

    def __init__(
        self,
        kernel: ptx.Kernel,
        values: list,
        grid: tuple[int, int, int],
        programs: Sequence[tuple[int, int, int]],
        shared_bytes: int,
        memory: _Memory,
        counts: Counts,
        count: bool,
    ):
        self.kernel, self.values, self.memory = kernel, values, memory
        self.counts, self.counting = counts, count
        self.size = kernel.threads * len(programs)
        self.program = np.repeat(np.arange(len(programs)), kernel.threads)
        self.thread = np.tile(np.arange(kernel.threads, dtype=np.uint32), len(programs))
        self.warp = np.arange(self.size) // WARP
        index = np.array(programs, np.uint32).reshape(-1, 3)
        self.serial = (index.astype(np.int64) @ [1, grid[0], grid[0] * grid[1]]).astype(np.int32)
        self.places = {
            **{("ctaid", "xyz"[i]): index[self.program, i] for i in range(3)},
            **{("nctaid", "xyz"[i]): self.filled(np.uint32(grid[i]), None) for i in range(3)},
            ("tid", "x"): self.thread,
            **{("tid", axis): self.filled(np.uint32(0), None) for axis in "yz"},
            ("ntid", "x"): self.filled(np.uint32(kernel.threads), None),
            ("laneid", None): self.thread % np.uint32(WARP),
        }
        # Shared memory: a program's lies behind the other's. Cells of the narrowest access are
        # what conflicts are looked for in, by the number of the last barrier before each touch.
        self.shared_bytes = shared_bytes
        self.stride = -(-max(shared_bytes, 1) // 1024) * 1024
        self.shared = np.full(self.stride * len(programs), 0xFF, np.uint8)
        self.cell = 4 if kernel_width(kernel) >= 4 else kernel_width(kernel)
        cells = len(self.shared) // self.cell
        self.barriers = np.zeros(len(programs), np.int32)
        self.fences = np.zeros(len(programs), np.int32)
        self.wrote_at, self.read_at = np.full(cells, -1, np.int32), np.full(cells, -1, np.int32)
        self.writer, self.reader = np.full(cells, -1, np.int32), np.full(cells, -1, np.int32)
        self.unfenced = np.full(cells, -1, np.int32)
        self.arriving = np.zeros(cells, np.int32)  # copies that will write here
        self.multiplied = np.zeros(cells, np.int32)  # products that may still read here
        self.open_copies: list[tuple] = []
        self.groups_of_copies: list[list[tuple]] = []
        self.open_products: list[tuple] = []
        self.groups_of_products: list[list[tuple]] = []
        counts.programs += len(programs)

    def run(self) -> None:
        """Run all threads to the kernel's end."""
        registers = [
            np.full(self.size, True if width == "b1" else -1, np.dtype(width).str.replace("u", "i"))
            .view(width)
            for width in self.kernel.registers.values()
        ]  # fmt: skip
        waiting: dict[int, np.ndarray | None] = {0: None}
        while waiting:
            number = min(waiting)
            threads = waiting.pop(number)
            block = self.kernel.blocks[number]
            taken = self.kernel.function(number, threads is not None)(self, registers, threads)
            self.note_block(block, threads)
            if block.ends == "exits":
                continue
            here = np.arange(self.size) if threads is None else threads
            if block.ends == "jumps":
                self.send(waiting, block.target, here)
            elif block.ends == "falls":
                self.send(waiting, number + 1, here)
            else:
                self.send(waiting, block.target, here[taken])
                self.send(waiting, number + 1, here[~taken])

    def send(self, waiting: dict, number: int, threads: np.ndarray) -> None:
        if not len(threads):
            return
        if number in waiting:
            there = waiting[number]
            threads = np.sort(np.concatenate([there, threads]))
        waiting[number] = threads if len(threads) < self.size else None

    def note_block(self, block: ptx.Block, threads: np.ndarray | None) -> None:
        warps = self.size // WARP if threads is None else len(np.unique(threads // WARP))
        for made in block.instructions:
            self.counts.instructions[".".join(made.parts)] += warps

    def fail(self, site: int, what: str) -> None:
        made = next(
            b.instructions[site - b.start]
            for b in reversed(self.kernel.blocks)
            if b.start <= site and b.instructions
        )
        raise EmulationError(f"{self.kernel.name}, {made.place}: {what}\n  {made.text}")

    def who(self, thread: int) -> str:
        return f"thread {self.thread[thread]} of program {self.serial[self.program[thread]]}"

    # What every thread knows

    def filled(self, value: object, threads: np.ndarray | None) -> np.ndarray:
        return np.broadcast_to(value, self.size if threads is None else len(threads))

    def special(self, name: str, axis: str | None, threads: np.ndarray | None) -> np.ndarray:
        whole = self.places[name, axis]
        return whole if threads is None else whole[threads]

    def parameter(self, number: int, kind: type, threads: np.ndarray | None) -> np.ndarray:
        value = self.values[number]
        return self.filled(
            value.view(kind) if value.itemsize == kind(0).itemsize else value.astype(kind), threads
        )

    def everyone(self, threads: np.ndarray | None) -> np.ndarray:
        return np.arange(self.size) if threads is None else threads

    def whole(self, many: int, threads: np.ndarray | None, site: int) -> np.ndarray:
        """Return the threads, of which each `many` neighbours have to be here together."""
        here = self.everyone(threads)
        if threads is not None:
            rows = here.reshape(-1, many) if len(here) % many == 0 else here[None, :0]
            if not rows.size or (rows != rows[:, :1] // many * many + np.arange(many)).any():
                self.fail(site, f"only some of {many} threads that act together are here")
        return here

    def barrier(self, threads: np.ndarray | None, site: int) -> None:
        self.whole(self.kernel.threads, threads, site)
        self.barriers[np.unique(self.program[self.everyone(threads)])] += 1

    # Global memory

    def located(
        self, address: np.ndarray, size: int, here: np.ndarray, site: int
    ) -> Iterator[tuple[_Region, np.ndarray]]:
        """Yield regions, and which of the addresses lie there; each has size bytes there."""
        if (address % size).any():
            i = int(np.argmax(address % size != 0))
            self.fail(site, f"{self.who(here[i])}: {address[i]:#x} is no multiple of {size}")
        left = np.arange(len(address))
        while len(left):
            low, high = int(address[left].min()), int(address[left].max()) + size
            if region := self.memory.region(low, high):
                yield region, left
                return
            region = self.memory.region(low, low + size)
            if region is None:
                i = left[int(address[left].argmin())]
                near = ", ".join(f"{r.start:#x} to {r.end:#x}" for r in self.memory.regions)
                self.fail(
                    site, f"{self.who(here[i])}: {size} bytes at {low:#x}; tensors are at {near}"
                )
            inside = address[left] + size <= region.end
            yield region, left[inside]
            left = left[~inside]

    def touch(
        self, region: _Region, address: np.ndarray, size: int, here, writes: bool, site: int
    ) -> None:
        region.trace()
        if region.reader is None:
            return
        first = (address - region.start) // region.item
        cells = (first[:, None] + np.arange(max(1, size // region.item))).ravel()
        program = np.repeat(self.serial[self.program[here]], max(1, size // region.item))
        writer = region.writer[cells]
        wrong = (writer != NOBODY) & (writer != program)
        if writes:
            reader = region.reader[cells]
            wrong |= (reader != NOBODY) & (reader != program)
        if wrong.any():
            i = int(np.argmax(wrong))
            does, reader = "writes" if writes else "reads", region.reader[cells[i]]
            self.fail(
                site,
                f"program {program[i]} {does} element {cells[i]} of a tensor at "
                f"{region.start:#x}, written by {writer[i]}, read by {reader} ({SEVERAL}: several)",
            )
        if writes:
            region.writer[cells] = program
            if (region.writer[cells] != program).any():
                self.fail(site, "two programs write one element")
        else:
            known = region.reader[cells]
            region.reader[cells] = program
            mixed = (known != NOBODY) & (known != program) | (region.reader[cells] != program)
            region.reader[cells[mixed]] = SEVERAL

    def count_sectors(self, address: np.ndarray, size: int, here: np.ndarray, what: str) -> None:
        if not self.counting or not len(here):
            return
        warp = self.warp[here].astype(np.int64)
        self.counts.requests[f"global {what}"] += len(np.unique(warp))
        sectors = np.unique((warp << 44) | (address // 32 & ((1 << 44) - 1)))
        self.counts.sectors[what] += len(sectors)

    def load_global(self, address, kind, many, guard, threads, site):
        here = self.everyone(threads)
        item = np.dtype(kind).itemsize
        made = np.full((len(here), many), np.iinfo(kind).max, kind)
        live = np.arange(len(here)) if guard is None else np.flatnonzero(guard)
        address, size = address[live], item * many
        for region, which in self.located(address, size, here[live], site):
            at = address[which]
            self.touch(region, at, size, here[live][which], False, site)
            offset = (at - region.start)[:, None] + item * np.arange(many)
            made[live[which]] = gather(region.bytes, offset, kind)
        self.count_sectors(address, size, here[live], "load")
        return [np.ascontiguousarray(made[:, i]) for i in range(many)]

    def store_global(self, address, values, kind, guard, threads, site):
        here = self.everyone(threads)
        item, many = np.dtype(kind).itemsize, len(values)
        live = np.arange(len(here)) if guard is None else np.flatnonzero(guard)
        address, size = address[live], item * many
        table = np.stack(values, 1)[live]
        for region, which in self.located(address, size, here[live], site):
            at = address[which]
            self.touch(region, at, size, here[live][which], True, site)
            offset = (at - region.start)[:, None] + item * np.arange(many)
            scatter(region.bytes, offset, table[which])
            if (gather(region.bytes, offset, kind) != table[which]).any():
                self.fail(site, "two threads write different values into one element")
        self.count_sectors(address, size, here[live], "store")

    # Shared memory

    def at(self, address: np.ndarray, size: int, here: np.ndarray, site: int) -> np.ndarray:
        """Return places in self.shared of size bytes at each thread's address."""
        wrong = (address < 0) | (address + size > self.shared_bytes) | (address % size != 0)
        if wrong.any():
            i = int(np.argmax(wrong))
            what = f"{size} bytes at {address[i]} of {self.shared_bytes} shared bytes"
            self.fail(site, f"{self.who(here[i])}: {what}")
        return address + self.program[here] * self.stride

    def cells(self, at: np.ndarray, size: int) -> np.ndarray:
        return (at[:, None] // self.cell + np.arange(max(1, size // self.cell))).ravel()

    def note_shared(
        self,
        at: np.ndarray,
        size: int,
        here: np.ndarray,
        writes: bool,
        site: int,
        copied: bool = False,
    ) -> None:
        """Look for another warp's touch of these bytes since the last barrier; remember this one.

        Of what was `copied`, products need no fence: PTX asks for one, but triton 3.6 and others
        that ship wait and synchronise alone.
        """
        many = max(1, size // self.cell)
        cells = self.cells(at, size)
        warp = np.repeat(self.warp[here], many)
        now = np.repeat(self.barriers[self.program[here]], many)
        for held, why in ((self.arriving, "a copy writes"), (self.multiplied, "a product reads")):
            if (writes or held is self.arriving) and held[cells].any():
                i = int(np.argmax(held[cells] != 0))
                self.fail(
                    site,
                    f"warp {warp[i]} {'writes' if writes else 'reads'} shared byte "
                    f"{cells[i] * self.cell % self.stride}, which {why} until it is waited for",
                )
        wrong = (self.wrote_at[cells] == now) & (self.writer[cells] != warp)
        if writes:
            wrong |= (self.read_at[cells] == now) & (self.reader[cells] != warp)
        if wrong.any():
            i = int(np.argmax(wrong))
            cell, does = cells[i], "writes" if writes else "reads"
            self.fail(
                site,
                f"warp {warp[i]} {does} shared byte {cell * self.cell % self.stride}, which warp "
                f"{self.writer[cell]} wrote or {self.reader[cell]} read since the last barrier",
            )
        if writes:
            self.wrote_at[cells], self.writer[cells] = now, warp
            fences = np.repeat(self.fences[self.program[here]], many)
            self.unfenced[cells] = np.where(copied, -1, fences)
            self.writer[cells[self.writer[cells] != warp]] = SEVERAL  # the same value, or it failed
        else:
            before = np.where(self.read_at[cells] == now, self.reader[cells], warp)
            self.read_at[cells], self.reader[cells] = now, warp
            mixed = (before != warp) | (self.reader[cells] != warp)
            self.reader[cells[mixed]] = SEVERAL

    def count_wavefronts(self, at: np.ndarray, size: int, here: np.ndarray, what: str) -> None:
        """Count turns: a turn serves one word of each of 32 banks, to whoever wants it."""
        if not self.counting or not len(here):
            return
        words = at[:, None] // 4 + np.arange(max(1, size // 4))
        # 8 bytes a thread are served half a warp at a time, 16 a quarter
        part = (here % WARP) // max(1, WARP * 4 // max(size, 4))
        turn = (self.warp[here] * 4 + part).astype(np.int64)
        pairs = np.unique((turn[:, None] << 32) | words)
        banks = np.unique(pairs >> 32 << 5 | (pairs & 31), return_counts=True)
        longest: dict = {}
        turns = banks[0] >> 5
        order = np.argsort(turns, kind="stable")
        edges = np.flatnonzero(np.diff(turns[order], prepend=-1))
        longest = np.maximum.reduceat(banks[1][order], edges)
        self.counts.requests[f"shared {what}"] += len(np.unique(self.warp[here]))
        self.counts.wavefronts[what] += int(longest.sum())

    def load_shared(self, address, kind, many, guard, threads, site):
        here = self.everyone(threads)
        item = np.dtype(kind).itemsize
        live = np.arange(len(here)) if guard is None else np.flatnonzero(guard)
        at = self.at(address[live], item * many, here[live], site)
        self.note_shared(at, item * many, here[live], False, site)
        self.count_wavefronts(at, item * many, here[live], "load")
        made = np.full((len(here), many), np.iinfo(kind).max, kind)
        made[live] = gather(self.shared, at[:, None] + item * np.arange(many), kind)
        return [np.ascontiguousarray(made[:, i]) for i in range(many)]

    def store_shared(self, address, values, kind, guard, threads, site):
        here = self.everyone(threads)
        item, many = np.dtype(kind).itemsize, len(values)
        live = np.arange(len(here)) if guard is None else np.flatnonzero(guard)
        at = self.at(address[live], item * many, here[live], site)
        self.note_shared(at, item * many, here[live], True, site)
        self.count_wavefronts(at, item * many, here[live], "store")
        offset, table = at[:, None] + item * np.arange(many), np.stack(values, 1)[live]
        scatter(self.shared, offset, table)
        if (gather(self.shared, offset, kind) != table).any():
            self.fail(site, "two threads write different values into one shared byte")

    # Asynchronous copies, from global into shared memory

    def copy(self, to, of, size, read, guard, threads, site):
        """Begin a copy of size bytes, of which `read` are read and the others zero."""
        here = self.everyone(threads)
        live = np.arange(len(here)) if guard is None else np.flatnonzero(guard)
        read = np.broadcast_to(read, len(here))[live]
        if ((read != 0) & (read != size)).any():
            self.fail(site, f"want copies of {size} bytes, or of none")
        at = self.at(to[live], size, here[live], site)
        data = np.zeros((len(live), size), np.uint8)
        some = np.flatnonzero(read)
        for region, which in self.located(of[live][some], size, here[live][some], site):
            address = of[live][some][which]
            self.touch(region, address, size, here[live][some][which], False, site)
            data[some[which]] = gather(
                region.bytes, (address - region.start)[:, None] + np.arange(size), np.uint8
            )
        self.count_sectors(of[live][some], size, here[live][some], "load")
        self.note_shared(at, size, here[live], True, site, copied=True)
        self.shared[at[:, None] + np.arange(size)] = 0xFF  # until somebody waits for it
        np.add.at(self.arriving, self.cells(at, size), 1)
        self.open_copies.append((at, data, here[live], size, site))

    # All threads of a batch commit and wait as one: a group is of the threads that committed it.

    def commit_copies(self, threads):
        here = self.everyone(threads)
        mine = [c for c in self.open_copies if np.isin(c[2], here).all()]
        self.open_copies = [c for c in self.open_copies if not np.isin(c[2], here).all()]
        self.groups_of_copies.append((here, mine))

    def wait_copies(self, left, threads):
        self.groups_of_copies = self._waited(
            self.groups_of_copies, left, self.everyone(threads), self.land
        )

    def land(self, copy, which) -> None:
        at, data, here, size, site = copy
        np.add.at(self.arriving, self.cells(at[which], size), -1)
        self.note_shared(at[which], size, here[which], True, site, copied=True)
        self.count_wavefronts(at[which], size, here[which], "store")
        self.shared[at[which][:, None] + np.arange(size)] = data[which]

    def _waited(self, groups: list, left: int, here: np.ndarray, finish: Callable) -> list:
        """Finish, for the threads here, all but the `left` last groups they committed."""
        pending = np.zeros(self.size, np.int64)
        kept = []
        for members, items in reversed(groups):
            pending[members] += 1
            due = np.zeros(self.size, bool)
            due[here] = pending[here] > left
            rest = []
            for item in items:
                which = due[item[2]]
                if which.any():
                    finish(item, which)
                if not which.all():
                    rest.append(
                        tuple(
                            part[~which] if isinstance(part, np.ndarray) else part for part in item
                        )
                    )
            members = members[~due[members]]
            if len(members):
                kept.append((members, rest))
        return kept[::-1]

    def fence(self, threads):
        self.fences[np.unique(self.program[self.everyone(threads)])] += 1

    # A warp's threads together

    def shuffle(self, mode, a, by, clamp, threads, site):
        here = self.whole(WARP, threads, site)
        a = np.broadcast_to(a, len(here)).reshape(-1, WARP)
        by, clamp = (
            np.broadcast_to(v, len(here)).reshape(-1, WARP).astype(np.int64) for v in (by, clamp)
        )
        lane = np.arange(WARP)
        segment, by, clamp = (clamp >> 8) & 31, by & 31, clamp & 31
        most = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            of = lane - by
            valid = of >= most
        elif mode == "down":
            of = lane + by
            valid = of <= most
        else:
            of = lane ^ by if mode == "bfly" else (lane & segment) | (by & ~segment)
            valid = of <= most
        of = np.where(valid, of, lane)
        return np.take_along_axis(a, of, 1).ravel(), valid.ravel()

    def rows_of_matrices(self, address, many, here, site):
        """Return places of the 8 rows, of 16 bytes, of each warp's matrices: [warps, many, 8]."""
        rows = address.reshape(-1, WARP)[:, : 8 * many]
        owners = here.reshape(-1, WARP)[:, : 8 * many].ravel()
        return self.at(rows.ravel(), 16, owners, site), owners

    def load_matrix(self, address, many, transposed, threads, site):
        here = self.whole(WARP, threads, site)
        at, owners = self.rows_of_matrices(address, many, here, site)
        self.note_shared(at, 16, owners, False, site)
        self.count_wavefronts(at, 16, owners, "load")
        values = gather(self.shared, at[:, None] + 2 * np.arange(8), np.uint16).reshape(
            -1, many, 8, 8
        )
        if transposed:
            values = values.swapaxes(2, 3)
        pairs = np.ascontiguousarray(values).view(np.uint32).reshape(-1, many, WARP)
        return [np.ascontiguousarray(pairs[:, i]).ravel() for i in range(many)]

    def store_matrix(self, address, values, transposed, threads, site):
        here = self.whole(WARP, threads, site)
        many = len(values)
        at, owners = self.rows_of_matrices(address, many, here, site)
        self.note_shared(at, 16, owners, True, site)
        self.count_wavefronts(at, 16, owners, "store")
        pairs = np.stack([v.reshape(-1, WARP) for v in values], 1)
        halves = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, many, 8, 8)
        if transposed:
            halves = halves.swapaxes(2, 3)
        scatter(self.shared, at[:, None] + 2 * np.arange(8), halves.reshape(-1, 8))

    def mma(self, shape, kind, a, b, c, threads, site):
        """Return a @ b + c of each warp; fragments as the PTX manual draws them (9.7.14)."""
        self.whole(WARP, threads, site)
        if shape == "m16n8k16" and kind in ("bf16", "f16"):
            left = self.fragment_a(a, kind)
            right = np.concatenate([halves(r, kind).reshape(-1, 8, 8) for r in b], 2)  # [w, n, k]
        elif shape == "m16n8k8" and kind == "tf32":
            left = self.fragment_a(a, kind)
            right = np.concatenate([truncated(r).reshape(-1, 8, 4) for r in b], 2)
        else:
            self.fail(site, "a product of a shape that is not known here")
        sums = np.matmul(left, right.swapaxes(1, 2))  # [w, 16, 8]
        made = [
            sums[:, 8 * i : 8 * i + 8].reshape(-1, 8, 4, 2)[..., j].reshape(-1)
            for i in (0, 1)
            for j in (0, 1)
        ]
        return [(m + v.view(np.float32)).astype(np.float32) for m, v in zip(made, c, strict=True)]

    def fragment_a(self, a: list, kind: str) -> np.ndarray:
        """Return [warps, 16, k] of the four registers a thread that hold a warp's rows."""
        one = truncated if kind == "tf32" else lambda r: halves(r, kind)
        part = [one(r).reshape(len(r) // WARP, 8, -1) for r in a]
        upper, lower = np.concatenate([part[0], part[2]], 2), np.concatenate([part[1], part[3]], 2)
        return np.concatenate([upper, lower], 1)

    # A warp group's threads together

    def wgmma(self, shape, kind, a, b, sums, keep, order, threads, site):
        """Return a @ b (+ sums) of each warp group: a in registers or shared memory, b there."""
        here = self.whole(GROUP, threads, site)
        n, k = (int(v) for v in shape[1:].replace("k", "n").split("n")[1:])
        leaders = here[::GROUP]
        if isinstance(a, list):
            left = self.fragment_a(a, kind).reshape(len(leaders), 64, k)
        else:
            left = self.operand(a[::GROUP], 64, k, kind, order[0], leaders, site)
        right = self.operand(b[::GROUP], n, k, kind, order[1], leaders, site)
        made = np.matmul(left, right.swapaxes(1, 2))  # [groups, 64, n]
        made = made.reshape(-1, 4, 2, 8, n // 8, 4, 2)  # group, warp, half, row, block, lane, pair
        made = made.transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
        kept = np.broadcast_to(keep, len(here))
        return [
            np.where(kept, m + s, m).astype(np.float32) for m, s in zip(made, sums, strict=True)
        ]

    def operand(self, descriptor, rows, k, kind, transposed, leaders, site):
        """Return [groups, rows, k] of shared memory, laid out as a descriptor says.

        In units of 16 bytes: K-major has rows of 8 after each other, pieces along k beside each
        other; M-major (transposed) the other way round. A swizzle exchanges those units inside 8
        rows (PTX manual 9.7.15.5).
        """
        item = 4 if kind == "tf32" else 2
        unit = 16 // item
        d = descriptor.astype(np.int64)
        start, lead, stride = (d & 0x3FFF) << 4, (d >> 16 & 0x3FFF) << 4, (d >> 32 & 0x3FFF) << 4
        modes = np.unique(d >> 62 & 3)
        if len(modes) != 1 or (d >> 49 & 7).any():
            self.fail(site, "a descriptor that is not known here")
        bits = {0: 0, 1: 3, 2: 2, 3: 1}[int(modes[0])]
        wide = 1 << bits  # units of a swizzled row
        r, c = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
        lead, stride, start = (v[:, None, None] for v in (lead, stride, start))
        if not transposed:
            piece = c // unit
            along = piece * lead if bits == 0 else 16 * piece
            offset = (r % 8) * 16 * wide + (r // 8) * stride + along + (c % unit) * item
        elif item == 4:
            self.fail(site, "a transposed operand of 4 bytes")
        elif bits == 0:
            offset = (r // unit) * stride + (c % 8) * 16 + (c // 8) * lead + (r % unit) * item
        else:
            piece = r // unit
            inside = (piece % wide) * 16 + (c % 8) * 16 * wide + (r % unit) * item
            offset = inside + (piece // wide) * lead + (c // 8) * stride
        address = start + offset
        address ^= (address >> 7 & (wide - 1)) << 4
        owners = np.repeat(leaders, rows * k)
        at = self.at(address.reshape(-1), item, owners, site)
        cells = at // self.cell
        if (self.unfenced[cells] >= self.fences[self.program[owners]]).any():
            self.fail(site, "a product reads shared memory that no fence has made visible to it")
        self.note_shared(at, item, owners, False, site)
        np.add.at(self.multiplied, cells, 1)
        self.open_products.append((at, item, owners, site))
        values = gather(self.shared, at[:, None], np.uint32 if item == 4 else np.uint16)
        made = truncated(values) if item == 4 else ptx.widened(values, kind)
        return made.reshape(-1, rows, k)

    def commit_products(self, threads):
        here = self.everyone(threads)
        mine = [p for p in self.open_products if np.isin(p[2], here).all()]
        self.open_products = [p for p in self.open_products if not np.isin(p[2], here).all()]
        self.groups_of_products.append((here, mine))

    def wait_products(self, left, threads, site):
        """Operands in shared memory are read until here."""
        here = self.whole(GROUP, threads, site)
        self.groups_of_products = self._waited(self.groups_of_products, left, here, self.finish)

    def finish(self, product, which) -> None:
        at, item, owners, site = product
        np.add.at(self.multiplied, at[which] // self.cell, -1)
        self.note_shared(at[which], item, owners[which], False, site)


def kernel_width(kernel: ptx.Kernel) -> int:
    """Return the bytes of the narrowest access that a kernel makes to shared memory."""
    widths = [4]
    for block in kernel.blocks:
        for made in block.instructions:
            if made.parts[0] in ("ld", "st") and made.has("shared", "shared:cta"):
                widths.append(int(ptx.TYPES[made.parts[-1]][1]))
            elif made.parts[0] == "wgmma" and made.has("mma_async"):
                widths.append(4 if made.has("tf32") else 2)
    return min(widths)


def gather(memory: np.ndarray, offset: np.ndarray, kind: type) -> np.ndarray:
    """Return elements of a type at aligned byte offsets."""
    size = np.dtype(kind).itemsize
    usable = len(memory) // size * size
    return memory[:usable].view(kind)[offset // size]


def scatter(memory: np.ndarray, offset: np.ndarray, values: np.ndarray) -> None:
    """Write elements at aligned byte offsets."""
    size = values.itemsize
    usable = len(memory) // size * size
    memory[:usable].view(values.dtype)[offset // size] = values


def halves(register: np.ndarray, kind: str) -> np.ndarray:
    """Return the two 16-bit floats of each register, [threads, 2] in float32."""
    return ptx.widened(np.ascontiguousarray(register).view(np.uint16), kind).reshape(-1, 2)


def truncated(register: np.ndarray) -> np.ndarray:
    """Return float32 as the tensor cores read tf32: its 13 last bits are not looked at."""
    return (np.ascontiguousarray(register).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
