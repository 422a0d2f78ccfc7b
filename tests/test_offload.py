"""Activations on the host and back: bits, host memory, order of copies, fake tensors' bytes.

What hangs on streams is tested twice: on a simulated device, whose streams run ahead of each other
at random and whose allocator hands freed memory out again at once, and on a card.
"""

import copy
import gc
import pickle
import random
import threading
import warnings
import weakref
from collections import deque

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fullres.engine.live_bytes import LiveBytes
from fullres.ops import offload
from fullres.ops.offload import PAGE, SLAB, HostPool, Offloaded, host_pool, watchers

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def bits(x: Tensor) -> list[int]:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).tolist()


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """A tensor of any bits, so with NaNs of many kinds, infinities and subnormal numbers."""
    count = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    return torch.randint(high, (count,), generator=rng, dtype=torch.uint8).view(dtype).view(shape)


# The same bits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_come_back(dtype, device, rng):
    x = random_bits((3, 5, 7, 11), dtype, rng).to(device)
    want = bits(x)
    there = Offloaded(x)
    assert there.nbytes == len(want)
    del x
    back = there.wait()
    assert bits(back) == want
    assert (back.shape, back.dtype, back.device.type) == ((3, 5, 7, 11), dtype, device)


LAYOUTS = {
    "scalar": lambda x: x[0, 0, 0, 0],
    "one pixel": lambda x: x[:1, :, :1, :1].contiguous(memory_format=torch.channels_last),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 1, 0, 2),
    "one of a batch": lambda x: x[1:2],
    "no elements": lambda x: x[:, :0].contiguous(memory_format=torch.channels_last),
    "odd strides of axes of one": lambda x: x[0, 0, 0].as_strided((1, 11, 1), (77, 1, 5)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_are_kept_where_elements_fill_their_range(make, device, rng):
    x = make(torch.randn(3, 5, 7, 11, generator=rng).to(device))
    there = Offloaded(x)
    back = there.wait()
    assert bits(back) == bits(x)
    assert (back.shape, back.stride()) == (x.shape, x.stride())
    assert there.nbytes == x.numel() * 4
    assert back.storage_offset() == 0 and back.untyped_storage().nbytes() == there.nbytes


VIEWS = {
    "every other": lambda x: x[:, :, ::2],
    "cropped": lambda x: x[..., 2:9],
    "spread": lambda x: x[:, :1].expand(3, 9, 7, 11),
    "overlapping": lambda x: x.flatten().as_strided((4, 6), (2, 1)),
    "conjugate": lambda x: torch.complex(x, -x).conj(),
    "negative": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)
def test_of_a_view_its_own_elements_are_copied(make, device, rng):
    whole = torch.randn(3, 5, 7, 11, generator=rng).to(device)
    x = make(whole.contiguous(memory_format=torch.channels_last))
    want = x.clone().resolve_conj().resolve_neg()
    there = Offloaded(x)
    there.settle()
    whole.fill_(torch.nan)
    back = there.wait()
    assert there.nbytes == x.numel() * x.element_size() == back.untyped_storage().nbytes()
    assert back.stride() == want.stride() and bits(back) == bits(want)


def test_parameters_and_what_has_no_strides_are_refused():
    weight = nn.Parameter(torch.ones(2, 3))
    for x in (weight, weight.t(), weight[0]):
        with pytest.raises(ValueError, match="x: want an activation, got a parameter"):
            Offloaded(x)
    with pytest.raises(ValueError, match="x: want a tensor with strides, got the layout"):
        Offloaded(torch.eye(3).to_sparse())
    assert Offloaded(weight * 2).wait().tolist() == [[2.0] * 3] * 2


def test_no_gradient_is_asked_of_what_comes_back():
    x = torch.ones(3, requires_grad=True) * 2
    assert not Offloaded(x).wait().requires_grad
    with torch.inference_mode():
        assert Offloaded(torch.ones(3)).wait().tolist() == [1.0] * 3


class Square(torch.autograd.Function):
    """x * x, its input kept on the host."""

    @staticmethod
    def forward(ctx, x, pool=None):
        ctx.x = Offloaded(x, pool)
        out = x * x
        ctx.x.settle()
        return out

    @staticmethod
    def backward(ctx, g):
        gradient = 2 * g * ctx.x.wait()
        ctx.x.release()
        return gradient, None


@pytest.mark.parametrize("device", DEVICES)
def test_backward_twice(device, rng):
    x = torch.randn(2, 3, 5, 7, generator=rng).to(device).requires_grad_()
    y = Square.apply(Square.apply(x)).sum()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(y, x, retain_graph=True)
        assert torch.equal(gradient, 2 * (x * x) * (2 * x))


def test_what_comes_back_may_be_written_and_the_hosts_copy_stays(rng):
    x = torch.randn(20, generator=rng)
    there = Offloaded(x)
    for _ in range(2):
        back = there.wait()
        assert back is there.wait() and torch.equal(back, x)
        back.zero_()
        there.release()
        there.release()


def test_the_same_tensor_twice_makes_two_copies(rng):
    pool = HostPool()
    x = torch.randn(5000, generator=rng)
    one, two = Offloaded(x, pool), Offloaded(x, pool)
    assert pool.in_use == 2 * 5 * PAGE
    want = x.clone()
    del x
    one.wait().zero_()
    assert torch.equal(two.wait(), want)
    del one
    assert pool.in_use == 5 * PAGE and torch.equal(two.wait(), want)


# When memory on the device goes


def watched(x: Tensor) -> weakref.ref:
    return weakref.ref(x.untyped_storage())


ENDS = {
    "settled": lambda there: there.settle(),
    "prefetched": lambda there: there.prefetch(),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_tensor_is_held_until_it_is_settled(end):
    """Else its memory would be another's before the copy is done."""
    x = torch.ones(7)
    alive, there = watched(x), Offloaded(x)
    del x
    assert alive() is not None
    end(there)
    assert alive() is None
    assert there.wait().tolist() == [1.0] * 7


def test_a_dropped_object_holds_nothing():
    pool = HostPool()
    x = torch.ones(7)
    alive, there = watched(x), Offloaded(x, pool)
    back = watched(there.wait())
    del x
    assert pool.in_use == PAGE and back() is not None
    del there
    assert alive() is None and back() is None and pool.in_use == 0


def test_what_came_back_goes_when_it_is_released():
    there = Offloaded(torch.ones(7))
    back = watched(there.wait())
    assert back() is not None
    there.release()
    assert back() is None


# Host memory


def step(pool: HostPool, sizes: list[int]) -> None:
    """What a training step asks of the pool: all in, then all out, last first."""
    there = [Offloaded(torch.full((size,), n, dtype=torch.uint8), pool)
             for n, size in enumerate(sizes, 1)]  # fmt: skip
    for number in range(len(sizes), 0, -1):
        back = there.pop().wait()
        assert back.numel() == sizes[number - 1] and bool((back == number).all())


def test_host_memory_is_used_again_step_after_step(monkeypatch):
    """Also where pieces were not put where the same step, with all slabs there, puts them."""
    monkeypatch.setattr(offload, "SLAB", 2**16)
    monkeypatch.setattr(offload, "_SLAB_STEP", 2**13)
    for seed in range(20):
        dice = random.Random(seed)
        sizes = [dice.choice([1, 5000, 20_000, 65_536, 70_000, 150_000]) for _ in range(25)]
        pool, held = HostPool(), set()
        for _ in range(50 if seed == 0 else 5):
            step(pool, sizes)
            held.add(pool.held)
            assert pool.in_use == 0
        assert len(held) == 1
        used = sum(-(-size // PAGE) * PAGE for size in sizes)
        assert held.pop() <= used * 1.5


def test_steps_that_give_back_between_come_to_rest_too():
    for seed in range(40):
        dice, calls, live = random.Random(seed), [], 0
        for _ in range(40):
            if live and dice.random() < 0.45:
                calls.append(dice.randrange(live))
                live -= 1
            else:
                calls.append(-dice.choice([1, SLAB // 3, SLAB // 2 + 7, SLAB, 3 * SLAB + 5]))
                live += 1
        pool, slabs = HostPool(), []
        for _ in range(6):
            pieces = []
            for call in calls:
                if call < 0:
                    pieces.append(pool.take(-call, CPU))
                else:
                    pool.give(pieces.pop(call))
            while pieces:
                pool.give(pieces.pop())
            slabs.append(list(pool._slabs))
        assert slabs[2] == slabs[3] == slabs[5]
        assert pool.in_use == 0 and pool.held < 1.6 * pool._most


def test_idle_memory_is_kept_where_as_much_was_in_use():
    pool = HostPool()
    step(pool, [SLAB, SLAB + 1, 2 * SLAB])
    pool.trim()
    for _ in range(3):
        for size in (SLAB, 2 * SLAB):
            pool.give(pool.take(size, CPU))
        assert pool.held == 3 * SLAB


def test_large_tensors_are_not_rounded_to_powers_of_two():
    pool = HostPool()
    there = [Offloaded(torch.zeros(SLAB + 3 * 2**20 + 5, dtype=torch.uint8), pool)
             for _ in range(2)]  # fmt: skip
    assert pool.held == 2 * (SLAB + 4 * 2**20)
    assert pool.held < 1.02 * sum(each.nbytes for each in there)


def test_images_of_changing_sizes_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(offload, "SLAB", PAGE)
    monkeypatch.setattr(offload, "_SLAB_STEP", PAGE)
    pool, most = HostPool(), 0
    for n in range(1, 40):
        sizes = [n * PAGE, (n * 7 % 11 + 1) * PAGE, (n * 5 % 13 + 1) * PAGE]
        step(pool, sizes)
        most = max(most, sum(sizes))
        assert pool.held <= 2 * most  # slabs that are used in part stay


def test_the_limit_is_kept():
    pool = HostPool(limit=5 * PAGE + 100)
    there = [Offloaded(torch.zeros(2 * PAGE, dtype=torch.uint8), pool) for _ in range(2)]
    assert pool.held == pool.in_use + PAGE == 5 * PAGE
    wanted = r"host memory: want 8,192 bytes beside 20,480 held \(16,384 in use\), got a limit of "
    x = torch.ones(2 * PAGE, dtype=torch.uint8)
    with pytest.raises(MemoryError, match=wanted + "20,580"):
        Offloaded(x, pool)
    assert pool.in_use == 4 * PAGE
    there.pop()
    assert torch.equal(Offloaded(x, pool).wait(), x)
    assert pool.held == 5 * PAGE
    there.clear()  # idle memory makes room
    assert Offloaded(torch.ones(5 * PAGE, dtype=torch.uint8), pool).nbytes == 5 * PAGE
    pool.limit = PAGE
    with pytest.raises(MemoryError):
        Offloaded(torch.ones(6 * PAGE, dtype=torch.uint8), pool)
    with pytest.raises(ValueError, match="limit: want a number of bytes or None, got -1"):
        HostPool(-1)


def test_a_machine_without_memory_says_so():
    with pytest.raises(MemoryError, match="host memory: want 4,611,686,018,427,387,904 bytes"):
        HostPool().take(2**62, CPU)


def test_trimming_gives_back_what_is_idle():
    pool = HostPool()
    there = Offloaded(torch.ones(SLAB, dtype=torch.uint8), pool)
    Offloaded(torch.ones(1), pool)
    assert pool.held == 2 * SLAB
    pool.trim()
    assert pool.held == SLAB and bool(there.wait().all())
    del there
    pool.trim()
    assert pool.held == 0


def test_a_device_has_a_pool_of_its_own():
    pool = host_pool(CPU)
    before = pool.in_use
    there = Offloaded(torch.ones(1))
    assert host_pool(CPU) is pool and pool.in_use == before + PAGE
    del there
    assert pool.in_use == before


def test_a_copied_pool_is_an_empty_one_of_the_same_limit():
    pool = HostPool(3 * SLAB)
    there = Offloaded(torch.ones(1), pool)
    for twin in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert (twin.limit, twin.held) == (3 * SLAB, 0)
    assert there.wait().item() == 1


@pytest.fixture
def driver(monkeypatch) -> dict[int, int]:
    """What stands for CUDA's: the sizes that are pinned, by address; no copy is made."""
    pinned: dict[int, int] = {}

    def register(address, size, device):
        if sum(pinned.values()) + size > 3 * SLAB:
            return "out of memory"
        pinned[address] = size
        return ""

    monkeypatch.setattr(offload, "_register", register)
    monkeypatch.setattr(offload, "_unregister", lambda address, device: pinned.pop(address))
    return pinned


CARD = torch.device("cuda", 0)


def test_slabs_are_pinned_whole_and_once(driver):
    pool = HostPool()
    for _ in range(3):
        pieces = [pool.take(size, CARD) for size in (100, SLAB + 1, 200)]
        for piece in pieces:
            pool.give(piece)
    assert sorted(driver.values()) == [SLAB, SLAB + 2 * 2**20]
    for piece in pieces:
        tensor = piece.tensor(1)
        assert any(a <= tensor.data_ptr() < a + size for a, size in driver.items())
    del piece, pieces
    assert pool.pinned
    pool.trim()
    assert driver == {}


def test_all_is_unpinned_when_the_last_user_goes(driver):
    """Without waiting for a garbage collection."""
    gc.collect()
    gc.disable()
    try:
        pool = HostPool()
        pool.give(pool.take(50, CARD))
        piece = pool.take(2 * SLAB, CARD)
        alive = weakref.ref(piece.slab.memory)
        pool.give(pool.take(50, CARD))
        del pool
        assert len(driver) == 2 and alive() is not None
        del piece
        assert driver == {} and alive() is None
    finally:
        gc.enable()


def test_where_pinning_fails_memory_is_ordinary_after_one_warning(driver):
    pool = HostPool()
    pieces = [pool.take(2 * SLAB, CARD)]
    with pytest.warns(UserWarning, match="134,217,728 bytes .* not be pinned .out of memory.*ulim"):
        pieces.append(pool.take(2 * SLAB, CARD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pieces.append(pool.take(SLAB, CARD))
    assert not pool.pinned and list(driver.values()) == [2 * SLAB]
    for piece in pieces:
        piece.tensor(9).fill_(3)
        pool.give(piece)
    pool.trim()
    assert driver == {} and pool.held == 0


def test_a_pool_serves_one_device(driver):
    pool = HostPool()
    pool.take(1, CARD)
    with pytest.raises(ValueError, match="pool: want one of cpu, got one of cuda:0"):
        Offloaded(torch.ones(1), pool)


def test_several_threads_may_use_a_pool():
    pool, wrong = HostPool(), []

    def work(seed: int) -> None:
        dice, there = random.Random(seed), []
        for _ in range(300):
            if there and dice.random() < 0.5:
                value, each = there.pop(dice.randrange(len(there)))
                wrong.extend({*each.wait().tolist()} - {value})
            else:
                value = dice.random()
                x = torch.full((dice.choice([1, 600, 3000]),), value, dtype=torch.float64)
                there.append((value, Offloaded(x, pool)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and pool.in_use == 0 and pool.held == SLAB


# Without bytes


def test_watchers_are_told_of_every_copy_also_in_memory_used_again():
    told: list[int] = []
    watchers.append(lambda storage: told.append(storage.nbytes()))
    try:
        pool = HostPool()
        for _ in range(2):
            step(pool, [5, 4097])
        with FakeTensorMode():
            Offloaded(torch.ones(3))
        Offloaded(torch.ones(3, device="meta"))
        Offloaded(torch.ones(0))
    finally:
        watchers.pop()
    assert told == [5, 4097, 5, 4097, 12, 12, 0]


def bytes_of_a_step(live: LiveBytes) -> list[tuple[int, int]]:
    """(device, host) after each of the calls of a step."""
    seen = []
    watchers.append(live.move_to_host)
    try:
        x = torch.zeros(2, 4, 6, 8).contiguous(memory_format=torch.channels_last)
        seen.append((live.now, live.host))
        there = Offloaded(x)
        seen.append((live.now, live.host))
        del x
        seen.append((live.now, live.host))
        there.settle()
        crop = torch.zeros(4, 6)[:, 1:3]
        there2 = Offloaded(crop)
        seen.append((live.now, live.host))
        del crop
        seen.append((live.now, live.host))
        there2.settle()
        seen.append((live.now, live.host))
        there2.prefetch()
        seen.append((live.now, live.host))
        back = there.wait()
        assert back.stride() == (192, 1, 32, 4) and back.shape == (2, 4, 6, 8)
        seen.append((live.now, live.host))
        del back
        there.release()
        seen.append((live.now, live.host))
        del there, there2
        seen.append((live.now, live.host))
    finally:
        watchers.pop()
    return seen


def test_fake_tensors_bytes_are_those_of_real_ones():
    with FakeTensorMode(), LiveBytes() as live:
        fake = bytes_of_a_step(live)
    with LiveBytes() as live:
        real = bytes_of_a_step(live)
    assert fake == real == [
        (1536, 0), (1536, 1536), (1536, 1536),
        (128, 1568), (32, 1568), (0, 1568),
        (32, 1568), (1568, 1568), (32, 1568), (0, 0),
    ]  # fmt: skip
    with FakeTensorMode():
        there = Offloaded(torch.zeros(3, 5, device="cuda", dtype=torch.bfloat16))
        back = there.wait()
        assert (back.device.type, back.dtype, back.shape) == ("cuda", torch.bfloat16, (3, 5))
    back = Offloaded(torch.zeros(3, 5, device="meta").t()).wait()
    assert back.is_meta and back.stride() == (1, 5)


def test_fake_tensors_take_no_host_memory_and_any_size():
    before = host_pool(CPU).held
    with FakeTensorMode(), LiveBytes() as live:
        watchers.append(live.move_to_host)
        try:
            x = torch.zeros(32, 16, 50_000, 50_000, dtype=torch.bfloat16)
            there = Offloaded(x, HostPool(limit=1))
            assert live.host == there.nbytes == live.now == 2 * 512 * 50_000**2
        finally:
            watchers.pop()
    assert host_pool(CPU).held == before


# Orders of calls, on a simulated device


class Device:
    """Streams whose work is done at random times, and memory that is handed out as CUDA's is.

    A kernel sees the memory as it is when it runs. A freed block is the next one's of the same
    stream at once; one that other streams were recorded on, when they come to where they were.
    """

    def __init__(self, seed: int):
        self.dice = random.Random(seed)
        self.main, self.other, self.side = (Stream() for _ in range(3))
        self.current = self.main
        self.memory: list[bytearray] = []
        self.owner: list[Stream] = []
        self.free: list[int] = []
        self.recorded: dict[int, set[Stream]] = {}
        self.waiting: list[tuple[int, list[Event]]] = []
        self.age: list[int] = []  # how often a block was handed out
        self.written: list[int] = []  # by which of its owners it was last
        self.wrong = 0
        self.reused = 0

    def new(self) -> Tensor:
        """A tensor of eight bytes, which its stream fills with -1 first."""
        ready = [n for n, events in self.waiting if all(event.done for event in events)]
        self.waiting = [each for each in self.waiting if each[0] not in ready]
        self.free += ready
        mine = [n for n in self.free if self.owner[n] is self.current]
        if mine:
            number = mine[-1]
            self.free.remove(number)
            self.reused += 1
        else:
            number = len(self.memory)
            self.memory.append(bytearray(8))
            self.owner.append(self.current)
            self.age.append(0)
            self.written.append(0)
        self.age[number] += 1
        self.recorded[number] = set()
        age = self.age[number]
        self.current.put(lambda: self.write(number, age, -1))
        x = torch.frombuffer(self.memory[number], dtype=torch.int64)
        weakref.finalize(x.untyped_storage(), self.freed, number).atexit = False
        return x

    def freed(self, number: int) -> None:
        if self.recorded[number]:
            events = [stream.record_event() for stream in self.recorded[number]]
            self.waiting.append((number, events))
        else:
            self.free.append(number)

    def number(self, x: Tensor) -> int | None:
        places = [torch.frombuffer(m, dtype=torch.uint8).data_ptr() for m in self.memory]
        return places.index(x.data_ptr()) if x.data_ptr() in places else None

    def write(self, number: int, age: int, value: int) -> None:
        self.written[number] = age
        self.memory[number][:] = value.to_bytes(8, "little", signed=True)

    def launch_write(self, x: Tensor, value: int) -> None:
        number = self.number(x)
        age = self.age[number]
        self.current.put(lambda: self.write(number, age, value))

    def launch_check(self, x: Tensor, value: int) -> None:
        number = self.number(x)

        def check():
            self.wrong += int.from_bytes(self.memory[number], "little", signed=True) != value

        self.current.put(check)

    def copy(self, to: Tensor, source: Tensor, stream: "Stream") -> None:
        a, b = self.number(to), self.number(source)

        number = b if a is None else a
        age = self.age[number]

        def run():  # holds the host's tensor, never the device's
            self.wrong += self.written[number] != age
            if a is None:
                host.copy_(torch.frombuffer(self.memory[b], dtype=torch.uint8))
            else:
                self.memory[a][:] = bytes(host.tolist())

        host = to if a is None else source
        del to, source
        stream.put(run)

    def run(self, steps: int) -> None:
        """Run that many pieces of work, of streams that are not waiting."""
        streams = [self.main, self.other, self.side]
        for _ in range(steps):
            able = [stream for stream in streams if stream.able()]
            if not able:
                return
            self.dice.choice(able).step()


class Event:
    done = False


class Stream:
    def __init__(self):
        self.work: deque = deque()

    def put(self, run) -> None:
        self.work.append(run)

    def record_event(self) -> Event:
        event = Event()
        self.work.append(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: Event) -> None:
        self.work.append(event)

    def able(self) -> bool:
        return bool(self.work) and (not isinstance(self.work[0], Event) or self.work[0].done)

    def step(self) -> None:
        work = self.work.popleft()
        if not isinstance(work, Event):
            work()


def simulated(device: Device, monkeypatch) -> None:
    """Let offloading from a CPU run on the simulated device."""
    lane = offload._Lane(device.side, HostPool())
    monkeypatch.setitem(offload._lanes, (CPU, False), lane)
    monkeypatch.setattr(offload, "_current_stream", lambda _: device.current)
    monkeypatch.setattr(offload, "_new", lambda *_: device.new())
    monkeypatch.setattr(offload, "_copy", device.copy)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda x, stream: device.recorded[device.number(x)].add(stream)
    )


def any_order(device: Device, calls: int) -> None:
    """Make, offload, fetch, read, release and drop tensors in any order, memory tight."""
    dice, there, count = device.dice, [], 0
    for _ in range(calls):
        device.current = device.main if dice.random() < 0.8 else device.other
        call = dice.choice("make make scratch settle prefetch read read release drop run".split())
        if call == "make" and len(there) < 6:
            count += 1
            x = device.new()
            device.launch_write(x, count)
            there.append((count, Offloaded(x)))
            del x
        elif call == "scratch":
            device.launch_write(device.new(), -2)
        elif call == "run":
            device.run(dice.randrange(12))
        elif there:
            value, each = dice.choice(there)
            if call == "read":
                device.launch_check(each.wait(), value)
            elif call == "drop":
                there.remove((value, each))
            elif call in ("settle", "prefetch", "release"):
                getattr(each, call)()
            del each
    device.current = device.main
    for value, each in there:
        device.launch_check(each.wait(), value)
    device.run(10**9)
    assert not (device.main.work or device.other.work or device.side.work)


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_calls_mixes_tensors_up(seed, monkeypatch):
    reused = 0
    for number in range(250):
        device = Device(1000 * seed + number)
        with monkeypatch.context() as patch:
            simulated(device, patch)
            any_order(device, 60)
            reused += device.reused
        assert device.wrong == 0, f"seed {1000 * seed + number}"
    assert reused > 2000  # else nothing was put to the test


class Deaf(Stream):
    """A stream that ignores some of what it is told to wait for."""

    def __init__(self, hears):
        super().__init__()
        self.hears = hears

    def wait_event(self, event: Event) -> None:
        if self.hears:
            super().wait_event(event)


@pytest.mark.parametrize("deaf", ["main", "side", "unrecorded"])
def test_the_simulation_finds_what_it_looks_for(deaf, monkeypatch):
    wrong = 0
    for seed in range(60):
        device = Device(seed)
        with monkeypatch.context() as patch:
            simulated(device, patch)
            if deaf == "unrecorded":
                patch.setattr(Tensor, "record_stream", lambda x, stream: None)
            else:
                stream = Deaf(hears=False)
                setattr(device, deaf, stream)
                if deaf == "side":
                    offload._lanes[CPU, False].stream = stream
                device.current = device.main
            any_order(device, 60)
        wrong += device.wrong
    assert wrong > 0


def test_memory_is_the_next_tensors_as_soon_as_it_is_settled(monkeypatch):
    """Though nothing has run yet: else Python, far ahead of the device, finds none free."""
    device = Device(0)
    simulated(device, monkeypatch)
    there = []
    for value in range(20):
        x = device.new()
        device.launch_write(x, value)
        there.append(Offloaded(x))
        del x
        for each in there[-2:-1]:
            each.settle()
    assert len(device.memory) == 2
    for value in reversed(range(20)):
        each = there.pop()
        device.launch_check(each.wait(), value)
        del each
    assert len(device.memory) == 2
    device.run(10**9)
    assert device.wrong == 0


# On a card

BUSY = 200_000_000  # cycles: about a tenth of a second
COUNT = 2**24


def spend() -> None:
    """Keep the current stream busy."""
    torch.cuda._sleep(BUSY)


@pytest.fixture
def empty_card() -> None:
    """No free blocks, so that of the blocks of one size that a test frees the next is known."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_host_memory_of_a_card_is_pinned_and_never_rounded_up():
    pool = HostPool()
    size = 2**27 + 2**20 + 12  # a power of two would be 2**28
    there = Offloaded(torch.ones(size, dtype=torch.uint8, device="cuda"), pool)
    assert pool.pinned and there._host.is_pinned()
    assert pool.held <= 1.02 * size
    assert bool(there.wait().all())
    del there
    pool.trim()
    assert pool.held == 0
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_the_copy_out_waits_for_who_writes_and_is_not_overtaken_by_who_reuses(empty_card):
    value = torch.randn(COUNT, device="cuda")
    for _ in range(10):
        x = torch.full_like(value, torch.nan)
        spend()
        x.copy_(value)
        place, there = x.data_ptr(), Offloaded(x)
        del x
        early = torch.full_like(value, torch.nan)  # not yet its memory
        assert early.data_ptr() != place
        there.settle()
        late = torch.full_like(value, torch.nan)
        assert late.data_ptr() == place  # though the device is still busy
        del early, late
        back = there.wait()
        assert torch.equal(back, value)


@pytest.mark.gpu
def test_the_copy_back_waits_for_who_had_the_memory_and_is_waited_for(empty_card):
    value = torch.randn(COUNT, device="cuda")
    there = Offloaded(value.clone())
    there.settle()
    for read in (True, False) * 5:
        old = torch.empty_like(value)
        place = old.data_ptr()
        spend()
        old.fill_(torch.nan)
        del old
        there.prefetch()
        assert there._back.data_ptr() == place
        if read:
            out = there.wait() + 0
            there.release()
            assert torch.equal(out, value)
            del out
        else:  # freed unread: what is written next must not be overwritten by the copy
            there.release()
            zeros = torch.zeros_like(value)
            assert zeros.data_ptr() == place
            there._side.synchronize()
            assert not bool(zeros.any())
            del zeros


@pytest.mark.gpu
def test_copies_run_beside_computation():
    x = torch.randn(COUNT, device="cuda")
    value = x.clone()
    there = Offloaded(x)
    spend()
    busy = torch.cuda.current_stream().record_event()
    there._copied.synchronize()
    assert not busy.query()  # out
    busy.synchronize()
    there.settle()
    there.prefetch()
    spend()
    busy = torch.cuda.current_stream().record_event()
    there._fetched.synchronize()
    assert not busy.query()  # back
    assert torch.equal(there.wait(), value)


@pytest.mark.gpu
def test_another_stream_may_read_what_comes_back():
    value = torch.randn(COUNT, device="cuda")
    other = torch.cuda.Stream()
    for _ in range(10):
        there = Offloaded(value.clone())
        there.prefetch()
        with torch.cuda.stream(other):
            back = there.wait()
            spend()
            out = back + 0
            del back
        there.release()
        poison = torch.full_like(value, torch.nan)  # on the stream whose memory it was
        other.synchronize()
        assert torch.equal(out, value)
        del poison, out


@pytest.mark.gpu
def test_fifty_steps_hold_what_the_second_held(empty_card):
    """Backward runs in autograd's own thread."""
    pool, held = HostPool(), []
    x = torch.randn(COUNT, device="cuda", requires_grad=True)
    want = None
    for _ in range(50):
        y = x
        for _ in range(8):
            y = Square.apply(y.cos(), pool)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        want = gradient if want is None else want
        assert torch.equal(gradient, want)
        del y, gradient
        held.append((torch.cuda.memory_reserved(), pool.held))
    assert len(set(held[1:])) == 1
    again = x.detach().requires_grad_()
    y = again
    for _ in range(8):
        y = y.cos()
        y = y * y
    assert torch.equal(torch.autograd.grad(y.sum(), again)[0], want)


@pytest.mark.gpu
def test_after_pinning_failed_the_next_launch_does_not_raise():
    assert offload._register(1, 2**20, torch.device("cuda", torch.cuda.current_device()))
    assert torch.ones(3, device="cuda").sum().item() == 3
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_memory_that_is_not_pinned_serves_as_well(monkeypatch):
    monkeypatch.setattr(offload, "_register", lambda *_: "no")
    value = torch.randn(COUNT, device="cuda")
    pool = HostPool()
    with pytest.warns(UserWarning, match="could not be pinned"):
        there = Offloaded(value.clone(), pool)
    for _ in range(2):
        assert torch.equal(there.wait(), value)
        there.release()
