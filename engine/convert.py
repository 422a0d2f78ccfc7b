"""One line that makes a network thrifty: the same function, parameters and checkpoints.

`convert` traces what it can with torch.fx and lets `fusion` gather the layers into segments. The
network keeps its modules, and so its names and its `state_dict`; its class becomes a subclass whose
forward calls the segments. Where tracing fails, the parts are converted each by itself.
"""

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..ops.modules import TWINS
from ..ops.program import Program, Stay
from .code import Code
from .fusion import POLICIES, RUNNERS, WHOLE, Fused, fuse, has_hooks

if TYPE_CHECKING:
    from .plan import Plan

_TWIN = "_fullres_twin"  # marks a module whose class was exchanged for ours


@dataclass
class Conversion:
    """What a converted module holds beside its parts.

    Attributes:
        base: its class before.
        policy: what its segments keep.
        programs: its segments, by name.
        became: module: the segment that computes it.
        left: module: why it is computed as before.
        sources: the forward method while training and otherwise, where these differ.
    """

    base: type[nn.Module]
    policy: str
    sources: tuple[Code, ...] = ()
    programs: types.SimpleNamespace = field(default_factory=types.SimpleNamespace)
    became: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def convert(
    model: nn.Module,
    *,
    policy: str | None = None,
    plan: "Plan | None" = None,
    inplace: bool = False,
) -> nn.Module:
    """Return the network, computed by fused segments that store the least for backward.

    The result has the same function, and shares parameters and buffers with `model`; its modules,
    names, `state_dict`, hooks and class (as a subclass) are the model's. Convolutions fuse with the
    batch normalisation, activation, residual sum, 2 x 2 pooling, bilinear enlargement and
    concatenation around them; what does not fuse is computed as before, and `report` says why.

    A segment stores for backward, in the compute dtype, each convolution's raw output, once, and
    what leaves a residual block, by policy:

        "keep"     all of these; backward repeats elementwise work alone
        "closing"  all but the last convolution's output of each residual sum, which is made again
        "series"   the inputs of a run of blocks, within which everything is made again

    or by a plan, which decides for each step of the whole network, torch's own operators between
    convolutions among them.

    Results do not depend on the policy. A hook on a module that was fused away would not run:
    modules that have hooks now are not fused, and a hook added later raises RuntimeError when the
    network runs. There are no second derivatives: backward with create_graph=True raises.

    Args:
        model: any network; it is not changed, unless `inplace`.
        policy: what segments keep; "keep" where nothing is given.
        plan: of this network, that `fullres.plan` returned; then there is no policy.
        inplace: change `model` itself and return it.

    Raises:
        ValueError: another policy, a plan of another network, or a model that is already converted.
    """
    if plan is not None and policy is not None:
        raise ValueError(f"policy: want none beside a plan, got {policy!r}")
    if policy not in (None, *POLICIES):
        raise ValueError(f"policy: want one of {', '.join(POLICIES)}, got {policy!r}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: want a torch.nn.Module, got {type(model).__name__}")
    if any(RUNNERS in vars(module) for module in model.modules()):
        raise ValueError("model: want one not yet converted (revert it first), got a converted one")
    if plan is None:
        if not inplace:
            model = _copied(model)
        _convert(model, policy or "keep", "")
        return model
    planned = convert_whole(model)
    _apply(planned, plan)
    if inplace:  # only now that the plan is known to fit
        _convert(model, WHOLE, "")
        _apply(model, plan)
        return model
    return planned


def convert_whole(model: nn.Module) -> nn.Module:
    """Return the network read as a whole, so that `schedule` can tell it what to hold."""
    model = _copied(model)
    _convert(model, WHOLE, "")
    return model


def programs(model: nn.Module) -> dict[str, Program]:
    """Return the programs of a converted network, by the names of their modules and of them."""
    return {
        f"{name}:{key}": program
        for name, _, conversion in conversions(model)
        for key, program in vars(conversion.programs).items()
    }


def schedule(model: nn.Module, changed: Mapping[str, Program]) -> None:
    """Put other programs, by the names that `programs` has, into a converted network."""
    for name, _, conversion in conversions(model):
        for key in vars(conversion.programs):
            if f"{name}:{key}" in changed:
                setattr(conversion.programs, key, changed[f"{name}:{key}"])


def _apply(model: nn.Module, plan: "Plan") -> None:
    """Let a network that was read as a whole run as planned; ValueError if it is another one."""
    known, changed = programs(model), {}
    for part in plan.segments:
        program = known.get(part.name)
        if program is None or program.signature != part.signature:
            found = "no such segment" if program is None else "another one"
            raise ValueError(
                f"plan: want one of this network ({plan.model}), got {found} for {part.name!r}"
            )
        planned = program.changed(
            dropped=part.dropped, remote=part.remote, again=part.again,
            offloaded=tuple(Stay(*stay) for stay in part.offloaded), images=part.images,
        )  # fmt: skip
        changed[part.name] = planned.joined(part.joined)
    schedule(model, changed)


def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return the network computed by the layers it was made of; parameters are shared.

    model: one that `convert` returned, or that has such parts. It is not changed, unless `inplace`.
    """
    if not inplace:
        model = _copied(model)
    bases = {twin: base for base, twin in TWINS.items()}
    for module in model.modules():
        if RUNNERS in vars(module):
            module.__class__ = vars(module)[RUNNERS].base
            delattr(module, RUNNERS)
        if _TWIN in vars(module):
            module.__class__ = bases[type(module)]
            delattr(module, _TWIN)
    return model


def conversions(model: nn.Module) -> Iterator[tuple[str, nn.Module, Conversion]]:
    """Yield the converted parts of a network: name, module, what became of it."""
    for name, module in model.named_modules():
        if RUNNERS in vars(module):
            yield name, module, vars(module)[RUNNERS]


def fused_away(model: nn.Module) -> set[nn.Module]:
    """Return the modules of a network that are never called, since segments compute them."""
    return {
        part.get_submodule(target)
        for _, part, conversion in conversions(model)
        for target in conversion.became
    }


def exchanged(model: nn.Module) -> set[nn.Module]:
    """Return the layers of a network that our classes compute, one for one."""
    return {module for module in model.modules() if _TWIN in vars(module)}


# Converting


def _convert(module: nn.Module, policy: str, path: str) -> None:
    """Convert a module in place: as a whole if it can be traced, else part by part.

    path: its name in the network.
    """
    if next(module.children(), None) is None:
        _exchange(module)
        return
    opaque: set[str] = set()
    if _traceable(module):
        fused = _fused(module, policy, path, opaque)
        if fused is not None:
            _install(module, policy, fused)
        else:
            opaque = {name for name, _ in module.named_children()}
    else:
        opaque = {name for name, _ in module.named_children()}
    for name in opaque:
        _convert(module.get_submodule(name), policy, f"{path}.{name}" if path else name)


def _exchange(module: nn.Module) -> None:
    """Let a layer be computed by our class of the same name."""
    if type(module) in TWINS and not has_hooks(module):
        module.__class__ = TWINS[type(module)]
        setattr(module, _TWIN, True)


def _traceable(module: nn.Module) -> bool:
    """Whether a module has a forward of its own to trace."""
    missing = nn.modules.module._forward_unimplemented
    containers = nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule
    return type(module).forward is not missing and not isinstance(module, containers)


class _Untraceable(Exception):
    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class _Tracer(fx.Tracer):
    """Traces through containers, and around what cannot be traced, which `opaque` collects."""

    def __init__(self, opaque: set[str]):
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque:
            return True
        if has_hooks(m) and next(m.children(), None) is not None:
            self.opaque.add(module_qualified_name)
            return True
        own = m.__module__.startswith(f"{__package__.split('.')[0]}.ops.")
        return own or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except _Untraceable:
            raise
        except Exception as error:
            raise _Untraceable(self.path_of_module(m)) from error


def _traced(module: nn.Module, opaque: set[str]) -> fx.Graph | None:
    """Return a module's graph, adding to `opaque` the parts that it calls as they are."""
    while True:
        try:
            return _Tracer(opaque).trace(module)
        except _Untraceable as error:
            if error.name in opaque:
                return None
            opaque.difference_update({n for n in opaque if n.startswith(f"{error.name}.")})
            opaque.add(error.name)
        except Exception:  # whatever forward does that a tracer cannot follow
            return None


def _fused(module: nn.Module, policy: str, path: str, opaque: set[str]) -> list[Fused] | None:
    """Return the fused graph, two where training and evaluation differ, or None."""
    modes = {m: m.training for m in module.modules()}
    graphs = []
    buffers = _Buffers(module)
    try:
        for training in (True, False):
            for m in modes:
                m.training = training
            graph = _traced(module, opaque)
            if buffers.restored() or graph is None:
                return None
            graphs.append(graph)
    finally:
        for m, training in modes.items():
            m.training = training
    if graphs[0].python_code("self").src == graphs[1].python_code("self").src:
        return [fuse(graphs[0], module, policy, path, "segment")]
    return [
        fuse(graph, module, policy, path, prefix)
        for graph, prefix in zip(graphs, ("training", "evaluation"), strict=True)
    ]


class _Buffers:
    """The buffers of a module as they are before it is traced.

    A forward that changes one, such as a counter, does so while it is traced, and the graph would
    never do it again.
    """

    def __init__(self, module: nn.Module):
        self.before = [
            (m, name, buffer, buffer._version, buffer.clone())
            for m in module.modules()
            for name, buffer in m._buffers.items()
            if buffer is not None
        ]

    def restored(self) -> bool:
        """Give the buffers their values back; return whether any had changed."""
        changed = False
        for module, name, buffer, version, value in self.before:
            if module._buffers.get(name) is not buffer or buffer._version != version:
                changed = True
                module._buffers[name] = buffer
                with torch.no_grad():
                    buffer.copy_(value)
        return changed


def _install(module: nn.Module, policy: str, fused: list[Fused]) -> None:
    """Let a module run its fused graphs."""
    called = {str(n.target) for f in fused for n in f.graph.nodes if n.op == "call_module"}
    called |= {target for f in fused for target in f.layers}
    for target in called:
        layer = module.get_submodule(target)
        if next(layer.children(), None) is None:
            _exchange(layer)
    if not any(each.programs for each in fused):
        return
    conversion = Conversion(type(module), policy)
    for each in fused:
        vars(conversion.programs).update(each.programs)
        conversion.left |= each.left
        conversion.became |= each.became
        code = each.graph.python_code("self")
        conversion.sources += (Code(code.src, code.globals),)
    vars(module)[RUNNERS] = conversion
    module.__class__ = _subclass(conversion)


def _subclass(conversion: Conversion) -> type[nn.Module]:
    """Return the class of a converted module: its own, but for how it runs, copies and pickles."""
    base, functions = conversion.base, [source.function for source in conversion.sources]

    @functools.wraps(functions[0])
    def forward(self, *args, **kwargs):
        _refuse_hooks(self)
        function = functions[0 if self.training else -1]
        return function(self, *args, **kwargs)

    def reduced(self, protocol):
        return _restored, (conversion,), {k: v for k, v in vars(self).items() if k != RUNNERS}

    members = {"forward": forward, "__reduce_ex__": reduced, "__module__": base.__module__}
    return type(f"Fused{base.__name__}", (base,), members)


def _restored(conversion: Conversion) -> nn.Module:
    kind = _subclass(conversion)
    module = kind.__new__(kind)
    vars(module)[RUNNERS] = conversion
    return module


def _refuse_hooks(module: nn.Module) -> None:
    """Raise RuntimeError if a module that segments compute has got a hook, which would not run."""
    for target in vars(module)[RUNNERS].became:
        part = module.get_submodule(target)
        if has_hooks(part):
            raise RuntimeError(
                f"{target}: a segment computes this module, so its hooks would not run; register "
                "them before fullres.convert, or fullres.revert the network"
            )


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy of the modules that shares all tensors."""
    shared: list[Any] = []
    for module in model.modules():
        values = [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
        shared += [v for v in values if isinstance(v, Tensor | torch.distributed.ProcessGroup)]
    return copy.deepcopy(model, {id(value): value for value in shared})
