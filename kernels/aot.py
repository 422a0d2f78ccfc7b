"""Compiling a kernel ahead of time, without its device, and reading what the compiler made."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.autotuner import Autotuner

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a program may take, which the compiler does not check: it only fails when launched.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
SPILL_LIMIT = 64  # bytes a thread: a few rarely used values, which L1 holds


@dataclass(frozen=True)
class Excuse:
    """Why variants of a kernel may take more than a limit of a target: up to `most` bytes.

    `what` is "spill_bytes" or "shared_bytes"; `where` a regular expression that the label of a
    variant (its constants, "C=16 ... warps=4 stages=3") has to match.
    """

    kernel: str
    target: str
    what: str
    most: int
    where: str
    reason: str


EXCUSES: list[Excuse] = [  # what ships beyond a limit, each with its reason
    *(
        Excuse(
            "conv2d_fwd_rows_kernel", target, "spill_bytes", 256, r"\bMAX_K=32\b",
            "all of 32 channels at once; the tuner times 16 beside it, which do not spill",
        )
        for target in ("sm_80", "sm_90")
    ),
    *(
        Excuse(
            "conv2d_dgrad_rows_kernel", target, "spill_bytes", most, r"\bMAX_N=32\b",
            "made for Hopper, which reads filters from shared memory; the tuner times it elsewhere",
        )
        for target, most in (("sm_80", 96), ("gfx942", 768))
    ),
    *(
        Excuse(
            "conv2d_dgrad_kernel", target, "spill_bytes", 1088, r"\bMAX_N=128\b",
            "the widest tile, for products with a short epilogue; the tuner times narrower ones",
        )
        for target in TARGETS
    ),
    *(
        Excuse(
            "conv2d_backward_rows_kernel", target, "spill_bytes", most,
            r"\b[CK]=(1[7-9]|2\d|3[0-2])\b.*\bVALUES=",
            "from 17 channels on the weight's sums fill the registers, and what waits is spilled; "
            "each tile is one target's, and the tuner times them all",
        )
        for target, most in (("sm_80", 7168), ("sm_90", 528), ("gfx942", 1152))
    ),
    Excuse(
        "conv2d_backward_rows_kernel", "gfx942", "spill_bytes", 128, r"\bwarps=8\b",
        "eight warps are for NVIDIA; the tuner times four beside them",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One kernel to compile: its runtime arguments' types, its constants, its configuration.

    `signature` maps runtime arguments to triton's type names ("*bf16", "i32"); `constexprs` holds
    the other arguments, a pointer that is None among them. All pointers, and the integers named in
    `divisible`, are taken to be multiples of 16, as triton finds them at launch; without that no
    load is wider than an element.
    """

    kernel: object
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    config: triton.Config
    divisible: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What one compiled variant takes of its target.

    Counts are of instructions in the program text, loops counted once. `spill_bytes` is a
    thread's stack on NVIDIA, its scratch memory on AMD; None where the tools that tell are absent
    (cuobjdump and nvdisasm come with triton).
    """

    kernel: str
    target: str
    warps: int
    shared_bytes: int
    registers: int | None = None
    spill_bytes: int | None = None
    wgmma: int | None = None  # Hopper's warp-group products
    mma_sync: int | None = None  # a warp's products
    mfma: int | None = None  # AMD's
    loads: int | None = None  # from global memory, of any width
    loads_16: int | None = None  # those of 16 bytes a lane
    async_copies: int | None = None  # those that go to shared memory by themselves
    stores_16: int | None = None
    compiled: CompiledKernel | None = field(default=None, repr=False, compare=False)

    def row(self) -> dict:
        """Return the figures as a flat dictionary, for a table."""
        return {name: value for name, value in vars(self).items() if name != "compiled"}


def compile_variant(variant: Variant, target: str) -> CompiledKernel:
    """Return the kernel compiled for a target of TARGETS; its `asm` holds every stage's text.

    Raises:
        ValueError: for an unknown target, or arguments that are not the kernel's.
        RuntimeError: under TRITON_INTERPRET=1, where kernels are not compilable functions.
    """
    if target not in TARGETS:
        raise ValueError(f"want target in {list(TARGETS)}, got {target!r}")
    fn = variant.kernel
    if isinstance(fn, Autotuner):
        fn = fn.fn
    if not isinstance(fn, triton.JITFunction):
        raise RuntimeError(f"want a jitted kernel (is TRITON_INTERPRET set?), got {type(fn)}")

    constexprs = {**variant.constexprs, **variant.config.kwargs}
    given, wanted = {*variant.signature, *constexprs}, set(fn.arg_names)
    if given != wanted:
        raise ValueError(
            f"{fn.__name__}: missing arguments {sorted(wanted - given)}, "
            f"unknown arguments {sorted(given - wanted)}"
        )
    signature = {name: variant.signature.get(name, "constexpr") for name in fn.arg_names}
    aligned = [k for k, v in signature.items() if v.startswith("*") or k in variant.divisible]
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    source = ASTSource(fn, signature, constexprs, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def report(variant: Variant, target: str) -> Report:
    """Return what a variant, compiled for a target of TARGETS, takes of it. Raises as compiling."""
    return report_of(compile_variant(variant, target), target)


def report_of(compiled: CompiledKernel, target: str) -> Report:
    """Return what a kernel that was compiled for this target takes of it."""
    figures = _nvidia(compiled) if "cubin" in compiled.asm else _amd(compiled.asm["amdgcn"])
    return Report(
        kernel=compiled.name,
        target=target,
        warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        compiled=compiled,
        **figures,
    )


def excess(report: Report) -> dict[str, int]:
    """Return the figures of a report that pass their limits, by name."""
    limits = {"spill_bytes": SPILL_LIMIT, "shared_bytes": SHARED_LIMIT[report.target]}
    figures = {name: getattr(report, name) or 0 for name in limits}
    return {name: figures[name] for name, limit in limits.items() if figures[name] > limit}


def excuse(report: Report, label: str, what: str) -> str:
    """Return the reason in EXCUSES for this excess of a variant; "" where there is none."""
    for known in EXCUSES:
        same = (known.kernel, known.target, known.what) == (report.kernel, report.target, what)
        if same and getattr(report, what) <= known.most and re.search(known.where, label):
            return known.reason
    return ""


def _nvidia(compiled: CompiledKernel) -> dict[str, int | None]:
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        try:
            usage = _output(tools.cuobjdump.path, "-res-usage", file.name)
            text = _output(tools.nvdisasm.path, "-c", file.name)
        except (OSError, RuntimeError):  # RuntimeError is how triton says that it has no such tool
            return {}
    wide = {"loads_16": r"LDG(STS)?\S*\.128", "stores_16": r"STG\S*\.128"}
    patterns = {"wgmma": "HGMMA", "mma_sync": "HMMA", "loads": "LDG", "async_copies": "LDGSTS"}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "mfma": 0,
        **{name: _count(rf"\b{pattern}", text) for name, pattern in (patterns | wide).items()},
    }


def _amd(text: str) -> dict[str, int]:
    def field_of(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    return {
        "registers": field_of("vgpr_count"),  # the accumulation registers included
        "spill_bytes": field_of("private_segment_fixed_size"),
        "wgmma": 0,
        "mma_sync": 0,
        "mfma": _count(r"\bv_mfma", text),
        "loads": _count(r"\b(global|buffer)_load", text),
        "loads_16": _count(r"\b(global|buffer)_load_dwordx4", text),
        "async_copies": _count(r"\b(global|buffer)_load\S*.*\blds\b", text),
        "stores_16": _count(r"\b(global|buffer)_store_dwordx4", text),
    }


def _count(pattern: str, text: str) -> int:
    return sum(1 for _ in re.finditer(pattern, text))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
