"""Activations that wait for their backward pass in host memory, bit for bit.

A copy out, and a copy back, run on one side stream a device, in the order in which they were asked
for, beside the kernels of the stream that computes.

Whose memory is whose, and when. A tensor's memory goes back to the allocator when Python drops it,
while kernels that were launched before still have to run; what is allocated on the same stream next
runs after them, what runs on another stream does not.

The copy out reads the tensor on the side stream. `Tensor.record_stream` would keep its memory until
the allocator, asked for more, finds that copy done: but Python is many kernels ahead of the device,
finds none done, and takes new memory for each tensor that it meant to save, how much depending on
time. So an `Offloaded` holds its tensor until it is settled: the computing stream then waits for
the copy, and what is freed is free for it at once, whatever the device is at. That is at a known
place of the program: where someone calls `settle` or `prefetch`, or drops the object. The later
that is, the more of the copy runs beside computation, and the longer the tensor takes memory. The
same happens on fake tensors, so what the meter counts is what the device holds.

The copy back is allocated on the computing stream, and written by the side stream after all that
was launched on the former until then, so it may lie where a freed tensor lay. The computing stream
waits for it before it reads it, and before it is freed unread. No memory belongs to the side
stream's own pool, from which no other could take.

Host memory is written by the side stream alone, so what is taken from a pool that another has just
given back is written after the copies that read it. A pool serves one device for that reason.

Threads: an object is used by one at a time (forward in one, then backward in autograd's own), a
pool and the side stream by any number.
"""

import mmap
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

PAGE = 4096  # bytes: pieces of host memory begin at one
SLAB = 64 * 2**20  # bytes that are pinned at least, since each time costs a system call
_SLAB_STEP = 2 * 2**20  # a huge page

# Called with every storage on the host that an Offloaded holds, of exactly its tensor's bytes.
watchers: list[Callable[[torch.UntypedStorage], None]] = []


class Offloaded:
    """A tensor that waits in host memory, which is given back when the object is dropped.

    Attributes:
        shape: as the tensor's.
        stride: its strides, where its elements fill one range of memory, in any order of axes; else
            those of its clone. A clone is made of such a tensor first, so that other elements of
            its storage stay where they are.
        dtype: as the tensor's.
        device: that it comes from and goes back to.
        nbytes: of its elements, and so of the host's storage.
    """

    def __init__(self, x: Tensor, pool: "HostPool | None" = None):
        """Start the copy to the host, after what is on the current stream.

        Each object is a copy of its own, also of the same tensor. The caller drops x. Until the
        object is settled nobody may write to x, and x's memory is not given back.

        Args:
            x: of any dtype and size, on the CPU, a GPU or "meta", or fake. On a CPU it is copied
                at once, to memory that is not pinned. A fake one's copy is a fake CPU tensor.
            pool: where to take memory, unless x is fake or "meta"; None is `host_pool(x.device)`.

        Raises:
            ValueError: x is a parameter or a view of one, which stay where they are; has no
                strides; is on another kind of device; or is on another device than the pool's.
            MemoryError: the pool's limit would be passed, or the machine has no memory left.
        """
        self._source: Tensor | None = None  # x until it is settled
        self._back: Tensor | None = None
        self._host: Tensor | None = None
        self._piece: _Piece | None = None
        for given in (x, x._base):
            if isinstance(given, nn.Parameter):
                raise ValueError("x: want an activation, got a parameter or a view of one")
        if x.layout is not torch.strided:
            raise ValueError(f"x: want a tensor with strides, got the layout {x.layout}")
        fake = isinstance(x, FakeTensor)
        if not fake and x.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(f"x: want it on cpu, cuda or meta, got {x.device}")
        lane = _lane(x.device, fake)
        x = x.detach()
        if x.is_conj() or x.is_neg():  # bits of the tensor that its elements do not show
            x = x.resolve_conj().resolve_neg()
        if not _is_dense(x):
            x = x.clone()
        self.shape, self.stride, self.dtype, self.device = x.shape, x.stride(), x.dtype, x.device
        self.nbytes = x.numel() * x.element_size()
        if fake or x.is_meta:
            self._host = x.new_empty(
                self.nbytes, dtype=torch.uint8, device="cpu" if fake else "meta"
            )
        elif self.nbytes:
            self._piece = (pool or host_pool(x.device)).take(self.nbytes, x.device)
            self._host = self._piece.tensor(self.nbytes)
        else:
            self._host = torch.empty(0, dtype=torch.uint8, device="cpu")
        for watcher in watchers:
            watcher(self._host.untyped_storage())

        self._side = lane.stream if self.nbytes else None
        if self._side is not None:
            self._made_on = _current_stream(x.device)
            self._side.wait_event(self._made_on.record_event())
        if self._piece is not None:
            _copy(self._host, _bytes(x), self._side)
        if self._side is not None:
            self._copied = self._side.record_event()
        self._source = x

    def settle(self) -> None:
        """Let go of x: its memory is free for what the stream it was offloaded from runs next.

        That stream waits for the copy, so calling this late costs no time, but memory.
        """
        if self._source is None:
            return
        if self._side is not None:
            self._made_on.wait_event(self._copied)
        self._source = None

    def prefetch(self) -> None:
        """Allocate on the device, and start the copy back, unless that is done."""
        if self._back is not None:
            return
        self.settle()
        back = _new(self._host, self.shape, self.stride, self.dtype, self.device)
        if self._side is not None:
            self._home = _current_stream(self.device)
            self._side.wait_event(self._home.record_event())
        if self._piece is not None:  # else there are no bytes
            _copy(_bytes(back), self._host, self._side)  # after the copy out: one stream
        if self._side is not None:
            self._fetched = self._side.record_event()
        self._back = back

    def wait(self) -> Tensor:
        """Return the tensor on its device, for use on the current stream.

        It requires no gradient. The object holds it until `release`.
        """
        self.prefetch()
        if self._side is not None:
            current = _current_stream(self.device)
            current.wait_event(self._fetched)
            if current != self._home:  # whose memory it is
                self._back.record_stream(current)
        return self._back

    def release(self) -> None:
        """Forget the tensor on the device; another `wait` copies it again."""
        if self._back is None:
            return
        if self._side is not None:
            self._home.wait_event(self._fetched)  # nobody else may have
        self._back = None

    def __del__(self):
        """Give the host memory back."""
        if sys.is_finalizing():  # streams may be gone
            return
        self.release()
        self.settle()  # the allocator may unmap memory once its own stream is done with it
        self._host = None
        if self._piece is not None:
            self._piece.pool.give(self._piece)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill one range of memory, each at a place of its own."""
    count = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != count:
            return x.numel() == 0
        count *= size
    return True


def _bytes(x: Tensor) -> Tensor:
    """Return the memory of a dense tensor."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset()).view(torch.uint8)


def _new(
    like: Tensor,
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return fresh memory of the current stream; fake where the other is."""
    return like.new_empty_strided(shape, stride, dtype=dtype, device=device)


# Streams


@dataclass
class _Lane:
    """What is shared by all that is offloaded from a device; `stream` is None but for GPUs."""

    stream: torch.cuda.Stream | None
    pool: "HostPool"


_lanes: dict[tuple[torch.device, bool], _Lane] = {}


def _lane(device: torch.device, fake: bool) -> _Lane:
    """Return a device's lane; fake tensors have one of their own."""
    if (device, fake) not in _lanes:
        stream = _side_stream(device) if device.type == "cuda" and not fake else None
        _lanes.setdefault((device, fake), _Lane(stream, HostPool()))  # one, whoever is first
    return _lanes[device, fake]


def host_pool(device: torch.device) -> "HostPool":
    """Return the pool that is a device's own, which holds its memory until it is trimmed."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _lane(device, fake=False).pool


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _current_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.current_stream(device)


def _copy(to: Tensor, source: Tensor, stream: torch.cuda.Stream | None) -> None:
    """Copy bytes, on a stream where there is one."""
    if stream is None:
        to.copy_(source)
        return
    with torch.cuda.stream(stream):
        to.copy_(source, non_blocking=True)


# Host memory


class HostPool:
    """Host memory that is pinned once, and used step after step, by one device.

    torch's own pinned memory comes in powers of two, up to twice what is asked for, and is kept for
    good. This is ordinary memory that is registered with the driver, in slabs that are carved into
    pieces of whole pages. A tensor of at least `SLAB` bytes that finds no room gets a slab of its
    own, rounded up to 2 MiB.

    A step that takes and gives back as the one before did finds the same places, and pins nothing,
    unless the one before dropped slabs: a new slab takes the place of idle ones where the pool
    would else hold more than was ever in use at once, so images of changing sizes do not pile up.

    All goes back to the system when the pool is dropped and the last `Offloaded` that has a piece
    of it: that holds it too.

    Attributes:
        limit: the most bytes to hold; None for any number. It may change.
        pinned: whether copies run beside computation. False on a CPU, and, after one warning, where
            the driver would pin no more.
    """

    def __init__(self, limit: int | None = None):
        """Hold nothing yet. Raises ValueError for a limit below 0."""
        if limit is not None and limit < 0:
            raise ValueError(f"limit: want a number of bytes or None, got {limit}")
        self.limit = limit
        self.pinned = True
        self._device: torch.device | None = None
        self._slabs: list[_Slab] = []
        self._most = 0  # bytes that were in use at once
        self._lock = threading.Lock()
        # What was given back: an Offloaded may die anywhere, so also in this thread while it has
        # the lock.
        self._returned: deque[tuple[_Slab, int, int]] = deque()
        # Not at exit: then the system takes everything.
        weakref.finalize(self, _unpin_all, self._slabs).atexit = False

    def __reduce__(self):
        """Be copied and pickled as an empty pool of the same limit."""
        return HostPool, (self.limit,)

    @property
    def held(self) -> int:
        """The bytes that the pool holds."""
        return sum(slab.size for slab in self._slabs)

    @property
    def in_use(self) -> int:
        """The bytes of pieces that are not given back."""
        with self._lock:
            self._collect()
            return self._used()

    def take(self, nbytes: int, device: torch.device) -> "_Piece":
        """Return memory for nbytes, at least one.

        Raises:
            ValueError: the pool is another device's.
            MemoryError: it would hold more than its limit, or the machine has no memory left.
        """
        with self._lock:
            if self._device not in (None, device):
                raise ValueError(f"pool: want one of {device}, got one of {self._device}")
            self._device = device
            self._collect()
            size = _up(nbytes, PAGE)
            self._most = max(self._most, self._used() + size)
            rooms = (
                (slab, start)
                for slab in self._slabs
                for start, stop in slab.gaps
                if stop - start >= size
            )
            # The first that fits, since slabs made later then change nothing: a step that asks as
            # the one before did gets the same places.
            slab, start = next(rooms, None) or (self._grown(size), 0)
            slab.cut(start, start + size)
            return _Piece(self, slab, start, start + size)

    def give(self, piece: "_Piece") -> None:
        """Take a piece back, whose copies are all on the side stream."""
        self._returned.append((piece.slab, piece.start, piece.stop))

    def trim(self) -> None:
        """Give the system what nobody uses; waits for the device."""
        with self._lock:
            self._collect()
            for slab in [slab for slab in self._slabs if slab.idle]:
                self._drop(slab)

    def _used(self) -> int:
        return sum(slab.used for slab in self._slabs)

    def _collect(self) -> None:
        while self._returned:
            slab, start, stop = self._returned.popleft()
            slab.mend(start, stop)

    def _grown(self, size: int) -> "_Slab":
        """Return a new slab with room for size."""
        wanted = max(SLAB, _up(size, _SLAB_STEP))
        ceiling = self._most if self.limit is None else min(self._most, self.limit)
        idle = [slab for slab in self._slabs if slab.idle]
        while idle and self.held + wanted > ceiling:
            self._drop(idle.pop(0))
        if self.limit is not None:
            wanted = min(wanted, (self.limit - self.held) // PAGE * PAGE)
        if wanted < size:
            raise MemoryError(
                f"host memory: want {size:,} bytes beside {self.held:,} held "
                f"({self._used():,} in use), got a limit of {self.limit:,}"
            )
        try:
            memory = mmap.mmap(-1, wanted, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"host memory: want {wanted:,} bytes, got {error}") from error
        slab = _Slab(memory, wanted)
        _advise(memory, "MADV_HUGEPAGE")  # some hundred times fewer pages to pin
        self._pin(slab)
        self._slabs.append(slab)
        return slab

    def _pin(self, slab: "_Slab") -> None:
        if self._device.type != "cuda":
            self.pinned = False
        if not self.pinned:
            return
        error = _register(slab.address, slab.size, self._device)
        if error:
            self.pinned = False
            warnings.warn(
                f"{slab.size:,} bytes of host memory could not be pinned ({error}), so what is "
                "offloaded from here on holds computation up; see `ulimit -l`, or offload less",
                stacklevel=2,
            )
            return
        slab.pinned_for = self._device
        # A fork would turn a page that is written next into a copy, and the device would go on
        # with the old one.
        _advise(slab.memory, "MADV_DONTFORK")

    def _drop(self, slab: "_Slab") -> None:
        self._slabs.remove(slab)
        _unpin_all([slab])


@dataclass(eq=False)
class _Slab:
    """Memory of one mapping; the gaps, in order, are what nobody uses."""

    memory: mmap.mmap
    size: int
    gaps: list[tuple[int, int]] = field(default_factory=list)
    pinned_for: torch.device | None = None

    def __post_init__(self):
        self.gaps = [(0, self.size)]
        self.address = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()

    @property
    def used(self) -> int:
        return self.size - sum(stop - start for start, stop in self.gaps)

    @property
    def idle(self) -> bool:
        return self.gaps == [(0, self.size)]

    def cut(self, start: int, stop: int) -> None:
        """Use what begins at a gap's start."""
        gaps = [gap if gap[0] != start else (stop, gap[1]) for gap in self.gaps]
        self.gaps = [gap for gap in gaps if gap[0] < gap[1]]

    def mend(self, start: int, stop: int) -> None:
        """Make a gap, one with its neighbours."""
        gaps: list[tuple[int, int]] = []
        for first, last in sorted([*self.gaps, (start, stop)]):
            if gaps and gaps[-1][1] == first:
                gaps[-1] = (gaps[-1][0], last)
            else:
                gaps.append((first, last))
        self.gaps = gaps


@dataclass(eq=False)
class _Piece:
    pool: HostPool
    slab: _Slab
    start: int
    stop: int

    def tensor(self, nbytes: int) -> Tensor:
        """Return its first bytes, a storage of their own that dies with the tensor."""
        return torch.frombuffer(
            self.slab.memory, dtype=torch.uint8, count=nbytes, offset=self.start
        )


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _advise(memory: mmap.mmap, name: str) -> None:
    with suppress(OSError, AttributeError):  # advice that this system does not know
        memory.madvise(getattr(mmap, name))


def _register(address: int, size: int, device: torch.device) -> str:
    """Pin memory for all devices; return what is wrong, if anything is."""
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()
        error = runtime.cudaHostRegister(address, size, 1)  # cudaHostRegisterPortable
        if int(error) == 0:
            return ""
        # The runtime remembers the error, and the next launch, which has nothing to do with it,
        # would raise it. So make that launch.
        with suppress(RuntimeError):
            torch.ones((), device=device)
        return runtime.cudaGetErrorString(error)


def _unregister(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # copies from it and to it may be on their way
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()
        error = runtime.cudaHostUnregister(address)
    if int(error):
        raise RuntimeError(f"unpinning host memory failed: {runtime.cudaGetErrorString(error)}")


def _unpin_all(slabs: list[_Slab]) -> None:
    for slab in slabs:
        if slab.pinned_for is not None:
            _unregister(slab.address, slab.pinned_for)
            slab.pinned_for = None
