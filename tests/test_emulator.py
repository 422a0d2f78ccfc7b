"""The emulator computes what PTX says, and refuses what a device leaves undefined."""

import math
import mmap
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fullres.kernels import emulator, ptx  # noqa: E402
from fullres.kernels.emulator import EmulationError, emulated  # noqa: E402

TARGETS = ["sm_80", "sm_90"]
NAN, INF = math.nan, math.inf


def kernel_of(body: str, pointers: int = 1, threads: int = 32) -> ptx.Kernel:
    """A kernel of hand-written lines, each its own place in "made.py".

    %x0, %x1, ... are its arguments, %t the thread's number, %c the program's.
    """
    parameters = ", ".join(f".param .u64 p{i}" for i in range(pointers))
    loads = "\n".join(f"ld.param.u64 %x{i}, [p{i}];" for i in range(pointers))
    lines = "\n".join(
        f"\t.loc 1 {i} 0 // made.py:{i}:0\n{line}" for i, line in enumerate(body.splitlines())
    )
    return ptx.parse(f"""
        .entry made({parameters}) .reqntid {threads} {{
        .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %d<9>;
        .reg .b64 %x<9>; .reg .b32 %t; .reg .b32 %c;
        {loads}
        mov.u32 %t, %tid.x;
        mov.u32 %c, %ctaid.x;
        {lines}
        ret;
\n}}""")


def run(
    body: str, *tensors: torch.Tensor, threads=32, programs=1, shared=0, count=False
) -> emulator.Counts:
    counts = emulator.Counts()
    kernel = kernel_of(body, len(tensors), threads)
    every = [(i, 0, 0) for i in range(programs)]
    emulator.run(kernel, tensors, (programs, 1, 1), every, shared, counts, count)
    return counts


def applied(text: str, *operands: np.ndarray, result: str) -> np.ndarray:
    """What %z is after instructions on %a, %b and %c, of one value a thread; numpy's types."""
    threads = -(-len(operands[0]) // 32) * 32
    given = [np.resize(o, threads) for o in operands]
    made = np.zeros(threads, result)
    lines = []
    for i, (name, array) in enumerate(zip("abcz", [*given, made], strict=False)):
        name = name if i < len(given) else "z"
        lines += [
            f".reg .b{8 * array.itemsize} %{name};",
            f"mad.wide.u32 %d{i}, %t, {array.itemsize}, %x{i};",
        ]
        if name != "z":
            lines.append(f"ld.global.b{8 * array.itemsize} %{name}, [%d{i}];")
    lines += [text, f"st.global.b{8 * made.itemsize} [%d{len(given)}], %z;"]
    run("\n".join(lines), *map(torch.from_numpy, [*given, made]), threads=threads)
    return made[: len(operands[0])]


def pairs(values: list, kind: str, other: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Each of the values with each."""
    a, b = np.meshgrid(values_of(values, kind), values_of(values, other or kind), indexing="ij")
    return a.ravel(), b.ravel()


def values_of(values: list, kind: str) -> np.ndarray:
    if kind.startswith("f"):
        return np.array(values, kind)
    return np.array([v % (1 << 8 * int(kind[1])) for v in values], kind)


# Instructions. What is wanted is said in Python's integers, of any length, and torch's floats.


def signed(x: int, bits: int) -> int:
    return (x & ((1 << bits) - 1)) - ((x >> (bits - 1) & 1) << bits)


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 255, -1, -2, -7, 2**15, 2**31 - 1, 2**31, 2**31 + 1, 0x9E3779B9]
INTEGERS = {  # instruction: bits of a, b and the result; whether a and b are signed; what is wanted
    "add.s32": (32, 32, 32, True, lambda a, b: a + b),
    "add.u64": (64, 64, 64, False, lambda a, b: a + b),
    "add.s16": (16, 16, 16, True, lambda a, b: a + b),
    "sub.s32": (32, 32, 32, True, lambda a, b: a - b),
    "mul.lo.s32": (32, 32, 32, True, lambda a, b: a * b),
    "mul.lo.s64": (64, 64, 64, True, lambda a, b: a * b),
    "mul.hi.u32": (32, 32, 32, False, lambda a, b: a * b >> 32),
    "mul.hi.s32": (32, 32, 32, True, lambda a, b: a * b >> 32),
    "mul.hi.u64": (64, 64, 64, False, lambda a, b: a * b >> 64),
    "mul.wide.s32": (32, 32, 64, True, lambda a, b: a * b),
    "mul.wide.u32": (32, 32, 64, False, lambda a, b: a * b),
    "mul.wide.s16": (16, 16, 32, True, lambda a, b: a * b),
    "div.s32": (32, 32, 32, True, quotient),
    "div.u32": (32, 32, 32, False, quotient),
    "div.s64": (64, 64, 64, True, quotient),
    "rem.s32": (32, 32, 32, True, lambda a, b: a - quotient(a, b) * b),
    "rem.u32": (32, 32, 32, False, lambda a, b: a - quotient(a, b) * b),
    "shl.b32": (32, 32, 32, False, lambda a, b: a << b if b < 32 else 0),
    "shl.b64": (64, 32, 64, False, lambda a, b: a << b if b < 64 else 0),
    "shr.u32": (32, 32, 32, False, lambda a, b: a >> b if b < 32 else 0),
    "shr.u16": (16, 32, 16, False, lambda a, b: a >> b if b < 16 else 0),
    "min.s32": (32, 32, 32, True, min),
    "min.u32": (32, 32, 32, False, min),
    "max.s64": (64, 64, 64, True, max),
    "max.u16": (16, 16, 16, False, max),
    "and.b32": (32, 32, 32, False, lambda a, b: a & b),
    "or.b64": (64, 64, 64, False, lambda a, b: a | b),
    "xor.b16": (16, 16, 16, False, lambda a, b: a ^ b),
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integers_wrap_at_their_width(instruction):
    of, by, to, is_signed, wanted = INTEGERS[instruction]
    a, b = pairs(EDGES, f"u{of // 8}", f"u{by // 8}")
    if instruction.startswith(("div", "rem")):
        a, b = a[b != 0], b[b != 0]
    got = applied(f"{instruction} %z, %a, %b;", a, b, result=f"u{to // 8}")
    x, y = ([int(v) for v in values] for values in (a, b))
    if is_signed:
        x, y = [signed(v, of) for v in x], [signed(v, by) for v in y]
    assert got.tolist() == [wanted(*v) % (1 << to) for v in zip(x, y, strict=True)]


def test_shifts_of_signed_integers_spread_the_sign():
    a, b = pairs(EDGES, "u4")
    got = applied("shr.s32 %z, %a, %b;", a, b, result="u4")
    wanted = [signed(int(x), 32) >> min(int(y), 32) & 0xFFFFFFFF for x, y in zip(a, b, strict=True)]
    assert got.tolist() == wanted


def test_products_add_in_the_width_of_their_result():
    a, b = pairs(EDGES, "u4")
    got = applied("mad.lo.s32 %z, %a, %b, %a;", a, b, result="u4")
    assert got.tolist() == [(int(x) * int(y) + int(x)) % 2**32 for x, y in zip(a, b, strict=True)]
    c = values_of([2**63 - 1], "u8")
    got = applied("mad.wide.s32 %z, %a, %b, %c;", a, b, np.resize(c, len(a)), result="u8")
    wanted = [signed(int(x), 32) * signed(int(y), 32) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == [(w + 2**63 - 1) % 2**64 for w in wanted]


@pytest.mark.parametrize(
    ("text", "wanted"),
    {
        "not.b32 %z, %a;": lambda a: ~a,
        "neg.s32 %z, %a;": lambda a: -a,
        "abs.s32 %z, %a;": lambda a: abs(signed(a, 32)),
        "popc.b32 %z, %a;": lambda a: a.bit_count(),
        "bfe.u32 %z, %a, 5, 7;": lambda a: a >> 5 & 127,
        "bfe.s32 %z, %a, 5, 7;": lambda a: signed(a >> 5, 7),
        "bfe.u32 %z, %a, 31, 1;": lambda a: a >> 31,
        "cvt.u16.u32 %h1, %a; cvt.s32.s16 %z, %h1;": lambda a: signed(a, 16),
        "cvt.s32.s8 %z, %a;": lambda a: signed(a, 8),
        "cvt.u32.u8 %z, %a;": lambda a: a & 255,
        "cvt.s64.s32 %d7, %a; shr.u64 %d7, %d7, 16; cvt.u32.u64 %z, %d7;": lambda a: (
            signed(a, 32) >> 16
        ),
        "cvt.u64.u32 %d7, %a; shl.b64 %d7, %d7, 8; shr.u64 %d7, %d7, 32; cvt.u32.u64 %z, %d7;": (
            lambda a: a >> 24
        ),
        "mov.b32 {%h1, %h2}, %a; mov.b32 %z, {%h2, %h1};": lambda a: a << 16 | a >> 16,
        "mov.b64 %d7, {%a, 0}; mov.b64 {_, %r1}, %d7; add.u32 %z, %r1, 5;": lambda a: 5,
        "setp.lt.s32 %p1, %a, 2; selp.b32 %z, 3, -4, %p1;": lambda a: (
            3 if signed(a, 32) < 2 else -4
        ),
        "setp.lo.u32 %p1, %a, 2; selp.b32 %z, 3, %a, %p1;": lambda a: 3 if a < 2 else a,
        "setp.ne.b32 %p1, %a, 7; setp.gt.and.u32 %p2, %a, 2, %p1; not.pred %p3, %p2; "
        "selp.b32 %z, 1, 0, %p3;": lambda a: int(not (a > 2 and a != 7)),
        "mov.u32 %z, 9; setp.eq.s32 %p1, %a, 7; @%p1 mov.u32 %z, 1; @!%p1 add.u32 %z, %z, 1;": (
            lambda a: 1 if a == 7 else 10
        ),
        "cvt.rn.f32.u32 %f1, %a; cvt.rzi.u32.f32 %z, %f1;": lambda a: min(
            int(struct.unpack("f", struct.pack("f", a))[0]), 2**32 - 1
        ),
        "cvt.rn.f32.s32 %f1, %a; mov.b32 %z, %f1;": lambda a: struct.unpack(
            "I", struct.pack("f", signed(a, 32))
        )[0],
    }.items(),
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_instructions_of_one_integer(text, wanted):
    a = values_of(EDGES, "u4")
    got = applied(text, a, result="u4")
    assert got.tolist() == [wanted(int(v)) % 2**32 for v in a]


def test_bytes_are_picked_and_their_signs_spread():
    rng = np.random.default_rng(1)
    a, b, c = rng.integers(0, 2**32, (3, 64), np.uint32)

    def wanted(a, b, selector):
        both = struct.pack("<II", a, b)
        picks = [selector >> 4 * i & 15 for i in range(4)]
        made = [both[p & 7] if p < 8 else 255 * (both[p & 7] >> 7) for p in picks]
        return int.from_bytes(bytes(made), "little")

    got = applied("prmt.b32 %z, %a, %b, %c;", a, b, c, result="u4")
    assert got.tolist() == [wanted(*map(int, v)) for v in zip(a, b, c, strict=True)]


@pytest.mark.parametrize(
    ("table", "wanted"),
    {
        0x96: lambda a, b, c: a ^ b ^ c,
        0xE8: lambda a, b, c: a & b | b & c | a & c,
        0xCA: lambda a, b, c: a & b | ~a & c,
        0x2A: lambda a, b, c: c & ~(a & b),
    }.items(),
)
def test_three_inputs_are_joined_by_a_table(table, wanted):
    a, b, c = np.random.default_rng(1).integers(0, 2**32, (3, 32), np.uint32)
    got = applied(f"lop3.b32 %z, %a, %b, %c, {table};", a, b, c, result="u4")
    assert got.tolist() == [wanted(*map(int, v)) % 2**32 for v in zip(a, b, c, strict=True)]


FLOATS = [0.0, -0.0, 1.0, -1.5, 3.0, 1e-40, 1e38, -3e38, INF, -INF, NAN, 0.1, 65519.0, 65520.0]
TIES = [1 + n * 2.0**-k for n in (1, 3, 5, 7) for k in (8, 9, 11, 12)] + [2.0**-25, 3 * 2.0**-25]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_rounding_to_16_bits_breaks_ties_to_even(kind):
    a = values_of(FLOATS + TIES + [-x for x in TIES], "f4")
    got = torch.from_numpy(applied(f"cvt.rn.{kind}.f32 %z, %a;", a, result="i2"))
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    assert torch.equal(got.view(dtype).isnan(), torch.from_numpy(a).isnan())
    numbers = ~torch.from_numpy(a).isnan()
    assert torch.equal(got[numbers], torch.from_numpy(a).to(dtype).view(torch.int16)[numbers])
    # two at once: the first operand is the upper half
    b = a[::-1].copy()
    both = torch.from_numpy(applied(f"cvt.rn.{kind}x2.f32 %z, %a, %b;", a, b, result="i4"))
    halves = both.view(torch.int16).reshape(-1, 2)
    assert torch.equal(halves[:, 1], got) and torch.equal(halves[:, 0], got.flip(0))
    # and back
    wide = applied(f"cvt.f32.{kind} %z, %a;", got.numpy(), result="f4")
    assert np.array_equal(wide, got.view(dtype).float().numpy(), equal_nan=True)


def test_tf32_ties_go_away_from_zero():
    a = values_of([1 + n * 2.0**-11 for n in range(4)] + [-1 - 2.0**-11, 1 + 2.0**-12], "f4")
    wanted = [1, 1 + 2.0**-10, 1 + 2.0**-10, 1 + 2.0**-9, -1 - 2.0**-10, 1]
    assert applied("cvt.rna.tf32.f32 %z, %a;", a, result="f4").tolist() == wanted


def test_floats_become_integers_as_asked_and_stay_in_range():
    a = values_of([2.5, 3.5, -2.5, -2.7, 1e10, -1e10, INF, -INF, NAN], "f4")
    ends = [2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 0]
    for rounding, wanted in {
        "rzi": [2, 3, -2, -2], "rni": [2, 4, -2, -3], "rmi": [2, 3, -3, -3], "rpi": [3, 4, -2, -2],
    }.items():  # fmt: skip
        got = applied(f"cvt.{rounding}.s32.f32 %z, %a;", a, result="i4")
        assert got.tolist() == wanted + ends
        got = applied(f"cvt.{rounding}.f32.f32 %z, %a;", a[:4], result="f4")
        assert got.tolist() == wanted
    got = applied("cvt.rzi.s64.f32 %z, %a;", a, result="i8")
    assert got.tolist()[4:] == [10**10, -(10**10), 2**63 - 1, -(2**63), -(2**63)]


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_comparisons_with_nan_are_false_or_unordered(name, kind):
    def holds(a, b):
        return getattr(torch, name)(a, b) & ~a.isnan() & ~b.isnan()  # ne, too

    dtype = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16,
             "bf16": torch.bfloat16}[kind]  # fmt: skip
    a, b = (torch.from_numpy(v).to(dtype) for v in pairs(FLOATS, "f4"))
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[a.element_size()]
    raw = [v.view(torch.uint8).numpy().view(bits) for v in (a, b)]
    for form, wanted in {
        name: holds(a, b),
        f"{name}u": holds(a, b) | a.isnan() | b.isnan(),
    }.items():
        text = f"setp.{form}.{kind} %p1, %a, %b; selp.b32 %z, 1, 0, %p1;"
        assert applied(text, *raw, result="u4").tolist() == wanted.int().tolist(), form


def test_maxima_pass_nan_or_do_not():
    a, b = pairs(FLOATS, "f4")
    for name, least in (("min", np.minimum), ("max", np.maximum)):
        either = np.isnan(a) | np.isnan(b)
        got = applied(f"{name}.NaN.f32 %z, %a, %b;", a, b, result="f4")
        assert np.array_equal(np.isnan(got), either)
        assert np.array_equal(got[~either], least(a, b)[~either])
        got = applied(f"{name}.f32 %z, %a, %b;", a, b, result="f4")
        wanted = np.where(np.isnan(a), b, np.where(np.isnan(b), a, least(a, b)))
        assert np.array_equal(got, wanted, equal_nan=True)


def test_a_fused_product_rounds_once():
    a = values_of([1 + 2.0**-12, 0.1, 1 / 3, 1e15, -7.7], "f4")
    text = "mul.f32 %f1, %a, %a; neg.f32 %f1, %f1; fma.rn.f32 %z, %a, %a, %f1;"
    exact = [Fraction(float(x)) ** 2 for x in a]
    rounded = [Fraction(struct.unpack("f", struct.pack("f", float(x)))[0]) for x in exact]
    rest = applied(text, a, result="f4")
    assert rest.tolist() == [float(x - y) for x, y in zip(exact, rounded, strict=True)]
    assert rest[0] == 2.0**-24


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma.rn", "max", "max.NaN", "min.NaN"])
def test_two_16_bit_floats_of_a_register_do_not_touch(name, kind):
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    rng = torch.Generator().manual_seed(1)
    a, b, c = torch.randn(3, 96, 2, generator=rng).to(dtype)
    a[0, 0], b[1, 1], a[2, 1] = NAN, NAN, INF
    x, y, z = a.double(), b.double(), c.double()
    wanted = {
        "add": x + y, "sub": x - y, "mul": x * y, "fma.rn": x * y + z, "max": torch.fmax(x, y),
        "max.NaN": torch.maximum(x, y), "min.NaN": torch.minimum(x, y),
    }[name].to(dtype)  # fmt: skip
    raw = [v.view(torch.int32).flatten().numpy() for v in (a, b, c)][: 3 if "fma" in name else 2]
    operands = ", ".join(["%z", "%a", "%b", "%c"][: len(raw) + 1])
    got = torch.from_numpy(applied(f"{name}.{kind}x2 {operands};", *raw, result="i4"))
    got = got.view(dtype).reshape(-1, 2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "kind"), [("add", "s16"), ("add", "u16"), ("min", "s16"),
                                           ("max", "u16")])  # fmt: skip
def test_two_16_bit_integers_of_a_register_do_not_touch(name, kind):
    a, b = np.random.default_rng(1).integers(0, 2**32, (2, 64), np.uint32)
    x, y = (v.view({"s16": np.int16, "u16": np.uint16}[kind]) for v in (a, b))
    wanted = {"add": np.add, "min": np.minimum, "max": np.maximum}[name](x, y)
    got = applied(f"{name}.{kind}x2 %z, %a, %b;", a, b, result="u4")
    assert np.array_equal(got.view(wanted.dtype), wanted)


LANES = list(range(32))
SHUFFLES = {  # mode, by, clamp: which lane each reads, and whether it is a lane of its segment
    "up-by-1": ("up", 1, 0, [max(i - 1, 0) for i in LANES], [i > 0 for i in LANES]),
    "down-by-3": (
        "down", 3, 31, [i + 3 if i < 29 else i for i in LANES], [i < 29 for i in LANES],
    ),
    "down-by-8-in-segments-of-16": (
        "down", 8, 0x100F, [i + 8 if i % 16 < 8 else i for i in LANES],
        [i % 16 < 8 for i in LANES],
    ),
    "up-by-8-in-segments-of-16": (
        "up", 8, 0x1000, [i - 8 if i % 16 >= 8 else i for i in LANES],
        [i % 16 >= 8 for i in LANES],
    ),
    "butterfly-16": ("bfly", 16, 31, [(i + 16) % 32 for i in LANES], [True] * 32),
    "butterfly-past-its-clamp": (
        "bfly", 1, 14, [i ^ 1 if i ^ 1 <= 14 else i for i in LANES], [i ^ 1 <= 14 for i in LANES],
    ),
    "index-5": ("idx", 5, 31, [5] * 32, [True] * 32),
    "index-5-of-8": ("idx", 5, 0x181F, [i // 8 * 8 + 5 for i in LANES], [True] * 32),
}  # fmt: skip


@pytest.mark.parametrize("case", SHUFFLES)
def test_shuffles_read_other_lanes_up_to_a_clamp(case):
    mode, by, clamp, lanes, valid = SHUFFLES[case]
    a = np.arange(100, 164, dtype=np.uint32)
    text = f"shfl.sync.{mode}.b32 %r1|%p1, %a, {by}, {clamp}, -1;"
    got = applied(f"{text} mov.u32 %z, %r1;", a, result="u4")
    assert got.tolist() == [100 + i for i in lanes] + [132 + i for i in lanes]
    got = applied(f"{text} selp.b32 %z, 1, 0, %p1;", a, result="u4")
    assert got.tolist() == 2 * list(map(int, valid))


def test_a_warp_votes():
    a = values_of([int(i % 3 == 0 or i > 40) for i in range(96)], "u4")
    text = "setp.ne.u32 %p1, %a, 0; vote.sync.ballot.b32 %z, %p1, -1;"
    wanted = [sum(int(v) << i for i, v in enumerate(a[32 * w :][:32])) for w in range(3)]
    assert applied(text, a, result="u4").tolist() == np.repeat(wanted, 32).tolist()
    text = "setp.ne.u32 %p1, %a, 0; vote.sync.all.pred %p2, %p1, -1; selp.b32 %z, 1, 0, %p2;"
    assert applied(text, a, result="u4").tolist() == np.repeat([0, 0, 1], 32).tolist()


def test_addresses_have_64_bits():
    x = torch.arange(64, dtype=torch.int32)
    y = torch.zeros(32, dtype=torch.int32)
    run(
        """mul.wide.s32 %d1, %t, 4;
        add.s64 %d2, %x0, %d1;
        ld.global.b32 %r1, [%d2+128];
        mul.wide.s32 %d3, %t, -4;
        add.s64 %d3, %x1, %d3;
        st.global.b32 [%d3+124], %r1;""",
        x, y,
    )  # fmt: skip
    assert y.tolist() == x[32:].flip(0).tolist()


def test_threads_that_part_meet_again():
    """Each runs a loop of its own length, some a branch, and then all of them shuffle."""
    y = torch.zeros(64, dtype=torch.int32)
    run(
        """mov.u32 %r1, 0;
        mov.u32 %r2, 0;
        LOOP: setp.ge.u32 %p1, %r1, %t;
        @%p1 bra DONE;
        add.u32 %r2, %r2, %r1;
        add.u32 %r1, %r1, 1;
        bra LOOP;
        DONE: and.b32 %r3, %t, 1;
        setp.eq.u32 %p2, %r3, 0;
        @%p2 bra EVEN;
        neg.s32 %r2, %r2;
        bra BOTH;
        EVEN: add.u32 %r2, %r2, 1000;
        BOTH: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;
        bar.sync 0;
        mad.wide.u32 %d1, %t, 4, %x0;
        st.global.b32 [%d1], %r4;""",
        y, threads=64,
    )  # fmt: skip
    sums = [i * (i - 1) // 2 * (-1 if i % 2 else 1) + (0 if i % 2 else 1000) for i in range(64)]
    assert y.tolist() == [sums[i ^ 1] for i in range(64)]


@pytest.mark.parametrize(
    "text",
    [
        "sin.approx.f32 %f1, %f1;", "add.sat.s32 %r1, %r1, %r1;", 
        "cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f1;",
        "bar.sync 1, 64;", "bfe.u32 %r1, %r1, %r2, 3;", "atom.global.add.f32 %f1, [%x0], %f1;",
        "shfl.sync.idx.b32 %r1, %r1, 0, 31, 65535;", "mul.hi.s64 %d1, %d1, %d1;",
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_with_its_place(text):
    with pytest.raises(NotImplementedError, match=r"made\.py:0"):
        run(text, torch.zeros(1))


# Faults. A line marked "fault" is there only in the kernel that is refused, one marked "remedy"
# only in its twin that passes; "here" is the line that the refusal names.


def fill_operands(fence: str) -> str:
    """Zeros for a product of 64 x 16 at byte 0 with 8 x 16 at byte 2048, of 16 bits."""
    return f"""
        mul.lo.u32 %r1, %t, 16;
        st.shared.v4.b32 [%r1], {{0, 0, 0, 0}};
        st.shared.v4.b32 [%r1+2048], {{0, 0, 0, 0}};
        fence.proxy.async.shared::cta; {fence}
        bar.sync 0;
        mov.b64 %d1, 0x0000000800400000;
        mov.b64 %d2, 0x0000000800080080;
        mov.pred %p1, 0;"""


PRODUCT = """wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d1, %d2, %p1, """
PRODUCT += "1, 1, 0, 0;"
COPY = "cp.async.cg.shared.global [%r1], [%d1], 16;"
OWN = "mul.lo.u32 %r1, %t, 16;\n mad.wide.u32 %d1, %t, 16, %x0;\n"
FAULTS = {  # text, what the refusal says, threads, programs
    "no-barrier-between-write-and-read": (
        """shl.b32 %r1, %t, 2;
        xor.b32 %r2, %r1, 128;
        st.shared.b32 [%r1], %t;
        bar.sync 0; // remedy
        ld.shared.b32 %r3, [%r2]; // here""",
        "warp 0 reads shared byte 128, which warp 1 wrote since the last barrier", 64, 1,
    ),
    "no-barrier-between-read-and-write": (
        """shl.b32 %r1, %t, 2;
        xor.b32 %r2, %r1, 128;
        st.shared.b32 [%r1], %t;
        bar.sync 0;
        ld.shared.b32 %r3, [%r2];
        bar.sync 0; // remedy
        st.shared.b32 [%r1], %r3; // here""",
        "warp 0 writes shared byte 0, which warp 1 read since the last barrier", 64, 1,
    ),
    "a-warps-barrier-does-not-order-two": (
        """shl.b32 %r1, %t, 2;
        xor.b32 %r2, %r1, 128;
        st.shared.b32 [%r1], %t;
        bar.warp.sync -1; // fault
        bar.sync 0; // remedy
        ld.shared.b32 %r3, [%r2]; // here""",
        "warp 0 reads shared byte 128, which warp 1 wrote", 64, 1,
    ),
    "additions-meet-a-read": (
        """mov.u32 %r1, 0;
        atom.shared.add.u32 %r2, [%r1], 1;
        bar.sync 0; // remedy
        ld.shared.b32 %r3, [%r1]; // here""",
        "warp 0 reads shared byte 0, which an addition wrote", 64, 1,
    ),
    "one-warp-is-not-at-the-barrier": (
        """setp.lt.u32 %p1, %t, 32;
        @%p1 bra AFTER;
        bar.sync 0; // here fault
        AFTER: mov.u32 %r1, 1;
        bar.sync 0; // remedy""",
        "only some of 64 threads", 64, 1,
    ),
    "half-a-warp-shuffles": (
        """setp.lt.u32 %p1, %t, 16;
        mov.u32 %r1, 3;
        @%p1 bra AFTER; // fault
        shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1; // here
        AFTER: mov.u32 %r2, %r1;""",
        "only some of 32 threads", 32, 1,
    ),
    "a-copy-is-read-before-it-is-waited-for": (
        OWN + COPY + """
        cp.async.commit_group;
        cp.async.wait_group 0; // remedy
        ld.shared.b32 %r2, [%r1]; // here""",
        "reads shared byte 0, which a copy that is not waited for writes", 32, 1,
    ),
    "the-last-group-may-be-on-its-way": (
        OWN + COPY + """
        cp.async.commit_group;
        cp.async.wait_group 1; // fault
        cp.async.wait_all; // remedy
        ld.shared.b32 %r2, [%r1]; // here""",
        "which a copy that is not waited for writes", 32, 1,
    ),
    "what-no-group-has-is-not-waited-for": (
        OWN + COPY + """
        cp.async.commit_group; // remedy
        cp.async.wait_group 0;
        ld.shared.b32 %r2, [%r1]; // here""",
        "which a copy that is not waited for writes", 32, 1,
    ),
    "threads-that-part-commit-for-themselves-alone": (
        OWN + COPY + """
        setp.ge.u32 %p1, %t, 32;
        @%p1 bra AFTER; // fault
        cp.async.commit_group;
        AFTER: cp.async.wait_group 0;
        ld.shared.b32 %r2, [%r1]; // here""",
        "warp 1 reads shared byte 512, which a copy that is not waited for writes", 64, 1,
    ),
    "groups-are-counted-for-each-thread": (
        OWN + """
        setp.ge.u32 %p1, %t, 32;
        @%p1 bra AFTER;
        cp.async.cg.shared.global [%r1+2048], [%d1], 16;
        cp.async.commit_group;
        AFTER: """ + COPY + """
        cp.async.commit_group;
        cp.async.wait_group 1;
        @!%p1 ld.shared.b32 %r2, [%r1+2048];
        cp.async.wait_group 0; // remedy
        ld.shared.b32 %r2, [%r1]; // here""",
        "warp 0 reads shared byte 0, which a copy that is not waited for writes", 64, 1,
    ),
    "a-copy-is-written-over": (
        OWN + COPY + """
        cp.async.commit_group;
        cp.async.wait_group 0; // remedy
        st.shared.b32 [%r1], %t; // here""",
        "writes shared byte 0, which a copy that is not waited for writes", 32, 1,
    ),
    "each-waits-for-its-own-copies-alone": (
        OWN + COPY + """
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0; // remedy
        xor.b32 %r2, %r1, 512;
        ld.shared.b32 %r3, [%r2]; // here""",
        "warp 0 reads shared byte 512, which warp 1 wrote", 64, 1,
    ),
    "a-copy-into-what-a-product-reads": (
        fill_operands("") + "\n" + PRODUCT + """
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0; // remedy
        bar.sync 0; // remedy
        mad.wide.u32 %d1, %t, 16, %x0;
        """ + COPY + " // here",
        "writes shared byte 0, which a product that is not waited for reads", 128, 1,
    ),
    "a-product-reads-what-no-fence-made-visible": (
        fill_operands("// remedy") + "\n" + PRODUCT + " // here",
        "no fence has made visible", 128, 1,
    ),
    "past-the-end": (
        """mad.wide.u32 %d1, %t, 16, %x0;
        ld.global.b32 %r1, [%d1+16]; // here fault
        ld.global.b32 %r1, [%d1+12]; // remedy""",
        "thread 255 of program 0: 4 bytes at", 256, 1,
    ),
    "before-the-begin": (
        """mad.wide.u32 %d1, %t, 4, %x0;
        st.global.b32 [%d1+-4], %t; // here fault
        st.global.b32 [%d1], %t; // remedy""",
        "thread 0 of program 0: 4 bytes at", 32, 1,
    ),
    "past-the-end-of-shared-memory": (
        """mul.lo.u32 %r1, %t, 64;
        st.shared.b32 [%r1+68], %t; // here fault
        st.shared.b32 [%r1+64], %t; // remedy""",
        "thread 63 of program 0: 4 bytes at 4100 of 4100 shared bytes", 64, 1,
    ),
    "a-vector-off-its-alignment": (
        """mad.wide.u32 %d1, %t, 8, %x0;
        ld.global.v2.b32 {%r1, %r2}, [%d1+4]; // here fault
        ld.global.v2.b32 {%r1, %r2}, [%d1+8]; // remedy""",
        "is no multiple of 8", 32, 1,
    ),
    "two-programs-write-one-element": (
        """mad.wide.u32 %d1, %c, 4, %x0;
        st.global.b32 [%x0+4], 7; // here fault
        st.global.b32 [%d1], 7; // remedy""",
        "two programs write one element", 32, 2,
    ),
    "a-later-program-writes-what-another-wrote": (
        """mov.u32 %r1, %c; // remedy
        and.b32 %r1, %c, 3; // fault
        mad.wide.u32 %d1, %r1, 4, %x0;
        st.global.b32 [%d1], 7; // here""",
        "program 4 writes element 0 of a tensor", 1024, 5,
    ),
    "a-program-reads-what-another-writes": (
        """mad.wide.u32 %d1, %c, 4, %x0;
        st.global.b32 [%d1], 7;
        ld.global.b32 %r1, [%d1+4]; // here fault
        ld.global.b32 %r1, [%d1]; // remedy""",
        "program 0 reads element 1 of a tensor", 32, 2,
    ),
    "a-program-writes-what-another-has-read": (
        """mad.wide.u32 %d1, %c, 4, %x0;
        ld.global.b32 %r1, [%d1+4]; // fault
        ld.global.b32 %r1, [%d1]; // remedy
        st.global.b32 [%d1], 7; // here""",
        "program 1 writes element 1 of a tensor", 32, 2,
    ),
    "threads-write-different-values": (
        """st.global.b32 [%x0], %t; // here fault
        st.global.b32 [%x0], 7; // remedy""",
        "two threads write different values into one element", 32, 1,
    ),
    "each-warps-last-thread-wins": (
        """mov.u32 %r1, 0;
        and.b32 %r2, %t, 31;
        mov.u32 %r2, %t; // fault
        st.shared.b32 [%r1], %r2; // here""",
        "two warps write different values into one shared byte", 64, 1,
    ),
    "warps-write-different-values-into-shared-memory": (
        """mov.u32 %r1, 0;
        st.shared.b32 [%r1], %t; // here fault
        st.shared.b32 [%r1], 7; // remedy""",
        "two warps write different values into one shared byte", 64, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_refused_at_its_place_and_its_twin_is_not(case):
    text, said, threads, programs = FAULTS[case]
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if "here" in line)

    def without(mark):  # an empty line in its place, so that places stay
        return "\n".join("" if mark in line.partition("//")[2] else line for line in lines)

    def go(body):
        x = torch.arange(1024, dtype=torch.int32)
        run(body, x, threads=threads, programs=programs, shared=4100)

    go(without("fault"))
    with pytest.raises(EmulationError) as refused:
        go(without("remedy"))
    message = str(refused.value)
    assert message.startswith(f"made, made.py:{place}: ") and said in message, message
    assert lines[place].partition(";")[0].split()[-1] in message  # the instruction itself


# Counts


@pytest.mark.parametrize(
    ("text", "turns"),
    {
        "shl.b32 %r1, %t, 2; ld.shared.b32 %r2, [%r1];": 1,
        "mov.u32 %r1, 8; ld.shared.b32 %r2, [%r1];": 1,
        "shl.b32 %r1, %t, 3; ld.shared.b32 %r2, [%r1];": 2,
        "shl.b32 %r1, %t, 7; ld.shared.b32 %r2, [%r1];": 32,
        "mul.lo.u32 %r1, %t, 132; ld.shared.b32 %r2, [%r1];": 1,
        "shl.b32 %r1, %t, 1; ld.shared.b16 %h2, [%r1];": 1,
        "mul.lo.u32 %r1, %t, 130; ld.shared.b16 %h2, [%r1];": 2,
        "shl.b32 %r1, %t, 3; ld.shared.v2.b32 {%r2, %r3}, [%r1];": 2,
        "shl.b32 %r1, %t, 4; ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];": 4,
        "shl.b32 %r1, %t, 7; ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1];": 32,
        "shl.b32 %r1, %t, 4; "
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];": 4,
        "shl.b32 %r1, %t, 7; ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r2, %r3}, [%r1];": 16,
    }.items(),
)
def test_shared_memory_serves_a_word_of_each_bank_a_turn(text, turns):
    counts = run(text, threads=32, shared=8192, count=True)
    assert counts.wavefronts["load"] == turns and counts.requests["shared load"] == 1
    assert run(text, threads=32, shared=8192).wavefronts == {}


@pytest.mark.parametrize(("apart", "sectors"), [(0, 1), (4, 4), (8, 8), (32, 32), (64, 32)])
def test_global_memory_is_read_in_pieces_of_32_bytes(apart, sectors):
    x = torch.zeros(2 * 32 * 64, dtype=torch.int8)
    shift = -x.data_ptr() % 32
    text = f"mad.wide.u32 %d1, %t, {apart}, %x0; ld.global.b32 %r1, [%d1+{shift}];"
    counts = run(text, x, count=True)
    assert counts.sectors["load"] == sectors and counts.requests["global load"] == 1
    assert counts.instructions["ld.global.b32"] == 1 and counts.programs == 1


# Kernels of triton, in both targets' instructions


@triton.jit
def dot_kernel(
    x_ptr, w_ptr, y_ptr, K,
    M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    X_TURNED: tl.constexpr, W_TURNED: tl.constexpr, CHANGED: tl.constexpr,
):  # fmt: skip
    """y = x @ w; x [M, K] lies as [K, M] if turned, w [K, N] as [N, K]."""
    offs_m, offs_n = tl.arange(0, M), tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BLOCK):
        offs_k = k + tl.arange(0, BLOCK)
        mask = offs_k < K
        if X_TURNED:
            offs = offs_k[:, None] * M + offs_m[None, :]
            x = tl.load(x_ptr + offs, mask=mask[:, None], other=0.0).T
        else:
            offs = offs_m[:, None] * K + offs_k[None, :]
            x = tl.load(x_ptr + offs, mask=mask[None, :], other=0.0)
        if W_TURNED:
            offs = offs_n[:, None] * K + offs_k[None, :]
            w = tl.load(w_ptr + offs, mask=mask[None, :], other=0.0).T
        else:
            offs = offs_k[:, None] * N + offs_n[None, :]
            w = tl.load(w_ptr + offs, mask=mask[:, None], other=0.0)
        if CHANGED:  # an operand that was computed: in registers, where the target lets it be
            x = tl.where(x > 0, x, 2 * x)
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc)


def assert_dot(target, dtype, M, N, K, block, *, turned=(False, False), changed=False, stages=2):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(M, K, generator=rng).to(dtype)
    w = torch.randn(K, N, generator=rng).to(dtype)
    y = torch.full((M, N), NAN)
    given = [t.T.contiguous() if turn else t for t, turn in zip((x, w), turned, strict=True)]
    with emulated(target) as made:
        dot_kernel[1,](*given, y, K, M, N, block, *turned, changed, num_stages=stages, num_warps=4)
    x, w = x.double(), w.double()
    if changed:
        x = torch.where(x > 0, x, 2 * x)
    # Operands enter exactly, or with 10 bits and what is cut off; sums are of float32.
    unit = 2.0**-9 if dtype == torch.float32 else K * 2.0**-23
    assert ((y - x @ w).abs() <= unit * (x.abs() @ w.abs())).all()
    counts = made.counts["dot_kernel"].instructions
    groups = target == "sm_90" and M >= 64
    assert any(name.startswith("wgmma.mma_async" if groups else "mma.") for name in counts)


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("turned", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_products_are_torchs_whichever_way_their_operands_lie(turned, dtype, target):
    assert_dot(target, dtype, 64, 32, 64, 32, turned=tuple(map(bool, turned)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("M", "N", "block"), [(16, 16, 16), (32, 64, 16), (128, 16, 64), (64, 128, 32)], ids=str
)
def test_products_are_torchs_in_any_tile(M, N, block, target):
    assert_dot(target, torch.bfloat16, M, N, 2 * block, block)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_an_operand_may_come_from_registers(dtype, target):
    assert_dot(target, dtype, 64, 16, 64, 32, changed=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stages", [1, 3, 4])
def test_a_loop_may_be_pipelined_and_end_ragged(stages, target):
    assert_dot(target, torch.float16, 64, 32, 5 * 32 - 8, 32, stages=stages)


@triton.jit
def branches_kernel(x_ptr, count_ptr, y_ptr, BLOCK: tl.constexpr):
    """Some programs take a branch, and each runs a loop as often as its count says."""
    pid = tl.program_id(0)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if pid % 2 == 0:
        x = tl.cumsum(x)
    for i in range(tl.load(count_ptr + pid)):
        x = x * 3 + i
        if tl.sum(x) > 1000:
            x = x * 0.5
    tl.store(y_ptr + offs, x)


@pytest.mark.parametrize("target", TARGETS)
def test_programs_branch_and_loop_each_its_own_way(target):
    x = torch.arange(9 * 64.0).reshape(9, 64) % 5  # sums are exact
    count = torch.tensor([0, 3, 1, 0, 7, 2, 2, 11, 5], dtype=torch.int32)
    y = torch.empty_like(x)
    with emulated(target):
        branches_kernel[9,](x, count, y, 64)
    for i, row in enumerate(x):
        row = row.cumsum(0) if i % 2 == 0 else row
        for n in range(count[i]):
            row = row * 3 + n
            row = row * 0.5 if row.sum() > 1000 else row
        assert torch.equal(row, y[i])


@triton.jit
def shifted_copy_kernel(x_ptr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """x[program + 1] = 2 x[program], in rows of BLOCK."""
    pid = tl.program_id(0)
    offs = (pid.to(tl.int64) if WIDE else pid) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs + BLOCK, 2 * tl.load(x_ptr + offs))


@pytest.mark.parametrize("target", TARGETS)
def test_offsets_pass_two_to_the_31_or_are_refused(target):
    """The memory is never touched but in one place, so that it costs none."""
    block, elements = 1024, 2**31 + 2**16
    no_reserve = 0x4000  # Linux's; Python 3.13 has a name for it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    x = torch.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), dtype=torch.int16)
    pid = 2**31 // block + 5
    x[pid * block :][:block] = torch.arange(block)

    with emulated(target, programs=lambda grid: [(pid, 0, 0)]) as made:
        shifted_copy_kernel[elements // block - 1,](x, block, True)
    assert torch.equal(x[(pid + 1) * block :][:block], 2 * torch.arange(block, dtype=torch.int16))
    assert made.counts["shifted_copy_kernel"].programs == 1
    with (
        emulated(target, programs=lambda grid: [(pid, 0, 0)]),
        pytest.raises(
            EmulationError, match=r"shifted_copy_kernel, test_emulator\.py:\d+: thread 0"
        ),
    ):
        shifted_copy_kernel[elements // block - 1,](x, block, False)


@triton.jit
def double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=mask, other=0), mask=mask)


def test_overlapping_views_are_one_memory():
    """A program reads through one what another writes through the other."""
    x = torch.arange(256, dtype=torch.int32)
    with emulated("sm_80"):
        double_kernel[2,](x[:128], x[128:], 128, 64)  # beside each other
        assert torch.equal(x[128:], 2 * x[:128])
        with pytest.raises(EmulationError, match="program 0 writes element 64 .* read by 1"):
            double_kernel[2,](x[:192], x[64:], 192, 64)


def test_numbers_odd_sizes_and_empty_tensors_pass_as_arguments():
    for n in (0, 1, 77):
        x, y = torch.arange(80, dtype=torch.int16)[:n], torch.zeros(n, dtype=torch.int16)
        with emulated("sm_90"):
            double_kernel[2,](x, y, n, 64)
        assert torch.equal(y, 2 * x)


def test_other_targets_are_refused_and_a_fault_leaves_triton_as_it_was():
    with pytest.raises(ValueError, match="^target: want .*; got 'sm_75'"), emulated("sm_75"):
        pass
    run_before = triton.runtime.jit.JITFunction.run
    with pytest.raises(EmulationError, match="double_kernel"), emulated("sm_90"):
        double_kernel[1,](torch.zeros(4), torch.zeros(4), 5, 64)
    assert triton.runtime.jit.JITFunction.run is run_before
