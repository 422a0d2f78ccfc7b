"""Running compiled kernels without their device: PTX, carried out thread by thread on the CPU.

Triton's interpreter runs a kernel's Python. Here runs what its compiler made of it: layouts,
vectors, software pipelines, tensor-core instructions, asynchronous copies, integers that wrap.
Whatever a device would leave undefined is an error, with the place in the kernel's source:

- an address outside of every tensor that was passed, or not a multiple of the access's size;
- two warps that touch a byte of shared memory, one of them writing, with no barrier between;
- two programs that touch an element of a tensor, one of them writing;
- two threads that write different values to one place, by the same instruction;
- shared memory that is read or written while a copy into it (cp.async) is not waited for, or
  written while a product (wgmma) reads it;
- a barrier, or an instruction of a whole warp, that some of its threads do not reach together;
- a product that reads shared memory (wgmma) whose writes no fence has made visible to it.

Shared memory begins as NaN, and so does the target of an asynchronous copy until it is waited for.
All threads of up to BATCH_THREADS run in step; those that part at a branch meet again in the first
block that all of them come to. ARCHITECTURE.md says what is not modelled.
"""

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
NOBODY, SEVERAL = -1, -2  # programs that touched an element of global memory
# Who touched a cell of shared memory, and when: the number of the program's last barrier before
# that, times WARPS, plus the warp, or one of two numbers that no warp has.
WARPS = 256
ADDING, MANY = WARPS - 2, WARPS - 1  # any number of warps: by atomic additions alone, otherwise
Threads = np.ndarray | None  # indices of those that are here; None: all of the batch


class EmulationError(RuntimeError):
    """A kernel did what a device leaves undefined, or answers with a fault."""


@dataclass
class Counts:
    """What a kernel's programs carried out, all launches together.

    `instructions` counts, by opcode and warp, those of PTX; ptxas makes about three quarters.
    `sectors` are the pieces of 32 bytes that accesses to global memory touch, `wavefronts` the
    turns that shared memory takes, by "load", "store" and "product" (operands of wgmma, each read
    once by each warp group); `requests` the instructions of warps.
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
        with posing_as(target, "emulating"):  # else a recording would find it compiled
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


class _Region:
    """A tensor's bytes, or those of several that overlap, and which programs touched each element.

    Elements between those of a strided tensor count as its own.
    """

    TRACED = 1 << 26  # elements; of larger tensors, conflicts are not looked for

    def __init__(self, start: int, end: int, item: int):
        self.start, self.end, self.item = start, end, item
        self.origin = start // 16 * 16  # whatever is aligned is so from here, too
        size = end - self.origin
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.origin))
        self.reader = self.writer = None

    def trace(self) -> bool:
        """Return whether touches are traced."""
        elements = -(-len(self.bytes) // self.item)
        if self.reader is None and elements <= self.TRACED:
            self.reader = np.full(elements, NOBODY, np.int32)
            self.writer = self.reader.copy()
        return self.reader is not None


class _Memory:
    """Global memory: the regions of the tensors that a launch was given."""

    def __init__(self, tensors: Sequence):
        self.regions: list[_Region] = []
        spans = []
        for tensor in tensors:
            if tensor.numel():
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                start, item = tensor.data_ptr(), tensor.element_size()
                spans.append((start, start + (last + 1) * item, item))
        merged: list[tuple[int, int, int]] = []
        for start, end, item in sorted(spans):
            if merged and start < merged[-1][1]:  # they overlap: one memory
                other, until, width = merged.pop()
                start, end, item = other, max(until, end), min(width, item)
            merged.append((start, end, item))
        self.regions = [_Region(*span) for span in merged]

    def region(self, low: int, high: int) -> _Region | None:
        """Return the region that holds the bytes from low up to high."""
        for region in self.regions:
            if region.start <= low and high <= region.end:
                return region
        return None


@dataclass
class _Transfer:
    """What an asynchronous instruction does to shared memory: `size` bytes at each place `at`."""

    at: np.ndarray
    size: int
    threads: np.ndarray  # whose doing each of them is
    site: int
    data: np.ndarray | None = None  # what arrives there, of a copy

    def part(self, which: np.ndarray) -> "_Transfer":
        data = None if self.data is None else self.data[which]
        return replace(self, at=self.at[which], threads=self.threads[which], data=data)


class _Queue:
    """Transfers as each thread has begun them, committed them in groups, and waited for them."""

    def __init__(self, size: int, finish: Callable[[_Transfer], None]):
        self.size, self.finish = size, finish
        self.begun: list[_Transfer] = []
        self.groups: list[tuple[np.ndarray, list[_Transfer]]] = []  # who committed it, and what

    def __bool__(self) -> bool:
        return bool(self.begun or self.groups)

    def commit(self, threads: Threads) -> None:
        """Make a group of what these threads have begun."""
        members = self._members(threads)
        group, self.begun = self._parted(self.begun, members)
        self.groups.append((members, group))

    def wait(self, left: int, threads: Threads) -> None:
        """Finish, for these threads, all but the `left` last groups that each committed."""
        here, pending = self._members(threads), np.zeros(self.size, np.int64)
        kept = []
        for members, group in reversed(self.groups):
            pending += members
            due = here & (pending > left)
            done, rest = self._parted(group, due)
            for transfer in done:
                self.finish(transfer)
            if (members & ~due).any():
                kept.append((members & ~due, rest))
        self.groups = kept[::-1]

    def _members(self, threads: Threads) -> np.ndarray:
        members = np.full(self.size, threads is None)
        if threads is not None:
            members[threads] = True
        return members

    @staticmethod
    def _parted(transfers: list[_Transfer], members: np.ndarray) -> tuple[list, list]:
        """Return the transfers, or parts of them, of the members, and those of others."""
        mine, others = [], []
        for transfer in transfers:
            which = members[transfer.threads]
            if which.all():
                mine.append(transfer)
            elif not which.any():
                others.append(transfer)
            else:
                mine.append(transfer.part(which))
                others.append(transfer.part(~which))
        return mine, others


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
        self.everybody = np.arange(self.size)
        # Shared memory: a program's lies behind the other's. Conflicts are looked for in cells of
        # the narrowest access.
        self.shared_bytes = shared_bytes
        self.stride = -(-max(shared_bytes, 1) // 1024) * 1024
        self.shared = np.full(self.stride * len(programs), 0xFF, np.uint8)
        self.cell = kernel.narrowest
        cells = len(self.shared) // self.cell
        self.barriers = np.zeros(len(programs), np.int64)
        self.fences = np.zeros(len(programs), np.int64)
        self.wrote, self.read = np.full(cells, -1), np.full(cells, -1)  # by warp and barrier
        self.unfenced = np.full(cells, -1)  # fences before the last write
        self.arriving = np.zeros(cells, bool)  # a copy will write here
        self.multiplied = np.zeros(len(self.shared) // 16, np.int32)  # products that read here
        self.copies = _Queue(self.size, self.land)
        self.products = _Queue(self.size, self.release)
        self.executed: Counter[int] = Counter()  # warps, by block
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
            number = self.kernel.first(waiting)
            threads = waiting.pop(number)
            block = self.kernel.blocks[number]
            taken = self.kernel.function(number, threads is not None)(self, registers, threads)
            here = self.everyone(threads)
            self.executed[number] += 1 + np.count_nonzero(np.diff(self.warp[here]))
            if block.ends == "exits":
                continue
            if block.ends == "jumps":
                self.send(waiting, block.target, here)
            elif block.ends == "falls":
                self.send(waiting, number + 1, here)
            else:
                self.send(waiting, block.target, here[taken])
                self.send(waiting, number + 1, here[~taken])
        for number, warps in self.executed.items():
            for opcode, many in self.kernel.blocks[number].opcodes.items():
                self.counts.instructions[opcode] += many * warps

    def send(self, waiting: dict[int, Threads], number: int, threads: np.ndarray) -> None:
        """Let threads go on at a block, with those that wait there."""
        if not len(threads):
            return
        if number in waiting:
            there = waiting[number]
            threads = np.sort(np.concatenate([there, threads]))
        waiting[number] = threads if len(threads) < self.size else None

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

    def filled(self, value: object, threads: Threads) -> np.ndarray:
        return np.broadcast_to(value, self.size if threads is None else len(threads))

    def special(self, name: str, axis: str | None, threads: Threads) -> np.ndarray:
        whole = self.places[name, axis]
        return whole if threads is None else whole[threads]

    def parameter(self, number: int, kind: type, threads: Threads) -> np.ndarray:
        value = self.values[number]
        return self.filled(
            value.view(kind) if value.itemsize == kind(0).itemsize else value.astype(kind), threads
        )

    def everyone(self, threads: Threads) -> np.ndarray:
        return self.everybody if threads is None else threads

    def live(self, guard: np.ndarray | None, threads: Threads) -> np.ndarray:
        """Return which of the threads that are here a guard lets act."""
        many = self.size if threads is None else len(threads)
        return self.everybody[:many] if guard is None else np.flatnonzero(guard)

    def whole(self, many: int, threads: Threads, site: int) -> np.ndarray:
        """Return the threads, of which each `many` neighbours have to be here together."""
        here = self.everyone(threads)
        if threads is not None:
            rows = here.reshape(-1, many) if len(here) % many == 0 else here[None, :0]
            if not rows.size or (rows != rows[:, :1] // many * many + np.arange(many)).any():
                self.fail(site, f"only some of {many} threads that act together are here")
        return here

    def barrier(self, threads: Threads, site: int) -> None:
        here = self.whole(self.kernel.threads, threads, site)
        self.barriers[self.program[here[:: self.kernel.threads]]] += 1

    def fence(self, threads: Threads, site: int) -> None:
        here = self.whole(self.kernel.threads, threads, site)
        self.fences[self.program[here[:: self.kernel.threads]]] += 1

    # Global memory

    def located(
        self, address: np.ndarray, size: int, here: np.ndarray, site: int
    ) -> Iterator[tuple[_Region, np.ndarray, np.ndarray]]:
        """Yield regions, which of the addresses lie there, and where in the region's bytes.

        Each address has size bytes there.
        """
        if (address % size).any():
            i = int(np.argmax(address % size != 0))
            self.fail(site, f"{self.who(here[i])}: {address[i]:#x} is no multiple of {size}")
        left = np.arange(len(address))
        while len(left):
            low, high = int(address[left].min()), int(address[left].max()) + size
            if region := self.memory.region(low, high):
                yield region, left, address[left] - region.origin
                return
            region = self.memory.region(low, low + size)
            if region is None:
                i = left[int(address[left].argmin())]
                near = ", ".join(f"{r.start:#x} to {r.end:#x}" for r in self.memory.regions)
                self.fail(
                    site, f"{self.who(here[i])}: {size} bytes at {low:#x}; tensors are at {near}"
                )
            inside = left[address[left] + size <= region.end]
            yield region, inside, address[inside] - region.origin
            left = left[address[left] + size > region.end]

    def touch(
        self, region: _Region, at: np.ndarray, size: int, here: np.ndarray, writes: bool, site: int
    ) -> None:
        """Look for another program's touch of these elements; remember this one."""
        if not region.trace():
            return
        many = max(1, size // region.item)
        elements = (at[:, None] // region.item + np.arange(many)).ravel()
        program = np.repeat(self.serial[self.program[here]], many)
        writer, reader = region.writer[elements], region.reader[elements]
        wrong = (writer != NOBODY) & (writer != program)
        if writes:
            wrong |= (reader != NOBODY) & (reader != program)
        if wrong.any():
            i = int(np.argmax(wrong))
            names = {NOBODY: "none", SEVERAL: "several"}
            w, r = (names.get(int(v[i]), v[i]) for v in (writer, reader))
            start = region.origin + int(elements[i]) * region.item
            does = "writes" if writes else "reads"
            self.fail(
                site,
                f"program {program[i]} {does} element {(start - region.start) // region.item} of a "
                f"tensor at {region.start:#x}, which was written by program {w}, read by {r}",
            )
        if writes:
            region.writer[elements] = program
            if (region.writer[elements] != program).any():
                self.fail(site, "two programs write one element")
        else:
            region.reader[elements] = program
            mixed = (reader != NOBODY) & (reader != program) | (region.reader[elements] != program)
            region.reader[elements[mixed]] = SEVERAL

    def count_sectors(self, address: np.ndarray, size: int, here: np.ndarray, what: str) -> None:
        if not self.counting or not len(here):
            return
        warp = self.warp[here].astype(np.int64)
        self.counts.requests[f"global {what}"] += len(np.unique(warp))
        sectors = np.unique((warp << 44) | (address // 32 & ((1 << 44) - 1)))
        self.counts.sectors[what] += len(sectors)

    def load_global(
        self,
        address: np.ndarray,
        kind: type,
        many: int,
        guard: np.ndarray | None,
        threads: Threads,
        site: int,
    ) -> list[np.ndarray]:
        """Return `many` elements that follow each other at each thread's address."""
        here, live = self.everyone(threads), self.live(guard, threads)
        item = np.dtype(kind).itemsize
        made = np.full((len(here), many), np.iinfo(kind).max, kind)
        for region, which, at in self.located(address[live], item * many, here[live], site):
            self.touch(region, at, item * many, here[live][which], False, site)
            made[live[which]] = gather(region.bytes, at[:, None] + item * np.arange(many), kind)
        self.count_sectors(address[live], item * many, here[live], "load")
        return [np.ascontiguousarray(made[:, i]) for i in range(many)]

    def store_global(
        self,
        address: np.ndarray,
        values: list[np.ndarray],
        kind: type,
        guard: np.ndarray | None,
        threads: Threads,
        site: int,
    ) -> None:
        """Write elements after each other at each thread's address."""
        here, live = self.everyone(threads), self.live(guard, threads)
        item, many = np.dtype(kind).itemsize, len(values)
        table = np.stack(values, 1)[live]
        for region, which, at in self.located(address[live], item * many, here[live], site):
            self.touch(region, at, item * many, here[live][which], True, site)
            offset = at[:, None] + item * np.arange(many)
            scatter(region.bytes, offset, table[which])
            if (gather(region.bytes, offset, kind) != table[which]).any():
                self.fail(site, "two threads write different values into one element")
        self.count_sectors(address[live], item * many, here[live], "store")

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
        return (at[:, None] // self.cell + np.arange(size // self.cell)).ravel()

    def note_shared(
        self,
        at: np.ndarray,
        size: int,
        here: np.ndarray,
        writes: bool,
        site: int,
        copied: bool = False,
        adds: bool = False,
    ) -> None:
        """Look for another warp's touch of these bytes since the last barrier; remember this one.

        Of what was `copied`, products need no fence: PTX asks for one, but triton 3.6 and others
        that ship wait and synchronise alone. Warps that `adds` atomically may meet.
        """
        cells, many = self.cells(at, size), size // self.cell
        program = self.program[here]
        now = np.repeat(self.barriers[program] * WARPS, many)
        mine = now + (ADDING if adds else np.repeat(self.warp[here], many))
        wrote, read = self.wrote[cells], self.read[cells]
        wrong = [((wrote >= now) & (wrote != mine), wrote, "wrote since the last barrier")]
        if writes:
            wrong.append(((read >= now) & (read != mine), read, "read since the last barrier"))
        if self.copies:
            wrong.insert(0, (self.arriving[cells], None, "a copy that is not waited for writes"))
        if self.products and writes:
            held = np.repeat(self.multiplied[at // 16] > 0, many)
            wrong.insert(0, (held, None, "a product that is not waited for reads"))
        for where, others, why in wrong:
            if where.any():
                i = int(np.argmax(where))
                byte = cells[i] * self.cell % self.stride
                does = f"{self.which(mine[i])} {'writes' if writes else 'reads'}"
                other = "" if others is None else f"{self.which(others[i])} "
                self.fail(site, f"{does} shared byte {byte}, which {other}{why}")
        if writes:
            self.wrote[cells] = mine
            several = self.wrote[cells] != mine
            self.wrote[cells[several]] = now[several] + MANY
            self.unfenced[cells] = -1 if copied else np.repeat(self.fences[program], many)
        else:
            self.read[cells] = mine
            several = (read >= now) & (read != mine) | (self.read[cells] != mine)
            self.read[cells[several]] = now[several] + MANY

    def which(self, touch: int) -> str:
        """Return the name of who touched a cell: a warp, by its number in its program."""
        warp = int(touch % WARPS)
        several = {MANY: "several warps", ADDING: "an addition"}
        return several.get(warp, f"warp {warp % (self.kernel.threads // WARP)}")

    def count_wavefronts(self, at: np.ndarray, size: int, here: np.ndarray, what: str) -> None:
        """Count turns: a turn serves one word of each of 32 banks, to whoever wants it."""
        if not self.counting or not len(here):
            return
        words = at[:, None] // 4 + np.arange(max(1, size // 4))
        # 8 bytes a thread are served half a warp at a time, 16 a quarter
        part = here % WARP // (WARP * 4 // max(size, 4))
        turn = (self.warp[here] * 4 + part).astype(np.int64)
        wanted = np.unique(turn[:, None] << 32 | words)
        banks, many = np.unique(wanted >> 32 << 5 | wanted & 31, return_counts=True)
        first = np.flatnonzero(np.diff(banks >> 5, prepend=-1))
        self.counts.requests[f"shared {what}"] += len(np.unique(self.warp[here]))
        self.counts.wavefronts[what] += int(np.maximum.reduceat(many, first).sum())

    def load_shared(
        self,
        address: np.ndarray,
        kind: type,
        many: int,
        guard: np.ndarray | None,
        threads: Threads,
        site: int,
    ) -> list[np.ndarray]:
        """Return `many` elements that follow each other at each thread's address."""
        here, live = self.everyone(threads), self.live(guard, threads)
        item = np.dtype(kind).itemsize
        at = self.at(address[live], item * many, here[live], site)
        self.note_shared(at, item * many, here[live], False, site)
        self.count_wavefronts(at, item * many, here[live], "load")
        made = np.full((len(here), many), np.iinfo(kind).max, kind)
        made[live] = gather(self.shared, at[:, None] + item * np.arange(many), kind)
        return [np.ascontiguousarray(made[:, i]) for i in range(many)]

    def store_shared(
        self,
        address: np.ndarray,
        values: list[np.ndarray],
        kind: type,
        guard: np.ndarray | None,
        threads: Threads,
        site: int,
    ) -> None:
        """Write elements after each other at each thread's address."""
        here, live = self.everyone(threads), self.live(guard, threads)
        item, many = np.dtype(kind).itemsize, len(values)
        at, warp = self.at(address[live], item * many, here[live], site), self.warp[here[live]]
        self.note_shared(at, item * many, here[live], True, site)
        self.count_wavefronts(at, item * many, here[live], "store")
        offset, table = at[:, None] + item * np.arange(many), np.stack(values, 1)[live]
        scatter(self.shared, offset, table)
        lost = (gather(self.shared, offset, kind) != table).any(1)
        if lost.any():
            # Of a warp's own threads, which may differ in a last bit, the last wins in each warp.
            _, last = np.unique((warp << 32 | at)[::-1], return_index=True)
            if lost[::-1][last].any():
                self.fail(site, "two warps write different values into one shared byte")

    def add_shared(
        self,
        address: np.ndarray,
        value: np.ndarray,
        guard: np.ndarray | None,
        threads: Threads,
        site: int,
    ) -> np.ndarray:
        """Add atomically; return what was there before, the same for threads that meet."""
        here, live = self.everyone(threads), self.live(guard, threads)
        at = self.at(address[live], 4, here[live], site)
        self.note_shared(at, 4, here[live], True, site, adds=True)
        self.count_wavefronts(at, 4, here[live], "store")
        memory = self.shared.view(np.uint32)
        made = np.zeros(len(here), np.uint32)
        made[live] = memory[at // 4]
        np.add.at(memory, at // 4, value[live])
        return made

    # Asynchronous copies, from global into shared memory

    def copy(
        self,
        to: np.ndarray,
        of: np.ndarray,
        size: int,
        read: np.ndarray,
        guard: np.ndarray | None,
        threads: Threads,
        site: int,
    ) -> None:
        """Begin a copy of size bytes, of which `read` are read and the others zero."""
        here, live = self.everyone(threads), self.live(guard, threads)
        read, here = np.broadcast_to(read, len(here))[live], here[live]
        if ((read != 0) & (read != size)).any():
            self.fail(site, f"want copies of {size} bytes, or of none")
        at = self.at(to[live], size, here, site)
        data = np.zeros((len(live), size), np.uint8)
        some = np.flatnonzero(read)
        for region, which, there in self.located(of[live][some], size, here[some], site):
            self.touch(region, there, size, here[some[which]], False, site)
            data[some[which]] = region.bytes[there[:, None] + np.arange(size)]
        self.count_sectors(of[live][some], size, here[some], "load")
        self.note_shared(at, size, here, True, site, copied=True)
        self.shared[at[:, None] + np.arange(size)] = 0xFF  # until somebody waits for it
        self.arriving[self.cells(at, size)] = True
        self.copies.begun.append(_Transfer(at, size, here, site, data))

    def land(self, copy: _Transfer) -> None:
        """Write what a copy has read, once it is waited for."""
        self.arriving[self.cells(copy.at, copy.size)] = False
        self.note_shared(copy.at, copy.size, copy.threads, True, copy.site, copied=True)
        self.count_wavefronts(copy.at, copy.size, copy.threads, "store")
        self.shared[copy.at[:, None] + np.arange(copy.size)] = copy.data

    # A warp's threads together

    def shuffle(
        self,
        mode: str,
        a: np.ndarray,
        by: np.ndarray,
        clamp: np.ndarray,
        threads: Threads,
        site: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what each reads of another lane, and whether that is one of its segment."""
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

    def vote(self, mode: str, held: np.ndarray, threads: Threads, site: int) -> np.ndarray:
        here = self.whole(WARP, threads, site)
        held = np.broadcast_to(held, len(here)).reshape(-1, WARP)
        if mode == "ballot":
            made = np.packbits(held, axis=1, bitorder="little").view(np.uint32)[:, 0]
        else:
            made = {"any": held.any(1), "all": held.all(1)}[mode]
        return np.repeat(made, WARP)

    def rows_of_matrices(
        self, address: np.ndarray, many: int, here: np.ndarray, site: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return places of the 8 rows, of 16 bytes, of each warp's matrices, and whose they are."""
        rows = address.reshape(-1, WARP)[:, : 8 * many]
        owners = here.reshape(-1, WARP)[:, : 8 * many].ravel()
        return self.at(rows.ravel(), 16, owners, site), owners

    def load_matrix(
        self, address: np.ndarray, many: int, transposed: bool, threads: Threads, site: int
    ) -> list[np.ndarray]:
        """Return `many` matrices of 8 x 8 halves, two neighbours of a row to each lane."""
        here = self.whole(WARP, threads, site)
        at, owners = self.rows_of_matrices(address, many, here, site)
        self.note_shared(at, 16, owners, False, site)
        self.count_wavefronts(at, 16, owners, "load")
        values = gather(self.shared, at[:, None] + 2 * np.arange(8), np.uint16)
        values = values.reshape(-1, many, 8, 8)
        if transposed:
            values = values.swapaxes(2, 3)
        pairs = np.ascontiguousarray(values).view(np.uint32).reshape(-1, many, WARP)
        return [np.ascontiguousarray(pairs[:, i]).ravel() for i in range(many)]

    def store_matrix(
        self,
        address: np.ndarray,
        values: list[np.ndarray],
        transposed: bool,
        threads: Threads,
        site: int,
    ) -> None:
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

    def mma(
        self,
        shape: str,
        kind: str,
        a: list[np.ndarray],
        b: list[np.ndarray],
        c: list[np.ndarray],
        threads: Threads,
        site: int,
    ) -> list[np.ndarray]:
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

    def wgmma(
        self,
        shape: str,
        kind: str,
        a: list[np.ndarray] | np.ndarray,
        b: np.ndarray,
        sums: list[np.ndarray],
        keep: np.ndarray,
        order: list[int],
        threads: Threads,
        site: int,
    ) -> list[np.ndarray]:
        """Return a @ b (+ sums) of each warp group.

        a: registers, or like b a descriptor of shared memory. order: whether each lies transposed.
        """
        here = self.whole(GROUP, threads, site)
        n, k = (int(v) for v in shape[1:].replace("k", "n").split("n")[1:])
        leaders = here[::GROUP]
        if isinstance(a, list):
            left = self.fragment_a(a, kind).reshape(len(leaders), 64, k)
        else:
            left = self.operand(a, 64, k, kind, order[0], leaders, site)
        right = self.operand(b, n, k, kind, order[1], leaders, site)
        made = np.matmul(left, right.swapaxes(1, 2))  # [groups, 64, n]
        made = made.reshape(-1, 4, 2, 8, n // 8, 4, 2)  # group, warp, half, row, block, lane, pair
        made = made.transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
        kept = np.broadcast_to(keep, len(here))
        return [
            np.where(kept, m + s, m).astype(np.float32) for m, s in zip(made, sums, strict=True)
        ]

    def operand(
        self,
        descriptor: np.ndarray,
        rows: int,
        k: int,
        kind: str,
        transposed: int,
        leaders: np.ndarray,
        site: int,
    ) -> np.ndarray:
        """Return [groups, rows, k] of shared memory, laid out as a descriptor says.

        Units of 16 bytes lie along k, or along the rows if transposed: 1, 2, 4 or 8 beside each
        other, in lines of which 8 follow each other. A swizzle exchanges units inside those 8 lines
        (PTX manual 9.7.15.5).
        """
        item = 4 if kind == "tf32" else 2
        unit = 16 // item
        each = descriptor.reshape(-1, GROUP)
        if (each != each[:, :1]).any():
            self.fail(site, "a group's threads describe different operands")
        d = each[:, 0].astype(np.int64)
        start, lead, stride = ((d >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        start, lead, stride = (v[:, None, None] for v in (start, lead, stride))
        modes = np.unique(d >> 62 & 3)
        if len(modes) != 1 or (d >> 49 & 7).any() or (transposed and item == 4):
            self.fail(site, "an operand in shared memory of a layout that is not known here")
        wide = {0: 1, 1: 8, 2: 4, 3: 2}[int(modes[0])]  # units of a line
        if transposed:
            piece, c = np.ogrid[: rows // unit, :k]
            to_8, to_wide = (lead, stride) if wide == 1 else (stride, lead)
            offset = c % 8 * 16 * wide + c // 8 * to_8 + piece % wide * 16 + piece // wide * to_wide
        else:
            r, piece = np.ogrid[:rows, : k // unit]
            offset = r % 8 * 16 * wide + r // 8 * stride + piece * (lead if wide == 1 else 16)
        address = start + offset
        address ^= (address >> 7 & (wide - 1)) << 4
        owners = np.repeat(leaders, address[0].size)
        at = self.at(address.ravel(), 16, owners, site)
        fences = np.repeat(self.fences[self.program[owners]], 16 // self.cell)
        if (self.unfenced[self.cells(at, 16)] >= fences).any():
            self.fail(site, "a product reads shared memory that no fence has made visible to it")
        self.note_shared(at, 16, owners, False, site)
        if self.counting:  # a turn serves 128 bytes
            self.counts.wavefronts["product"] += at.size // 8
        np.add.at(self.multiplied, at // 16, 1)
        self.products.begun.append(_Transfer(at, 16, owners, site))
        bits = np.uint32 if item == 4 else np.uint16
        values = gather(self.shared, at[:, None] + item * np.arange(unit), bits)
        made = truncated(values) if item == 4 else ptx.widened(values, kind)
        if transposed:
            made = made.reshape(-1, rows // unit, k, unit).swapaxes(2, 3)
        return made.reshape(-1, rows, k)

    def wait_products(self, left: int, threads: Threads, site: int) -> None:
        self.whole(GROUP, threads, site)
        self.products.wait(left, threads)

    def release(self, product: _Transfer) -> None:
        """Let an operand in shared memory be written again: it was read until here."""
        np.add.at(self.multiplied, product.at // 16, -1)
        self.note_shared(product.at, 16, product.threads, False, product.site)


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
