"""From a traced graph to segments: which layers fuse, and which values are written out between.

A graph of torch.fx is read once, in its order. Convolutions become steps of a program; what stands
between them - batch normalisation, activation, residual sum, 2 x 2 pooling, bilinear enlargement,
concatenation - becomes the source through which a later step reads. A value is written out where
several nodes use it, or one that does not fuse. Steps are then gathered into segments, whose calls
take the steps' place in the graph; every other node stays as it was.

A graph may also be read as a whole, for a plan, which decides what is kept step by step: then
torch's own operators without effect become steps too, and steps are gathered as far as their order
allows.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..ops.batch_norm import SyncBatchNorm
from ..ops.geometry import DTYPES
from ..ops.program import Call, Conv, Norm, Program, Source, Term, Write, cheap, closing
from ..ops.segment import run, run_whole
from . import apart, calls

POLICIES = ("keep", "closing", "series")
WHOLE = "whole"  # the policy of a network that is read for a plan
RUNNERS = "_fullres"  # the attribute of a converted module that holds its programs

# Values and steps, before they have numbers


@dataclass(eq=False)
class Cell:
    """An image in memory: what a node that is not fused returns, or what a step makes."""

    node: fx.Node | None = None  # whose value it is, where that is not fused
    step: "Step | None" = None  # that makes it


@dataclass(eq=False)
class BatchNorm:
    """One call of a normalisation, on a cell."""

    cell: Cell
    target: str
    order: int  # among all nodes


@dataclass(frozen=True)
class Read:
    """A cell, or a cell normalised."""

    cell: Cell
    norm: BatchNorm | None = None


@dataclass(frozen=True)
class Expression:
    """What a fused node's value is: `program.Source` with cells for slots."""

    x: Read
    residual: Read | None = None
    act: str = "none"
    slope: float = 0.01
    resample: str = "none"
    nodes: tuple[fx.Node, ...] = field(default=(), compare=False)  # that it is the value of

    @property
    def reads(self) -> tuple[Read, ...]:
        """Return x and, where there is one, the residual."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def linear(self) -> bool:
        """Whether this is a cell, perhaps normalised, which a sum can take as a term."""
        return self.residual is None and self.act == self.resample == "none"

    @property
    def bare(self) -> bool:
        """Whether this is a cell as it is."""
        return self.linear and self.x.norm is None


@dataclass(eq=False)
class Step:
    """A convolution of one or two expressions, or without `target` the writing of one.

    A `call` is a node of torch's own, computed as it is from cells as they are.
    """

    node: fx.Node
    sources: list[Expression]
    out: Cell
    target: str | None = None
    call: bool = False
    keep: Cell | None = None
    run: str = ""  # the innermost container whose blocks it belongs to
    segment: "Segment | None" = None

    @property
    def reads(self) -> Iterator[Read]:
        """Yield what all sources read."""
        for source in self.sources:
            yield from source.reads

    @property
    def cheap(self) -> bool:
        """Whether it writes what one other image alone tells."""
        return self.writes and self.sources[0].residual is None

    @property
    def writes(self) -> bool:
        """Whether it writes an expression."""
        return self.target is None and not self.call

    @property
    def made(self) -> list[Cell]:
        """Return the cells that it makes."""
        return [self.out] if self.keep is None else [self.out, self.keep]


@dataclass(eq=False)
class Segment:
    """Steps that run as one, in the place of the last of them."""

    steps: list[Step] = field(default_factory=list)
    runs: set[str] = field(default_factory=set)

    @property
    def norms(self) -> list[BatchNorm]:
        """Return the normalisations that its steps read through, each once, as they were called."""
        norms = {r.norm for s in self.steps for r in s.reads if r.norm is not None}
        return sorted(norms, key=lambda norm: norm.order)


class _Conflict(Exception):
    """A value cannot stay inside a segment; it must be written where its node stands."""

    def __init__(self, node: fx.Node):
        super().__init__(node.name)
        self.node = node


@dataclass(frozen=True)
class Fused:
    """What became of a graph."""

    graph: fx.Graph
    programs: dict[str, Program]
    became: dict[str, str]  # module: its segment
    left: dict[str, str]  # module: why it was not fused
    layers: tuple[str, ...] = ()  # modules that segments call


def fuse(graph: fx.Graph, root: nn.Module, policy: str, path: str, prefix: str) -> Fused:
    """Return the graph with its convolutions and what surrounds them fused into segments.

    Calls of segments read `root`'s modules by their names, and programs from its attribute
    `RUNNERS`.

    Args:
        graph: of root.
        root: what was traced.
        policy: what segments keep, or WHOLE, and a plan decides.
        path: root's name in its network.
        prefix: of the segments' names.
    """
    _read_what_is_changed(graph, root)
    written: set[fx.Node] = set()
    unfused: set[fx.Node] = set()
    while True:
        reader = _Reader(graph, root, written, unfused, policy)
        try:
            reader.read()
            segments = _Gathering(reader).segments()
        except _Conflict as conflict:
            # Written where it stands; if that did not help, left as it is.
            (unfused if conflict.node in written else written).add(conflict.node)
            continue
        return _emit(reader, segments, policy, path, prefix)


# Reading the graph


def _read_what_is_changed(graph: fx.Graph, root: nn.Module) -> None:
    """Let whoever reads a value after it was changed in place read the result of the change.

    Then every node is a function of its inputs, and may be computed elsewhere.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    position = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if _changes_input(node, modules):
            changed = node.args[0]
            for user in list(changed.users):
                if position[user] > position[node]:
                    user.replace_input_with(changed, node)


class _Reader:
    """The graph's steps, and what every node's value is."""

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        written: set[fx.Node],
        unfused: set[fx.Node],
        policy: str,
    ):
        self.graph, self.root, self.written, self.unfused = graph, root, written, unfused
        self.whole = policy == WHOLE
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.position = {node: number for number, node in enumerate(graph.nodes)}
        self.steps: list[Step] = []
        self.values: dict[fx.Node, Expression] = {}
        self.pairs: dict[fx.Node, tuple[Expression, Expression]] = {}
        self.cells: dict[fx.Node, Cell] = {}  # a node's whole value, where it is in memory
        self.small: set[fx.Node] = set()  # not of an image's size, as far as the graph tells
        self.inner: set[fx.Node] = set()  # that calls work out along with themselves
        self.left: dict[str, str] = {}

    def read(self) -> None:
        """Read all nodes; a value that is used more than once is written where it stands."""
        live = set()
        for node in reversed(self.graph.nodes):
            if node.op == "output" or any(user in live for user in node.users):
                live.add(node)
        if self.whole:
            self._find_inner()
        for node in self.graph.nodes:
            if node in self.inner:
                continue
            # What nobody uses may still move running statistics: it runs as it is.
            fusable = node in live and node not in self.unfused
            value = self._value(node) if fusable else None
            if value is None and fusable and self.whole:
                value = self._call(node)
            if value is None:
                for other in node.all_input_nodes:
                    if other in self.values:
                        self.cell(other, node)
                if self._is_small(node):
                    self.small.add(node)
                continue
            if isinstance(value, tuple):
                self.pairs[node] = value
                continue
            value = replace(value, nodes=(*value.nodes, node))
            self.values[node] = value
            called = value.bare and value.x.cell.step is not None and value.x.cell.step.call
            inputs = node.all_input_nodes
            if all(other in self.small for other in inputs) or (called and self._is_small(node)):
                self.small.add(node)
            if not value.bare and (len(node.users) > 1 or node in self.written):
                self.cell(node, node)
        if not self.whole:  # else a plan decides
            self._keep_while_reading()

    def cell(self, node: fx.Node, where: fx.Node) -> Cell:
        """Return a node's whole value in memory, written at `where` if nobody has written it."""
        if node not in self.cells:
            value = self.values.get(node)
            if value is None:
                self.cells[node] = Cell(node)
            elif value.bare:
                self.cells[node] = value.x.cell
            else:
                self.cells[node] = self._step(where, [value])
                self.cells[node].step.run = _run_of(node, self.modules)
        return self.cells[node]

    def of(self, node: fx.Node, where: fx.Node) -> Expression:
        """Return a node's value as an expression."""
        if node in self.values and node not in self.cells:
            return self.values[node]
        return Expression(Read(self.cell(node, where)))

    def _value(self, node: fx.Node) -> Expression | tuple[Expression, Expression] | None:
        """Return what a node's value is if it fuses, and None if it does not."""
        kind, options = _kind(node, self.modules)
        if node.op == "call_module" and (why := self._why_not(node, kind)):
            self.left[str(node.target)] = why
            return None
        make = getattr(self, f"_{kind}", None) if kind else None
        return None if make is None else make(node, **options)

    def _why_not(self, node: fx.Node, kind: str | None) -> str | None:
        module = self.modules[str(node.target)]
        if has_hooks(module):
            return "it has hooks, which are honoured"
        if kind == "conv":
            if module.padding_mode != "zeros":
                return f"padding mode {module.padding_mode}"
            if module.weight.dtype not in (*DTYPES, torch.float64):
                return f"weights of {module.weight.dtype}"
            if len(node.args) != 1 or node.kwargs:
                return "called with more than its input"
            spans = zip(module.dilation, module.kernel_size, strict=True)
            if module.padding == "same" and any(dil * (taps - 1) % 2 for dil, taps in spans):
                return "padding 'same' of an even filter"
        return None

    # Calls

    def _find_inner(self) -> None:
        """Note the inner nodes that nobody but calls uses."""
        for node in reversed(self.graph.nodes):
            if calls.is_inner(node) and node.users:
                if all(u in self.inner or self._may_call(u) for u in node.users):
                    self.inner.add(node)

    def _may_call(self, node: fx.Node) -> bool:
        return (
            node not in self.unfused
            and calls.is_call(node, self.modules)
            and not (node.op == "call_module" and has_hooks(self.modules[str(node.target)]))
        )

    def _call(self, node: fx.Node) -> Expression | None:
        """Return the value of a node that is computed as it is, from what segments hold."""
        images = calls.images_of(node) if self._may_call(node) else []
        held = all(image in self.values or image in self.cells for image in images)
        if not images or not held or not all(o in self.inner for o in calls.inside(node)):
            if any(other in self.inner for other in node.all_input_nodes):
                raise _Conflict(node)  # it needs what was thought to be inner
            return None
        sources = [Expression(Read(self.cell(image, node))) for image in images]
        out = self._step(node, sources)
        out.step.call = True
        return Expression(Read(out))

    def _is_called(self, node: fx.Node) -> bool:
        """Whether a node's value is a call's, which may be of any shape."""
        step = self.values[node].x.cell.step if node in self.values else None
        return step is not None and step.call and self.values[node].bare

    # One function a kind of node; None means that it does not fuse here.

    def _conv(self, node: fx.Node) -> Expression:
        module, argument = self.modules[str(node.target)], node.args[0]
        if argument in self.pairs and module.groups == 1:
            sources = list(self.pairs[argument])
        else:
            sources = [self.of(argument, node)]
        if self.whole and len(sources) == 1 and _is_plain_sum(sources[0]):
            # Its gradient is its terms': once it is written, nobody needs them.
            sources = [Expression(Read(self.cell(argument, node)))]
        # A 1 x 1 convolution and the enlargement before it change places: a quarter of the work,
        # and a quarter of the bytes to keep.
        small = len(sources) == 1 and sources[0].resample == "up2" and _is_pointwise(module)
        if small:
            sources = [replace(sources[0], resample="none")]
        value = Expression(Read(self._step(node, sources, str(node.target))))
        if small:
            enlarged = replace(value, resample="up2", nodes=(node,))
            value = Expression(Read(self._step(node, [enlarged])))
        return value

    def _step(self, where: fx.Node, sources: list[Expression], target: str | None = None) -> Cell:
        """Return what a step makes that is added here."""
        out = Cell()
        out.step = Step(where, sources, out, target, run=_run_of(where, self.modules))
        self.steps.append(out.step)
        return out

    def _norm(self, node: fx.Node) -> Expression | None:
        argument = node.args[0]
        value = self.of(argument, node)
        if not value.bare:
            value = Expression(Read(self.cell(argument, node)))
        norm = BatchNorm(value.x.cell, str(node.target), self.position[node])
        return Expression(Read(value.x.cell, norm))

    def _act(self, node: fx.Node, act: str, slope: float) -> Expression | None:
        argument = node.args[0]
        if argument not in self.values or self._is_called(argument):
            return None
        value = self.of(argument, node)
        if value.act != "none" or value.resample != "none":
            value = Expression(Read(self.cell(argument, node)))
        return replace(value, act=act, slope=slope)

    def _add(self, node: fx.Node) -> Expression | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        left, right = node.args
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return None
        if not any(each in self.values and not self._is_called(each) for each in node.args):
            return None  # nothing of ours: it may not be an image at all
        if not all(self._is_image(argument) for argument in node.args):
            return None  # it may be of a size that is spread
        if (left in self.small) != (right in self.small):
            return None
        reads = []
        for argument in (left, right):
            value = self.of(argument, node)
            reads.append(value.x if value.linear else Read(self.cell(argument, node)))
        # First the one that a convolution has just made: its value is the one to make again, and
        # the other may be spread over it.
        reads.sort(
            key=lambda read: (
                read.norm is None,
                read.cell.step is None or read.cell.step.call,
            )
        )
        nodes = [self.of(argument, node).nodes for argument in (left, right)]
        return Expression(reads[0], reads[1], nodes=(*nodes[0], *nodes[1]))

    def _resample(self, node: fx.Node, resample: str) -> Expression | None:
        argument = node.args[0]
        if argument not in self.values or len(node.users) != 1:
            return None
        if _kind(next(iter(node.users)), self.modules)[0] not in ("conv", "cat"):
            return None
        value = self.of(argument, node)
        if value.resample != "none":
            value = Expression(Read(self.cell(argument, node)))
        return replace(value, resample=resample)

    def _cat(self, node: fx.Node, dim: int) -> tuple[Expression, Expression] | None:
        images = node.args[0]
        if dim != 1 or len(images) != 2 or len(node.users) != 1 or images[0] is images[1]:
            return None
        user = next(iter(node.users))
        if _kind(user, self.modules)[0] != "conv" or user in self.unfused:
            return None
        module = self.modules[str(user.target)]
        if module.groups != 1 or self._why_not(user, "conv"):
            return None
        if any(image in self.small for image in images):
            return None
        first, second = (self.of(image, node) for image in images)
        if second.residual is not None:
            second = Expression(Read(self.cell(images[1], node)))
        return first, second

    def _is_image(self, node: fx.Node) -> bool:
        """Whether a node's value is not a constant, nor an input that no convolution reads."""
        if node.op == "placeholder":
            return any(_kind(user, self.modules)[0] == "conv" for user in node.users)
        return node.op != "get_attr"

    def _is_small(self, node: fx.Node) -> bool:
        if node.op in ("get_attr", "placeholder", "output"):
            return node.op == "get_attr"
        name = str(node.target).lower()
        if node.op == "call_module":
            name = type(self.modules[str(node.target)]).__name__.lower()
        elif callable(node.target):
            name = getattr(node.target, "__name__", "").lower()
        if name in ("linear", "mean", "sum", "amax", "flatten") or "adaptive" in name:
            return True
        inputs = node.all_input_nodes
        return bool(inputs) and all(other in self.small for other in inputs)

    def _keep_while_reading(self) -> None:
        """Let a convolution that reads a written value first write it itself, as it loads."""
        for step in [s for s in self.steps if s.writes]:
            source = step.sources[0]
            if source.resample != "none":
                continue
            readers = [s for s in self.steps if any(r.cell is step.out for r in s.reads)]
            if not readers:
                continue
            first = min(readers, key=self.steps.index)
            if not step.run or step.run != first.run:
                continue  # what enters and leaves a container's blocks is a good place to part
            bare = Expression(Read(step.out))
            others = [r for e in first.sources[1:] for r in e.reads]
            if (
                first.target is None
                or first.keep is not None
                or first.sources[0] != bare
                or any(r.cell is step.out for r in others)
            ):
                continue
            start, end = self.position[step.node], self.position[first.node]
            nodes = [n for n, cell in self.cells.items() if cell is step.out]
            between = [
                user
                for node in nodes
                for user in node.users
                if user not in self.values and user not in self.pairs
                if start <= self.position[user] < end
            ]
            if between:
                continue
            first.sources[0] = source
            first.keep = step.out
            step.out.step = first
            self.steps.remove(step)


def _is_plain_sum(e: Expression) -> bool:
    """Whether this adds up two cells as they are, and does no more."""
    plain = e.residual is not None and e.act == e.resample == "none"
    return plain and all(read.norm is None for read in e.reads)


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _run_of(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """Return the innermost plain nn.Sequential that the node's module was called in."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]  # its keys also number the calls of one module
    runs = [path for path in paths if type(modules.get(path)) is nn.Sequential]
    if not runs and type(modules[""]) is nn.Sequential:
        return "."  # the root, which the stack leaves out
    return runs[-1] if runs else ""


def _path_of(node: fx.Node) -> str:
    """Return the module that a node's value comes from."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values()][-1] if stack else ""


_ACTS: dict[Any, str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    F.relu: "relu",
    torch.relu: "relu",
    "relu": "relu",
    F.leaky_relu: "leaky_relu",
    F.silu: "silu",
}
_ADDS = {operator.add, torch.add, "add", operator.iadd, "add_"}


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str | None, dict[str, Any]]:
    """Return what a node is to us, and its options; (None, {}) for what never fuses."""
    none = None, {}
    if not node.args or node.op not in ("call_module", "call_function", "call_method"):
        return none
    if node.op == "call_module":
        return _module_kind(modules[str(node.target)])
    target = node.target
    if target in _ADDS:
        return "add", {}
    if target in _ACTS:
        options = dict(zip(("input", "negative_slope"), node.args, strict=False)) | node.kwargs
        if target is F.relu or target is F.silu:
            options = {"inplace": node.args[1] if len(node.args) > 1 else False, **node.kwargs}
        slope = options.get("negative_slope", 0.01)
        known = {"input", "negative_slope", "inplace"}
        if not isinstance(slope, float | int) or not {*options} <= known:
            return none
        return "act", {"act": _ACTS[target], "slope": float(slope)}
    if target in (torch.cat, torch.concat):
        images = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        plain = isinstance(images, list | tuple) and all(isinstance(i, fx.Node) for i in images)
        return ("cat", {"dim": dim}) if plain and {*node.kwargs} <= {"dim"} else none
    if target is F.interpolate and len(node.args) == 1:
        options = {"scale_factor": None, "mode": "nearest", "align_corners": None, "size": None}
        options |= node.kwargs
        doubled = options["scale_factor"] in (2, 2.0, (2, 2), [2, 2], (2.0, 2.0))
        plain = {*options} == {"scale_factor", "mode", "align_corners", "size"}
        bilinear = options["mode"] == "bilinear" and not options["align_corners"]
        if doubled and plain and bilinear and options["size"] is None:
            return "resample", {"resample": "up2"}
    if target is F.max_pool2d:
        names = ("input", "kernel_size", "stride")
        options = dict(zip(names, node.args, strict=False)) | node.kwargs
        if {*options} <= {*names} and options["kernel_size"] in (2, (2, 2), [2, 2]):
            if options.get("stride") in (None, 2, (2, 2), [2, 2]):
                return "resample", {"resample": "pool2"}
    return none


def _module_kind(module: nn.Module) -> tuple[str | None, dict[str, Any]]:
    if isinstance(module, nn.Conv2d) and _is_plain(module, nn.Conv2d):
        return "conv", {}
    if isinstance(module, SyncBatchNorm) and _is_plain(module, SyncBatchNorm):
        return "norm", {}
    for norm in (nn.BatchNorm2d, nn.SyncBatchNorm):
        if isinstance(module, norm) and _is_plain(module, norm):
            return "norm", {}
    if (act := _ACTS.get(type(module))) is not None:
        slope = float(getattr(module, "negative_slope", 0.01))
        return "act", {"act": act, "slope": slope}
    if isinstance(module, nn.MaxPool2d) and _is_plain(module, nn.MaxPool2d):
        pairs = [_pair(v) for v in (module.kernel_size, module.stride, module.padding)]
        simple = pairs == [(2, 2), (2, 2), (0, 0)] and _pair(module.dilation) == (1, 1)
        if simple and not module.return_indices and not module.ceil_mode:
            return "resample", {"resample": "pool2"}
    if isinstance(module, nn.Upsample) and _is_plain(module, nn.Upsample):
        doubled = module.scale_factor is not None and _pair(module.scale_factor) == (2, 2)
        bilinear = module.mode == "bilinear" and not module.align_corners
        if doubled and bilinear and not module.recompute_scale_factor:
            return "resample", {"resample": "up2"}
    return None, {}


def _is_pointwise(module: nn.Conv2d) -> bool:
    """Whether a convolution sees one pixel at a time, and all of them."""
    plain = module.padding in (0, (0, 0), "same", "valid")
    return _pair(module.kernel_size) == _pair(module.stride) == (1, 1) and plain


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what `kind` does: it, our twin of it, or it parametrized."""
    if kind is nn.Conv2d and type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return False
    twin = type(module).__module__.startswith(f"{__package__.split('.')[0]}.ops.")
    return twin or type(module).forward is kind.forward


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


# Gathering steps into segments


def _is_outside(node: fx.Node, reader: _Reader) -> bool:
    return node not in reader.values and node not in reader.pairs and node not in reader.inner


class _Gathering:
    """Segments, grown step by step in the graph's order."""

    def __init__(self, reader: _Reader):
        self.reader, self.position = reader, reader.position
        # What is written at a node before what it computes: they were added in this order.
        self.steps = sorted(reader.steps, key=lambda s: self.position[s.node])
        self.readers: dict[Cell, list[Step]] = {}
        for step in self.steps:
            for read in step.reads:
                self.readers.setdefault(read.cell, []).append(step)
        self.outside: dict[Cell, list[fx.Node]] = {}  # nodes that are not fused and read a cell
        for node, cell in reader.cells.items():
            for user in node.users:
                if _is_outside(user, reader):
                    self.outside.setdefault(cell, []).append(user)

    def segments(self) -> list[Segment]:
        """Return the segments in the order of their calls."""
        for step in self.steps:
            must, may = [], []
            for read in step.reads:
                maker = read.cell.step
                if maker is None or maker.segment is None:
                    continue
                (must if read.norm is not None else may).append(maker.segment)
            joined = Segment([step], {step.run})
            for segment in dict.fromkeys(must):
                joined = self._join(segment, joined)
            if not self._fits(joined):
                raise _Conflict(self._culprit({read.norm for read in step.reads}))
            for segment in dict.fromkeys(may):
                together = self._join(segment, joined)
                if segment.steps[0].segment is segment and self._wanted(segment, joined):
                    if self._fits(together):
                        joined = together
            for each in joined.steps:
                each.segment = joined
        segments = {id(step.segment): step.segment for step in self.steps}.values()
        self._check_order(list(segments))
        return sorted(segments, key=self._place)

    def _join(self, first: Segment, second: Segment) -> Segment:
        steps = sorted({*first.steps, *second.steps}, key=self.steps.index)
        return Segment(steps, first.runs | second.runs)

    def _wanted(self, segment: Segment, joined: Segment) -> bool:
        """Whether steps that could be apart, for the value between is written, should not be.

        Those of one container's blocks should not: what lies between blocks is then made again
        under the policy "series", and what enters and leaves the container is kept.
        """
        if self.reader.whole:
            return True
        inner = any(
            r.cell.step in segment.steps
            and r.cell.step.target is not None
            and r.cell is r.cell.step.out
            for s in joined.steps
            for r in s.reads
            if r.cell.step is not None
        )
        # A term of a sum that is elementwise work on what is kept need not be kept itself.
        sums = {r.cell for s in joined.steps for e in s.sources if e.residual for r in e.reads}
        term = any(s.cheap and s.out in sums for s in segment.steps)
        return inner or term or bool((segment.runs & joined.runs) - {""})

    def _place(self, segment: Segment) -> int:
        return max(self.position[step.node] for step in segment.steps)

    def _fits(self, joined: Segment) -> bool:
        """Whether whoever reads what a segment makes runs after it."""
        steps, place = {*joined.steps}, self._place(joined)
        for step in joined.steps:
            for cell in step.made:
                if any(self.position[node] < place for node in self.outside.get(cell, ())):
                    return False
                for reader in self.readers.get(cell, ()):
                    if reader in steps or reader.segment is None:
                        continue
                    if reader.segment not in (s.segment for s in joined.steps):
                        if self._place(reader.segment) <= place:
                            return False
        return True

    def _check_order(self, segments: list[Segment]) -> None:
        """Raise _Conflict if calls of one normalisation would run in another order than before.

        They move the same running statistics. Checked at the end, for a call that is overtaken
        while segments grow may fall in line again.
        """
        calls: dict[str, list[tuple[int, float, BatchNorm | None]]] = {}
        for segment in segments:
            for norm in segment.norms:
                call = norm.order, self._place(segment), norm
                calls.setdefault(norm.target, []).append(call)
        for node, number in self.position.items():
            if str(node.target) in calls and node not in self.reader.values:
                call = number, number + 0.5, None  # after a segment that stands in its place
                calls[str(node.target)].append(call)
        for same in calls.values():
            same.sort(key=lambda call: call[0])
            for (_, place, norm), (_, after, _) in pairwise(same):
                if after < place:
                    raise _Conflict(self._culprit({norm}))

    def _culprit(self, norms: set[BatchNorm | None]) -> fx.Node:
        """Return a node whose value goes through one of these norms, to be written in time."""
        nodes = [
            node
            for node, value in self.reader.values.items()
            if any(read.norm is not None and read.norm in norms for read in value.reads)
        ]
        return ([node for node in nodes if node not in self.reader.written] or nodes)[-1]


# Writing the graph anew


def _emit(reader: _Reader, segments: list[Segment], policy: str, path: str, prefix: str) -> Fused:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    images: dict[Cell, fx.Node] = {}
    programs: dict[str, Program] = {}
    became: dict[str, str] = {}
    all_layers: list[str] = []
    at: dict[fx.Node, list[Segment]] = {}
    gathering = {
        id(segment): max((step.node for step in segment.steps), key=lambda n: reader.position[n])
        for segment in segments
    }
    for segment in segments:
        at.setdefault(gathering[id(segment)], []).append(segment)
    readers: dict[Cell, list[Any]] = {}
    for segment in segments:
        for step in segment.steps:
            for read in step.reads:
                readers.setdefault(read.cell, []).append(segment)
    for node, cell in reader.cells.items():
        for user in node.users:
            if _is_outside(user, reader):
                readers.setdefault(cell, []).append(user)

    def image(cell: Cell) -> fx.Node:
        return images[cell] if cell.node is None else env[cell.node]

    def mapped(node: fx.Node) -> fx.Node:
        return image(reader.cells[node]) if node in reader.values else env[node]

    numbers = count()
    for node in reader.graph.nodes:
        for segment in at.get(node, ()):
            name = f"{prefix}_{next(numbers)}"
            if policy == WHOLE:
                segment.steps = _late(segment, readers, reader)
            program, inputs, outputs = _program(segment, readers, reader, policy)
            called = [step.target or _path_of(_named(step)) for step in segment.steps]
            full = tuple(f"{path}.{each}" if path else each for each in called)
            programs[name] = replace(program, names=full)
            convs = [step.target for step in segment.steps if step.target]
            norms = [norm.target for norm in segment.norms]
            nodes = [node for s in segment.steps for e in s.sources for node in e.nodes]
            nodes += [step.node for step in segment.steps if step.call]
            others = [str(node.target) for node in nodes if node.op == "call_module"]
            layers = [
                str(s.node.target) for s in segment.steps if s.call and s.node.op == "call_module"
            ]
            became |= dict.fromkeys([*others, *convs, *norms], name)
            call = graph.call_function(
                run_whole if policy == WHOLE else run,
                (
                    graph.get_attr(f"{RUNNERS}.programs.{name}"),
                    [image(cell) for cell in inputs],
                    [graph.get_attr(target) for target in convs],
                    [graph.get_attr(target) for target in norms],
                    *([[graph.get_attr(target) for target in layers]] if layers else []),
                ),
            )
            for number, cell in enumerate(outputs):
                images[cell] = graph.call_function(operator.getitem, (call, number))
        if _is_outside(node, reader):
            env[node] = graph.node_copy(node, mapped)
            if _changes_input(node, reader.modules) and node.args[0] in reader.values:
                # A segment may keep what this would change.
                with graph.inserting_before(env[node]):
                    own = graph.call_method("clone", (env[node].args[0],))
                env[node].args = (own, *env[node].args[1:])
    return Fused(graph, programs, became, reader.left, tuple(all_layers))


def _changes_input(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node works in place."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    inplace = node.op == "call_function" and name.startswith("i") and hasattr(operator, name)
    return (inplace and hasattr(operator, name[1:])) or bool(node.kwargs.get("inplace", False))


def _named(step: Step) -> fx.Node:
    """Return the node that a step without a convolution is named after."""
    return step.node if step.call else step.sources[0].nodes[-1]


def _late(segment: Segment, readers: dict[Cell, list[Any]], reader: _Reader) -> list[Step]:
    """Return a segment's steps, chains of them whose results one other chain reads right before it.

    What such a chain reads must wait for backward in any case; so the later it makes its own
    result, and the sooner backward has done with it, the shorter that lives. Steps that draw random
    numbers keep the order of all.
    """
    if any(s.call and calls.is_random(s.node, reader.modules) for s in segment.steps):
        return segment.steps
    chains: list[list[Step]] = []
    chain_of: dict[Step, int] = {}
    for step in segment.steps:
        if not chains or all(r.cell.step is not chains[-1][-1] for r in step.reads):
            chains.append([])
        chains[-1].append(step)
        chain_of[step] = len(chains) - 1
    users: list[set[int]] = [set() for _ in chains]
    for step in segment.steps:
        for each in step.reads:
            if each.cell.step in chain_of:
                users[chain_of[each.cell.step]].add(chain_of[step])
    waiting: dict[int, list[int]] = {}
    for number, steps in enumerate(chains):
        outside = users[number] - {number}
        made = [cell for step in steps for cell in step.made]
        inner = all(each is segment for cell in made for each in readers.get(cell, ()))
        if len(outside) == 1 and inner:
            waiting.setdefault(outside.pop(), []).append(number)
    late = {number for numbers in waiting.values() for number in numbers}
    order: list[Step] = []
    pending = [number for number in reversed(range(len(chains))) if number not in late]
    ready: set[int] = set()
    while pending:
        number = pending[-1]
        if number in waiting and number not in ready:
            ready.add(number)
            pending += reversed(waiting[number])
            continue
        order += chains[pending.pop()]
    return order


def _program(
    segment: Segment,
    readers: dict[Cell, list[Any]],
    reader: _Reader,
    policy: str,
) -> tuple[Program, list[Cell], list[Cell]]:
    """Return a segment as a program, with the cells of its inputs and outputs."""
    steps, norms, root = segment.steps, segment.norms, reader.root
    made = [cell for step in steps for cell in step.made]
    inputs = list(dict.fromkeys(r.cell for step in steps for r in step.reads if r.cell not in made))
    outputs = [
        cell
        for cell in dict.fromkeys(made)
        if any(reader is not segment for reader in readers.get(cell, ()))
    ]
    slots = {cell: number for number, cell in enumerate([*inputs, *dict.fromkeys(made)])}
    convs = [step.target for step in steps if step.target]
    first_norm = 2 * len(convs)
    first_layer = first_norm + 4 * len(norms)
    layers, taken = 0, first_layer

    def term(read: Read) -> Term:
        return Term(slots[read.cell], None if read.norm is None else norms.index(read.norm))

    def source(e: Expression) -> Source:
        residual = None if e.residual is None else term(e.residual)
        return Source(term(e.x), residual, e.act, e.slope, e.resample)

    numbered = []
    conv_number = count()
    for step in steps:
        if step.call:
            images = calls.images_of(step.node)
            own: tuple[int, ...] = ()
            if is_module := step.node.op == "call_module":
                count_ = len(list(root.get_submodule(str(step.node.target)).parameters()))
                own = tuple(range(taken, taken + count_))
                taken += count_
            numbered.append(
                Call(
                    calls.code_of(step.node, images),
                    tuple(slots[e.x.cell] for e in step.sources),
                    (layers,) if is_module else (),
                    own,
                    slots[step.out],
                    linear=calls.is_linear(step.node, reader.modules),
                    random=calls.is_random(step.node, reader.modules),
                    cast=any(step.out is r.cell for s in steps if not s.call for r in s.reads),
                    apart=apart.rank_of(step.node, reader.modules),
                )
            )
            layers += is_module
            continue
        if step.target is None:
            numbered.append(Write(source(step.sources[0]), slots[step.out]))
            continue
        module, number = root.get_submodule(step.target), 2 * next(conv_number)
        padding = module.padding
        if isinstance(padding, str):
            zero = padding == "valid"
            padding = [
                0 if zero else dil * (taps - 1) // 2
                for taps, dil in zip(module.kernel_size, module.dilation, strict=True)
            ]
        numbered.append(
            Conv(
                tuple(source(e) for e in step.sources),
                number,
                None if module.bias is None else number + 1,
                tuple(module.stride), tuple(padding), tuple(module.dilation), module.groups,
                slots[step.out],
                None if step.keep is None else slots[step.keep],
            )
        )  # fmt: skip
    tables = []
    for number, norm in enumerate(norms):
        module, base = root.get_submodule(norm.target), first_norm + 4 * number
        parts = module.weight, module.bias, module.running_mean, module.running_var
        given = [None if part is None else base + i for i, part in enumerate(parts)]
        tables.append(Norm(slots[norm.cell], *given))
    program = Program(
        len(inputs), taken, tuple(numbered), tuple(tables),
        tuple(slots[cell] for cell in outputs),
    )  # fmt: skip
    if policy == WHOLE:
        return program, inputs, outputs
    if policy == "series":
        program = program.changed(again=((0, len(steps)),))
    return program.changed(dropped=dropped(program, policy)), inputs, outputs


def dropped(program: Program, policy: str) -> tuple[int, ...]:
    """Return the slots that a policy makes again where backward reads them.

    "keep": what one kept image alone tells, by elementwise work; "closing": also the outputs of
    convolutions that are summed; "series": the same as "keep".
    """
    return tuple(sorted(closing(program) if policy == "closing" else cheap(program)))
