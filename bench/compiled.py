"""The memory of a training step under torch.compile, from its graphs, without a GPU.

AOTAutograd traces model and loss into one graph of forward and backward on fake tensors, with
Inductor's decompositions; Inductor's own passes and partitioner split it under a budget. What is
stored for the backward pass is exact then. Two models of what runs count peaks over the two graphs,
in their order, a tensor's memory being free after its last reader:

    node by node   each operator's result exists, as if the graph ran uncompiled: normalisations
                   are decomposed, so that float32 maps come and go.
    fused          as Inductor fuses at best: pointwise operators and views run inside whatever
                   reads their results, unless that is a convolution, another kernel of a library or
                   an output of the graph; reductions and scattered additions read through them; a
                   kernel writes over an input that it is the last to read.

Inductor's code is between the two: it leaves fusions out where a kernel would read too much, and
may reorder kernels, which neither model does. Mostly the second is the smaller by far; not always,
as what a fused chain reads lives until the chain's last reader runs. The smaller of the two is
taken for the step's peak, in favour of torch.compile. Workspaces and an allocator's rounding are
not counted, as nowhere in the meter. The partitioner sees tensors of the CPU, as there is no other
device; it decides by sizes and operators.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

aten, prims = torch.ops.aten, torch.ops.prims

# Operators without torch's tag that Inductor's kernels compute element by element.
_POINTWISE = {
    aten.full, aten.full_like, aten.zeros_like, aten.ones_like, aten.scalar_tensor, aten.arange,
    aten.empty, aten.constant_pad_nd, aten._unsafe_index, aten.index, aten.gather, aten._to_copy,
    prims.iota, prims.convert_element_type,
}  # fmt: skip
# Operators whose results exist and whose inputs need not.
_READS_THROUGH = {
    aten.sum, aten.mean, aten.var, aten.var_mean, aten.amax, aten.amin, aten.max, aten.min,
    aten.any, aten.all, aten.prod, aten.argmax, aten.cat,
}  # fmt: skip
# Additions into their first argument, which is written in place where nobody reads it again.
_SCATTERS = {aten.index_put, aten._unsafe_index_put, aten.scatter_add}


@dataclass(frozen=True)
class CompiledStep:
    """Bytes of one step: forward, loss, backward and the optimizer's state."""

    stored: int  # made by the forward pass for the backward pass
    peak: int  # by the model in which it is the smaller
    peak_node_by_node: int


def compiled_step(
    model: nn.Module,
    x_shape: Sequence[int],
    labels: Callable[[], Tensor],
    criterion: Callable[[Any, Tensor], Tensor],
    *,
    budget: float = 1.0,
    autocast: torch.dtype | None = torch.bfloat16,
    state_per_parameter: int = 2,
) -> CompiledStep:
    """Return the memory of a step of a model in float32 under torch.compile.

    Input, labels, parameters, buffers and the optimizer's state are there throughout; gradients
    from where the backward pass makes them.

    Args:
        model: in the mode to train in; it may lie on "meta".
        x_shape: its input's shape, float32.
        labels: makes the labels, here fake ones.
        criterion: takes the model's output and the labels, returns the loss.
        budget: torch._functorch.config.activation_memory_budget.
        autocast: to which dtype forward and criterion run; None for float32.
        state_per_parameter: tensors of a parameter's size and of float32 that the optimizer keeps.
    """
    forward, backward, given, kept = _partitioned(
        model, x_shape, labels, criterion, budget, autocast
    )
    parameters = sum(_sizes(p for p in given if p.requires_grad).values())
    held = _sizes(given)
    base = sum(held.values()) + state_per_parameter * parameters
    saved = {
        key: size
        for node in kept
        for key, size in _storages(node).items()
        if key not in _given_keys(forward)
    }
    stored = sum(saved.values())
    peaks = []
    for fused in (False, True):
        first = _peak(forward, fused, {}, held=_given_keys(forward))
        second = _peak(backward, fused, saved, held=_given_keys(forward))
        peaks.append(base + max(first, second, parameters))
    return CompiledStep(stored, min(peaks), peaks[0])


def _partitioned(
    model: nn.Module,
    x_shape: Sequence[int],
    labels: Callable[[], Tensor],
    criterion: Callable[[Any, Tensor], Tensor],
    budget: float,
    autocast: torch.dtype | None,
) -> tuple[fx.Graph, fx.Graph, list[Tensor], list[fx.Node]]:
    """Return both graphs, the tensors that are there before, and what forward keeps."""
    import torch._inductor.lowering  # noqa: F401  its decompositions look into it
    from torch._functorch import config
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table

    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = {
            name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
            for name, p in model.named_parameters()
        }
        buffers = {name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
        tensors = {**parameters, **buffers}
        x, y = torch.empty(tuple(x_shape)), labels()
        found: list[Any] = []

        def step(*given: Tensor) -> Tensor:
            *values, image, label = given
            here = dict(zip(tensors, values, strict=True))
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                out = torch.func.functional_call(model, here, (image,))
                return criterion(out, label)

        def split(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
            with config.patch(activation_memory_budget=budget):
                forward, backward = partition_fn(joint, inputs, **options)
            results = forward.graph.output_node().args[0]
            kept = [n for n in results[options["num_fwd_outputs"] :] if isinstance(n, fx.Node)]
            found.extend([forward.graph, backward.graph, kept])
            return forward, backward

        def keep(graph: fx.GraphModule, inputs: Any) -> Callable:
            return make_boxed_func(graph)

        call = aot_function(
            step,
            keep,
            keep,
            partition_fn=split,
            decompositions=select_decomp_table(),
            num_params_buffers=len(tensors),
        )
        call(*tensors.values(), x, y)
    forward, backward, kept = found
    return forward, backward, [*tensors.values(), x, y], kept


def _peak(graph: fx.Graph, fused: bool, alive: dict[int, int], held: set[int]) -> int:
    """Return the most bytes alive while a graph runs, beyond those of the storages in held.

    alive: storages that are there from the start, by their keys; freed after their last reader.
    """
    made, reads = _kernels(graph, fused)
    last = {key: index for index, keys in enumerate(reads) for key in keys}
    alive = dict(alive)
    now = peak = sum(alive.values())
    for index, (node, results) in enumerate(made):
        dying = [key for key in reads[index] if last[key] == index and key in alive]
        new = {k: s for k, s in results.items() if k not in alive and k not in held}
        if fused and new and (_pointwise(node) or _packet(node) in _SCATTERS):  # over an input
            size = sum(new.values())
            reused = next((key for key in dying if alive[key] == size), None)
            if reused is not None:
                now -= alive.pop(reused)
        alive.update(new)
        now += sum(new.values())
        peak = max(peak, now)
        for key in [*dying, *new]:
            if key in alive and last.get(key, -1) <= index:
                now -= alive.pop(key)
    return peak


def _kernels(
    graph: fx.Graph, fused: bool
) -> tuple[list[tuple[fx.Node, dict[int, int]]], list[set[int]]]:
    """Return the nodes that run as kernels with the storages they make, and what each reads.

    The last is the graph's output, which reads its results and makes nothing.
    """
    virtual: set[fx.Node] = set()
    if fused:
        needed: set[fx.Node] = set()  # those whose results must exist
        for node in reversed(graph.nodes):
            for user in node.users:
                through = _pointwise(user) or _reads_through(user)
                if (user in needed) if _view(user) else not through:
                    needed.add(node)
            if node not in needed and (_pointwise(node) or _view(node)):
                virtual.add(node)
    sources: dict[fx.Node, set[int]] = {}  # the storages that one reads to have a node's value
    made, reads = [], []
    for node in graph.nodes:
        inputs = set().union(*(sources[each] for each in node.all_input_nodes))
        if node.op in ("placeholder", "get_attr"):
            sources[node] = set(_storages(node))
            continue
        if node in virtual:
            sources[node] = inputs
            continue
        results = {} if node.op == "output" or _view(node) else _storages(node)
        sources[node] = set(_storages(node)) if node.op != "output" else set()
        made.append((node, results))
        reads.append(inputs)
    return made, reads


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _pointwise(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or _packet(node) in _POINTWISE


def _reads_through(node: fx.Node) -> bool:
    return _packet(node) in _READS_THROUGH or _packet(node) in _SCATTERS


def _view(node: fx.Node) -> bool:
    """Whether the node's result lies in its input's storage."""
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _storages(node: fx.Node) -> dict[int, int]:
    return _sizes(t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor))


def _sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the tensors' storages, the size in bytes of each by what tells it from others."""
    storages = [t.untyped_storage() for t in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}


def _given_keys(forward: fx.Graph) -> set[int]:
    return {key for node in forward.find_nodes(op="placeholder") for key in _storages(node)}
