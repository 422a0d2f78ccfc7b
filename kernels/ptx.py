"""NVIDIA's PTX, read from a compiled kernel and turned into functions of numpy arrays.

A register holds one value of every thread: an array [threads] of unsigned integers of its width,
of bool for predicates. A basic block becomes a function of (S, R, I): S carries out what touches
memory or other threads (emulator.py), R are the registers, I the indices of the threads that are in
this block, None if all are. It returns those threads' predicate of the branch at its end, or None.

The instructions are those that triton makes of this package's kernels, for sm_80 and sm_90; others
are an error, with the instruction in its message. Rounding is that of the PTX manual (ISA 8.7);
approximate instructions (ex2, div.full) are computed exactly, and no product is joined with a sum
that the text keeps apart, as ptxas may.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NoReturn

import numpy as np

WIDTHS = {"pred": "b1", "8": "u1", "16": "u2", "32": "u4", "64": "u8"}
TYPES = {
    **{f"{kind}{8 * size}": f"{code}{size}" for size in (1, 2, 4, 8)
       for kind, code in (("s", "i"), ("u", "u"), ("b", "u"))},
    "f16": "f2", "f32": "f4", "f64": "f8", "pred": "b1", "bf16": "u2",
    "f16x2": "u4", "bf16x2": "u4", "s16x2": "u4", "u16x2": "u4", "tf32": "f4",
}  # fmt: skip
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.([xyz])|%(laneid)")
NAMES = {name: np.dtype(name).type for name in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")}
NAMES |= {"b1": np.bool_, "f2": np.float16, "f4": np.float32, "f8": np.float64}


@dataclass
class Instruction:
    """One statement: opcode in parts, operands as text, its guard ("%p1", "!%p1" or "")."""

    parts: list[str]
    operands: list[str]
    guard: str
    place: str  # in the kernel's source, "conv.py:314"
    text: str

    def has(self, *parts: str) -> bool:
        """Return whether one of these is a part of the opcode."""
        return any(part in self.parts for part in parts)


@dataclass
class Block:
    """Instructions that run one after another, the branch at their end among them."""

    start: int  # the number of its first instruction in the kernel
    instructions: list[Instruction] = field(default_factory=list)
    target: int | None = None  # the block that its branch leads to; None: it leaves the kernel
    ends: str = "falls"  # "falls" into the next, "jumps" always, "forks" by a predicate, "exits"

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each opcode occurs."""
        return Counter(".".join(made.parts) for made in self.instructions)


@dataclass
class Kernel:
    """A kernel's text: parameters as (name, type), basic blocks, registers' widths by name."""

    name: str
    parameters: list[tuple[str, str]]
    blocks: list[Block]
    registers: dict[str, str]
    threads: int
    functions: dict[tuple[int, bool], Callable] = field(default_factory=dict, repr=False)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The places of registers in R."""
        return {name: i for i, name in enumerate(self.registers)}

    @cached_property
    def joins(self) -> list[set[int]]:
        """For each block those that every path from it comes to, itself among them."""
        last = len(self.blocks)
        after = []
        for i, block in enumerate(self.blocks):
            falls = [i + 1] if block.ends in ("falls", "forks") else []
            after.append(falls + ([block.target] if block.target is not None else []))
        found = [set(range(last)) if after[i] else {i} for i in range(last)]
        changed = True
        while changed:
            changed = False
            for i in reversed(range(last)):
                if after[i]:
                    made = {i} | set.intersection(*(found[j] for j in after[i]))
                    changed |= made != found[i]
                    found[i] = made
        return found

    def first(self, waiting: Collection[int]) -> int:
        """Return which of these blocks runs next: one that no other's threads will come to."""
        if len(waiting) == 1:
            return next(iter(waiting))
        return min(b for b in waiting if not any(b in self.joins[w] for w in waiting if w != b))

    def function(self, block: int, partly: bool) -> Callable:
        """Return the function of a basic block, for all threads or for those of I alone."""
        if (block, partly) not in self.functions:
            made = _Translator(self, partly).function(self.blocks[block])
            self.functions[block, partly] = made
        return self.functions[block, partly]

    @cached_property
    def narrowest(self) -> int:
        """The bytes of the narrowest access to shared memory: at most 4."""
        widths = [
            int(TYPES[made.parts[-1]][1])
            for block in self.blocks
            for made in block.instructions
            if made.parts[0] in ("ld", "st") and made.has("shared", "shared:cta")
        ]
        return min([4, *widths])


def parse(text: str) -> Kernel:
    """Return the one kernel of a PTX text.

    Raises:
        ValueError: it holds none, or a statement that cannot be read.
    """
    places = _strip_comments(text)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", places, re.S)
    if not entry:
        raise ValueError("want PTX with a kernel (.entry), got a text without one")
    parameters = [
        (name, kind)
        for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", entry[2])
    ]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
    if not threads:
        raise ValueError(f"{entry[1]}: want its number of threads (.reqntid), got {entry[3]!r}")
    body = places[entry.end() :]
    body = body[: body.index("\n}")]

    registers: dict[str, str] = {}
    blocks, labels, place, number = [Block(0)], {}, "", 0
    for statement in re.split(r"[;\n]", _joined(body)):
        statement = statement.strip()
        while found := re.match(r"(\$?\w+):\s*", statement):
            if blocks[-1].instructions:
                blocks.append(Block(number))
            labels[found[1]] = len(blocks) - 1
            statement = statement[found.end() :]
        if found := re.match(r"\.loc\s+\d+\s+\d+.*?\x01(\S+:\d+)", statement):
            place = found[1]
            continue
        if found := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement):
            width = WIDTHS[re.sub(r"^[a-z]+(?=\d)", "", found[1])]
            for name in found[2].split(","):
                many = re.match(r"\s*([%\w]+)(?:<(\d+)>)?", name)
                names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many[2] else [many[1]]
                registers |= dict.fromkeys(names, width)
            continue
        if not statement or statement.startswith("."):
            continue
        made = _instruction(statement, place)
        blocks[-1].instructions.append(made)
        number += 1
        if made.parts[0] in ("bra", "ret", "exit"):
            exits = made.parts[0] != "bra"
            if exits and made.guard:
                raise ValueError(f"{entry[1]}: want no guarded exit, got {made.text!r}")
            blocks[-1].ends = "exits" if exits else "forks" if made.guard else "jumps"
            blocks.append(Block(number))
    if not blocks[-1].instructions:
        blocks.pop()
    for block in blocks:
        if block.ends in ("jumps", "forks"):
            block.target = labels[block.instructions[-1].operands[0]]
    return Kernel(entry[1], parameters, blocks, registers, int(threads[1]))


def _strip_comments(text: str) -> str:
    # .loc's comment names the place in the source; it survives, after a mark
    text = re.sub(r"(\.loc[^\n/]*)//\s*(\S+?:\d+)[^\n]*", "\\1\x01\\2", text)
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def _joined(body: str) -> str:
    """Return the text with the scopes of inline assembly opened; braces of operands stay."""
    body = re.sub(r"(^|[;\n])(\s*)\{(?=\s*(?:\.reg|[a-z@]))", r"\1\2", body)
    return re.sub(r"(?<=;)(\s*)\}", r"\1", body)


def _instruction(text: str, place: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([a-z]\w*(?:\.[\w:]+)*)\s*(.*)", text, re.S)
    if not found:
        raise ValueError(f"cannot read the instruction {text!r} ({place})")
    guard, opcode, rest = found.groups()
    operands, depth = [""], 0
    for letter in rest:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            operands.append("")
        else:
            operands[-1] += letter
    return Instruction(
        opcode.replace("::", ":").split("."),
        [o.strip() for o in operands if o.strip()],
        guard or "",
        place,
        text,
    )


class _Translator:
    """Python text of a block's instructions; `partly`: it is entered by the threads I alone."""

    def __init__(self, kernel: Kernel, partly: bool):
        self.kernel, self.partly = kernel, partly
        self.lines: list[str] = []
        self.constants: dict[str, object] = {}

    def function(self, block: Block) -> Callable:
        for i, made in enumerate(block.instructions):
            self.site = block.start + i
            self.instruction(made)
        if block.ends == "forks":
            guard = block.instructions[-1].guard
            self.lines.append(f"return {self.guard(guard)}")
        text = "def block(S, R, I):\n" + "".join(f"    {line}\n" for line in self.lines or ["pass"])
        scope = {"np": np, **NAMES, **HELPERS, **self.constants}
        exec(compile(text, f"<{self.kernel.name}, block at {block.start}>", "exec"), scope)
        return scope["block"]

    # Operands

    def width(self, operand: str) -> str:
        return self.kernel.registers[operand]

    def raw(self, operand: str) -> str:
        return f"R[{self.kernel.numbers[operand]}]" + ("[I]" if self.partly else "")

    def value(self, operand: str, kind: str) -> str:
        """Return the text of an operand as an array, or number, of numpy's type `kind`."""
        if operand in self.kernel.registers:
            width = self.width(operand)
            if width == kind:
                return self.raw(operand)
            if np.dtype(width).itemsize == np.dtype(kind).itemsize:
                return f"{self.raw(operand)}.view({kind})"
            return f"{self.raw(operand)}.astype(u{kind[1]}).view({kind})"  # its low bits, or zeros
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", operand):
            bits = np.uint32(int(found[1], 16)) if found[1] else np.uint64(int(found[2], 16))
            number = bits.view(np.float32 if found[1] else np.float64)
            return self.constant(number if kind[0] == "f" else bits)
        if found := SPECIAL.fullmatch(operand):
            return f"S.special({(found[1] or found[3])!r}, {found[2]!r}, I).view({kind})"
        if operand == "global_smem":
            return f"{kind}(0)"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0)
            if kind == "b1":
                return repr(number != 0)
            size = np.dtype(kind).itemsize
            bits = (number % (1 << 8 * size)).to_bytes(size, "little")
            return self.constant(np.frombuffer(bits, NAMES[kind])[0])
        raise NotImplementedError(f"operand {operand!r} of {self.made.text!r}")

    def constant(self, number: object) -> str:
        name = f"K{len(self.constants)}"
        self.constants[name] = number
        return name

    def guard(self, guard: str) -> str:
        name = guard.lstrip("!")
        return f"~{self.raw(name)}" if guard.startswith("!") else self.raw(name)

    def address(self, operand: str) -> str:
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not found:
            raise NotImplementedError(f"address {operand!r} of {self.made.text!r}")
        base, offset = found[1], int(found[2] or "0", 0)
        if base == "global_smem":
            return f"S.filled(i8({offset}), I)"
        wide = self.value(base, "u8" if self.kernel.registers.get(base) == "u8" else "u4")
        return f"{wide}.astype(i8) + {offset}" if offset else f"{wide}.astype(i8)"

    def names(self, operand: str) -> list[str]:
        return [name.strip() for name in operand.strip("{} ").split(",")]

    def assign(self, operand: str, text: str, kind: str) -> None:
        """Write an array of numpy's type `kind` into a register, where the guard allows."""
        if operand == "_":
            return
        width = self.width(operand)
        if np.dtype(width).itemsize != np.dtype(kind).itemsize:  # widened as its type says
            text = f"({text}).astype({('i' if kind[0] == 'i' else 'u') + width[1]})"
            kind = "i" + width[1] if kind[0] == "i" else width
        if kind != width:
            text = f"({text}).view({width})"
        register = f"R[{self.kernel.numbers[operand]}]"
        if self.made.guard:
            text = f"np.where({self.guard(self.made.guard)}, {text}, {self.raw(operand)})"
        if self.partly:
            self.lines.append(f"{register} = merged({register}, I, {text})")
        else:
            self.lines.append(f"{register} = {text}")

    # Instructions

    def instruction(self, made: Instruction) -> None:
        self.made = made
        base = made.parts[0]
        if base in ("bra", "ret", "exit"):
            return
        handler = getattr(self, f"do_{base}", None)
        if base in _BINARY or base in _UNARY:
            handler = self.arithmetic
        if handler is None:
            self.refuse()
        if made.has("sat", "satfinite", "relu", "xorsign", "cc"):
            self.refuse()
        try:
            handler(made)
        except KeyError as unknown:  # a type, a form, or a register of one
            raise NotImplementedError(f"{unknown} of {made.text!r} ({made.place})") from None

    def refuse(self) -> NoReturn:
        raise NotImplementedError(f"instruction {self.made.text!r} ({self.made.place})")

    def arithmetic(self, made: Instruction) -> None:
        kind, name = made.parts[-1], made.parts[0]
        target, *operands = made.operands
        if name in ("max", "min") and made.has("NaN"):
            name += "_nan"
        if kind.endswith("x2") or kind in ("bf16", "f16"):
            values = ", ".join(self.value(o, TYPES[kind].replace("f", "u")) for o in operands)
            self.assign(
                target, f"packed({name!r}, {kind!r}, {values})", TYPES[kind].replace("f", "u")
            )
            return
        code = TYPES[kind]
        form = (_BINARY | _UNARY)[name]
        if isinstance(form, dict):
            form = form[code[0]]
        values = {"abc"[i]: self.value(o, code) for i, o in enumerate(operands)}
        self.assign(target, form.format(**values, t=code), code)

    def do_mul(self, made: Instruction) -> None:
        self.product(made, None)

    def do_mad(self, made: Instruction) -> None:
        self.product(made, made.operands[3])

    def product(self, made: Instruction, addend: str | None) -> None:
        target, a, b = made.operands[:3]
        kind = TYPES[made.parts[-1]]
        if kind[0] == "f" or "f16" in made.parts[-1]:
            name = "times" if addend is None else "fma"
            self.arithmetic(replace(made, parts=[name, *made.parts[1:]]))
            return
        wide = f"{kind[0]}{2 * int(kind[1])}"
        text = f"{self.value(a, kind)} * {self.value(b, kind)}"
        if made.has("wide"):
            text = f"{self.value(a, kind)}.astype({wide}) * {self.value(b, kind)}"
            kind = wide
        elif made.has("hi") and kind == "u8":
            text = f"upper({self.value(a, kind)}, {self.value(b, kind)})"
        elif made.has("hi") and kind == "i8":
            self.refuse()
        elif made.has("hi"):
            both = f"{self.value(a, kind)}.astype({wide}) * {self.value(b, kind)}"
            text = f"(({both}) >> {8 * int(kind[1])}).astype({kind})"
        if addend is not None:
            text = f"{text} + {self.value(addend, kind)}"
        self.assign(target, text, kind)

    def do_mov(self, made: Instruction) -> None:
        target, source = made.operands
        kind = TYPES[made.parts[-1]]
        if target.startswith("{"):
            names = self.names(target)
            part = f"u{int(kind[1]) // len(names)}"
            whole = self.value(source, kind)
            for i, name in enumerate(names):
                self.assign(
                    name, f"({whole} >> {kind}({8 * i * int(part[1])})).astype({part})", part
                )
        elif source.startswith("{"):
            names = self.names(source)
            part = f"u{int(kind[1]) // len(names)}"
            words = [
                f"({self.value(name, part)}.astype({kind}) << {kind}({8 * i * int(part[1])}))"
                for i, name in enumerate(names)
            ]
            self.assign(target, " | ".join(words), kind)
        else:
            text = self.value(source, kind)
            if source not in self.kernel.registers and not source.startswith("%"):
                text = f"S.filled({text}, I)"
            self.assign(target, text, kind)

    def do_selp(self, made: Instruction) -> None:
        target, a, b, p = made.operands
        kind = TYPES[made.parts[-1]]
        text = f"np.where({self.value(p, 'b1')}, {self.value(a, kind)}, {self.value(b, kind)})"
        self.assign(target, text, kind)

    def do_setp(self, made: Instruction) -> None:
        target, a, b, *third = made.operands
        kind = made.parts[-1]
        if "f16" in kind:  # one or two of them in a register, a predicate each
            compared = _ORDERED[made.parts[1]]
            whole = TYPES[kind].replace("f", "u")
            for i, name in enumerate(target.split("|")):
                parts = {
                    n: f"widened(({self.value(o, whole)} >> {whole}({16 * i})).astype(u2), "
                    f"{kind.removesuffix('x2')!r})"
                    for n, o in (("a", a), ("b", b))
                }
                self.assign(name.strip(), f"({compared.format(**parts)})", "b1")
            return
        kind = TYPES[kind]
        compared = (_ORDERED if kind[0] == "f" else _COMPARED)[made.parts[1]]
        text = f"({compared.format(a=self.value(a, kind), b=self.value(b, kind))})"
        if third:
            sign = {"and": "&", "or": "|", "xor": "^"}[made.parts[2]]
            text = f"{text} {sign} {self.value(third[0], 'b1')}"
        self.assign(target, text, "b1")

    def do_shl(self, made: Instruction) -> None:
        self.shift(made, "<<")

    def do_shr(self, made: Instruction) -> None:
        self.shift(made, ">>")

    def shift(self, made: Instruction, sign: str) -> None:
        target, a, by = made.operands
        kind = TYPES[made.parts[-1]]
        self.assign(
            target, f"shifted({self.value(a, kind)}, {self.value(by, 'u4')}, {sign!r})", kind
        )

    def do_bfe(self, made: Instruction) -> None:
        target, a, start, length = made.operands
        kind = TYPES[made.parts[-1]]
        bits = 8 * int(kind[1])
        if start in self.kernel.registers or length in self.kernel.registers:
            self.refuse()
        start, length = int(start, 0), int(length, 0)
        if not 0 < length <= bits - start:
            self.refuse()
        up = f"({self.value(a, kind)} << {kind}({bits - start - length}))"
        self.assign(target, f"{up} >> {kind}({bits - length})", kind)

    def do_prmt(self, made: Instruction) -> None:
        target, a, b, selector = made.operands
        if made.parts != ["prmt", "b32"]:
            self.refuse()
        values = ", ".join(self.value(o, "u4") for o in (a, b, selector))
        self.assign(target, f"permuted({values})", "u4")

    def do_lop3(self, made: Instruction) -> None:
        target, a, b, c, table = made.operands
        values = ", ".join(self.value(o, "u4") for o in (a, b, c))
        self.assign(target, f"looked_up({values}, {int(table, 0)})", "u4")

    def do_cvt(self, made: Instruction) -> None:
        target, *sources = made.operands
        to, of = made.parts[-2:]
        rounding = next(
            (r for r in ("rzi", "rni", "rmi", "rpi", "rz", "rna", "rn") if made.has(r)), ""
        )
        if to in ("bf16x2", "f16x2"):
            high, low = (f"rounded({self.value(s, 'f4')}, {to[:-2]!r})" for s in sources)
            self.assign(target, f"({high}.astype(u4) << 16) | {low}", "u4")
            return
        if rounding == "rz":
            self.refuse()
        kind = TYPES[of]
        source = self.value(sources[0], kind)
        if of == "bf16":
            source, kind = f"({source}.astype(u4) << 16).view(f4)", "f4"
        if to in ("bf16", "f16", "tf32"):
            if kind != "f4":
                self.refuse()
            self.assign(target, f"rounded({source}, {to!r})", "f4" if to == "tf32" else "u2")
            return
        into = TYPES[to]
        if kind[0] == "f" and into[0] != "f":
            text = f"to_integer({source}, {rounding!r}, {into})"
        elif rounding in ("rzi", "rni", "rmi", "rpi"):
            text = f"{_TO_INTEGRAL[rounding]}({source})"
        else:
            text = f"({source}).astype({into})"
        self.assign(target, text, into)

    # Memory and other threads: S carries them out, each with the number of its instruction

    def do_ld(self, made: Instruction) -> None:
        target, source = made.operands
        kind = TYPES[made.parts[-1]]
        names = self.names(target)
        if made.has("param"):
            name = source.strip("[] ")
            number = [p for p, _ in self.kernel.parameters].index(name)
            self.assign(names[0], f"S.parameter({number}, {kind}, I)", kind)
            return
        space = "shared" if made.has("shared", "shared:cta") else "global"
        guard = self.guard(made.guard) if made.guard else "None"
        self.lines.append(
            f"T = S.load_{space}({self.address(source)}, u{kind[1]}, {len(names)}, {guard}, I, "
            f"{self.site})"
        )
        for i, name in enumerate(names):
            self.assign(name, f"T[{i}].view({kind})", kind)

    def do_st(self, made: Instruction) -> None:
        target, source = made.operands
        kind = "u" + TYPES[made.parts[-1]][1]
        space = "shared" if made.has("shared", "shared:cta") else "global"
        guard = self.guard(made.guard) if made.guard else "None"
        values = ", ".join(f"S.filled({self.value(name, kind)}, I)" for name in self.names(source))
        self.lines.append(
            f"S.store_{space}({self.address(target)}, [{values}], {kind}, {guard}, I, {self.site})"
        )

    def do_cp(self, made: Instruction) -> None:
        guard = self.guard(made.guard) if made.guard else "None"
        if made.has("commit_group"):
            self.lines.append("S.copies.commit(I)")
        elif made.has("wait_group"):
            self.lines.append(f"S.copies.wait({int(made.operands[0])}, I)")
        elif made.has("wait_all"):
            self.lines += ["S.copies.commit(I)", "S.copies.wait(0, I)"]
        elif made.parts[:2] == ["cp", "async"] and made.parts[2] in ("ca", "cg"):
            to, of, size, *read = made.operands
            read = self.value(read[0], "u4") if read else f"u4({size})"
            places = f"{self.address(to)}, {self.address(of)}"
            self.lines.append(f"S.copy({places}, {int(size, 0)}, {read}, {guard}, I, {self.site})")
        else:
            self.refuse()

    def do_atom(self, made: Instruction) -> None:
        target, address, value = made.operands
        if made.parts[1:] != ["shared", "add", "u32"]:
            self.refuse()
        guard = self.guard(made.guard) if made.guard else "None"
        value = f"S.filled({self.value(value, 'u4')}, I)"
        self.lines.append(
            f"T = S.add_shared({self.address(address)}, {value}, {guard}, I, {self.site})"
        )
        self.assign(target, "T", "u4")

    def do_bar(self, made: Instruction) -> None:
        if made.has("warp"):
            self.lines.append(f"S.whole(32, I, {self.site})")
        elif made.parts == ["bar", "sync"] and made.operands == ["0"]:
            self.lines.append(f"S.barrier(I, {self.site})")
        else:
            self.refuse()

    def do_fence(self, made: Instruction) -> None:
        if made.has("proxy"):
            self.lines.append(f"S.fence(I, {self.site})")

    def do_shfl(self, made: Instruction) -> None:
        target, a, by, clamp, members = made.operands
        if members not in ("-1", "0xffffffff"):  # whoever is named has to be here
            self.refuse()
        values = ", ".join(self.value(o, "u4") for o in (a, by, clamp))
        self.lines.append(f"T, P = S.shuffle({made.parts[2]!r}, {values}, I, {self.site})")
        target, _, valid = target.partition("|")
        self.assign(target, "T", "u4")
        if valid:
            self.assign(valid, "P", "b1")

    def do_vote(self, made: Instruction) -> None:
        target, held, members = made.operands
        if members not in ("-1", "0xffffffff"):
            self.refuse()
        kind = "u4" if made.has("ballot") else "b1"
        self.lines.append(
            f"T = S.vote({made.parts[2]!r}, {self.value(held, 'b1')}, I, {self.site})"
        )
        self.assign(target, "T", kind)

    def do_ldmatrix(self, made: Instruction) -> None:
        names = self.names(made.operands[0])
        address, transposed = self.address(made.operands[1]), made.has("trans")
        self.lines.append(
            f"T = S.load_matrix({address}, {len(names)}, {transposed}, I, {self.site})"
        )
        for i, name in enumerate(names):
            self.assign(name, f"T[{i}]", "u4")

    def do_stmatrix(self, made: Instruction) -> None:
        values = ", ".join(self.value(name, "u4") for name in self.names(made.operands[1]))
        self.lines.append(
            f"S.store_matrix({self.address(made.operands[0])}, [{values}], {made.has('trans')}, I, "
            f"{self.site})"
        )

    def do_mma(self, made: Instruction) -> None:
        d, *sources = map(self.names, made.operands)
        shape = next(p for p in made.parts if re.fullmatch(r"m\d+n\d+k\d+", p))
        kinds = made.parts[-4:]
        a, b, c = (", ".join(self.value(name, "u4") for name in s) for s in sources)
        if kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] != kinds[2]:
            self.refuse()
        self.lines.append(
            f"T = S.mma({shape!r}, {kinds[1]!r}, [{a}], [{b}], [{c}], I, {self.site})"
        )
        for i, name in enumerate(d):
            self.assign(name, f"T[{i}]", "f4")

    def do_wgmma(self, made: Instruction) -> None:
        if made.has("fence"):
            self.lines.append(f"S.whole(128, I, {self.site})")
        elif made.has("commit_group"):
            self.lines.append("S.products.commit(I)")
        elif made.has("wait_group"):
            self.lines.append(f"S.wait_products({int(made.operands[0])}, I, {self.site})")
        else:
            self.product_of_groups(made)

    def product_of_groups(self, made: Instruction) -> None:
        d, a, b, keep, *signs = made.operands
        shape = next(p for p in made.parts if re.fullmatch(r"m\d+n\d+k\d+", p))
        kinds = made.parts[-3:]
        if kinds[0] != "f32" or kinds[1] != kinds[2] or [int(s) for s in signs[:2]] != [1, 1]:
            self.refuse()
        order = [int(s) for s in signs[2:]]
        if a.startswith("{"):
            left = "[" + ", ".join(self.value(name, "u4") for name in self.names(a)) + "]"
            order = [0, *order]
        else:
            left = self.value(a, "u8")
        order = (order + [0, 0])[:2]
        names = self.names(d)
        sums = ", ".join(self.value(name, "f4") for name in names)
        kept = self.value(keep, "b1")
        self.lines.append(
            f"T = S.wgmma({shape!r}, {kinds[1]!r}, {left}, {self.value(b, 'u8')}, [{sums}], "
            f"{kept}, {order}, I, {self.site})"
        )
        for i, name in enumerate(names):
            self.assign(name, f"T[{i}]", "f4")


_BINARY = {
    "add": "{a} + {b}", "sub": "{a} - {b}", "times": "{a} * {b}",
    "and": "{a} & {b}", "or": "{a} | {b}", "xor": "{a} ^ {b}",
    "div": {"i": "divided({a}, {b})[0]", "u": "divided({a}, {b})[0]", "f": "{a} / {b}"},
    "rem": "divided({a}, {b})[1]",
    "min": {"i": "np.minimum({a}, {b})", "u": "np.minimum({a}, {b})", "f": "np.fmin({a}, {b})"},
    "max": {"i": "np.maximum({a}, {b})", "u": "np.maximum({a}, {b})", "f": "np.fmax({a}, {b})"},
    "min_nan": "np.minimum({a}, {b})", "max_nan": "np.maximum({a}, {b})",
    "fma": "fused({a}, {b}, {c})",
    "copysign": "np.copysign({b}, {a})",
}  # fmt: skip
_UNARY = {
    "neg": "-{a}", "abs": "np.abs({a})", "not": "~{a}", "sqrt": "np.sqrt({a})",
    "rsqrt": "{t}(1) / np.sqrt({a})", "rcp": "{t}(1) / {a}",
    "ex2": "np.exp2({a}.astype(f8)).astype({t})", "lg2": "np.log2({a}.astype(f8)).astype({t})",
    "tanh": "np.tanh({a}.astype(f8)).astype({t})",
    "popc": "np.bitwise_count({a}).astype(u4)",
}  # fmt: skip
_COMPARED = {
    "eq": "{a} == {b}", "ne": "{a} != {b}",
    "lt": "{a} < {b}", "le": "{a} <= {b}", "gt": "{a} > {b}", "ge": "{a} >= {b}",
    "lo": "{a} < {b}", "ls": "{a} <= {b}", "hi": "{a} > {b}", "hs": "{a} >= {b}",
}  # fmt: skip
_ORDERED = {
    "eq": "{a} == {b}", "ne": "({a} < {b}) | ({a} > {b})",
    "lt": "{a} < {b}", "le": "{a} <= {b}", "gt": "{a} > {b}", "ge": "{a} >= {b}",
    "equ": "~(({a} < {b}) | ({a} > {b}))", "neu": "{a} != {b}",
    "ltu": "~({a} >= {b})", "leu": "~({a} > {b})", "gtu": "~({a} <= {b})", "geu": "~({a} < {b})",
    "num": "~(np.isnan({a}) | np.isnan({b}))", "nan": "np.isnan({a}) | np.isnan({b})",
}  # fmt: skip
_TO_INTEGRAL = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}


# What the translated text calls. Arrays in, arrays out.


def merged(old: np.ndarray, threads: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return the register `old` with the threads' new values; others may share its memory."""
    made = old.copy()
    made[threads] = new
    return made


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c, rounded once from float64 (where that rounds too: a second time)."""
    if a.dtype == np.float64:
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(np.float32)


def divided(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return quotient, towards zero, and remainder of integers; by zero all ones and a."""
    ones = a.dtype.type(-1 if a.dtype.kind == "i" else np.iinfo(a.dtype).max)
    by = np.where(b == 0, a.dtype.type(1), b)
    quotient = a // by
    rest = a - quotient * by
    if a.dtype.kind == "i":
        quotient = quotient + ((rest != 0) & ((a < 0) != (by < 0)))
    quotient = quotient.astype(a.dtype)
    return np.where(b == 0, ones, quotient), np.where(b == 0, a, a - quotient * by)


def upper(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the upper half of the 128 bits of products of unsigned integers."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    cross = (a >> half) * (b & low), (a & low) * (b >> half)
    carry = ((a & low) * (b & low) >> half) + (cross[0] & low) + (cross[1] & low)
    return (a >> half) * (b >> half) + (cross[0] >> half) + (cross[1] >> half) + (carry >> half)


def shifted(a: np.ndarray, by: np.ndarray, sign: str) -> np.ndarray:
    """Return a << by or a >> by, where shifts past the width leave zeros, or the sign."""
    bits = 8 * a.dtype.itemsize
    past = by >= bits
    least = np.minimum(by, np.uint32(bits - 1)).astype(a.dtype)
    if sign == "<<":
        return np.where(past, a.dtype.type(0), a << least)
    made = a >> least
    return made if a.dtype.kind == "i" else np.where(past, a.dtype.type(0), made)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Return four of the eight bytes of a and b, each picked, or its sign spread, by 4 bits."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    made = np.uint32(0)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (pick & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(pick & np.uint32(8), sign, byte).astype(np.uint32)
        made = made | (byte << np.uint32(8 * i))
    return made


def looked_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Return the bits of a, b and c joined by a truth table of three inputs."""
    made = np.uint32(0)
    for i in range(8):
        if table >> i & 1:
            made = made | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return made


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """Return float32 rounded to bf16 or f16, wrapped to 16 bits, or, as float32, to tf32."""
    if kind in ("s16", "u16"):
        return x.astype(np.int32).astype(np.uint16)
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    if kind == "tf32":  # ties go away from zero
        made = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        return np.where(np.isfinite(x), made, bits).view(np.float32)
    even = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), even).astype(np.uint16)


def widened(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return bf16, f16 or integers of 16 bits, given as bits, in float32."""
    if kind in ("s16", "u16"):
        return bits.view(np.int16 if kind == "s16" else np.uint16).astype(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_integer(x: np.ndarray, rounding: str, into: type) -> np.ndarray:
    """Return floats as integers, held at the ends of their range.

    NaN becomes zero, or the highest bit alone where 64 bits are read or written.
    """
    whole = getattr(np, _TO_INTEGRAL[rounding].removeprefix("np."))(x.astype(np.float64))
    ends = np.iinfo(into)
    top = np.nextafter(np.float64(ends.max), 0) if ends.bits == 64 else np.float64(ends.max)
    made = np.clip(np.nan_to_num(whole, nan=0.0), np.float64(ends.min), top).astype(into)
    made = np.where(whole >= np.float64(ends.max), into(ends.max), made)
    if ends.bits == 64 or x.dtype == np.float64:
        made = np.where(np.isnan(x), into(ends.min or 1 << ends.bits - 1), made)
    return made


def packed(name: str, kind: str, *operands: np.ndarray) -> np.ndarray:
    """Return one or two 16-bit numbers a register, added, subtracted, multiplied or compared."""
    half = kind.removesuffix("x2")
    parts = [
        [widened((o >> o.dtype.type(16 * i)).astype(np.uint16), half) for o in operands]
        for i in range(2 if kind.endswith("x2") else 1)
    ]
    # float32 has more than twice their bits, and two, so rounding twice is rounding once
    form = {
        "add": np.add, "sub": np.subtract, "times": np.multiply, "fma": fused, "neg": np.negative,
        "abs": np.abs, "min": np.fmin, "max": np.fmax, "min_nan": np.minimum, "max_nan": np.maximum,
    }[name]  # fmt: skip
    made = [rounded(form(*p), half) for p in parts]
    return made[0] if len(made) == 1 else made[0] | (made[1].astype(np.uint32) << np.uint32(16))


HELPERS = {
    f.__name__: f
    for f in (
        merged,
        fused,
        divided,
        upper,
        shifted,
        permuted,
        looked_up,
        rounded,
        widened,
        to_integer,
        packed,
    )  # fmt: skip
}
