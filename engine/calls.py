"""Which of torch's own operators a segment can run: those that have no effect but their result.

Backward runs such a node once more, from what it read. A node that moves running statistics,
changes what it is given, or is of unknown code is none of them, and stays outside of segments.
"""

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from .code import Code

# Values that are no tensors, or several: a call works them out along with itself.
_SIZES = {"size", "dim", "numel", "shape", "ndim", "dtype", "device", "is_cuda"}
SEVERAL = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes", "meshgrid"}
ARITHMETIC = {
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
    operator.neg, int, float, len, max, min, round, abs, tuple, list,
}  # fmt: skip

_PACKAGES = ("torch", "torch.nn.functional", "_operator", "torch._C._nn", "torch.functional")
_REFUSED = (  # in a name: it draws, moves statistics, or does not return a tensor
    "rand", "dropout", "bernoulli", "multinomial", "normal", "poisson", "gumbel", "rrelu",
    "fractional", "batch_norm", "instance_norm", "multi_head", "seed", "tolist", "numpy",
    "backward", "grad", "checkpoint", "assert",
)  # fmt: skip
_LAYERS = {
    "activation": {"MultiheadAttention", "RReLU"},
    "channelshuffle": set(),
    "conv": set(),
    "distance": set(),
    "dropout": set(),
    "flatten": set(),
    "fold": set(),
    "linear": set(),
    "normalization": set(),
    "padding": set(),
    "pixelshuffle": set(),
    "pooling": {"FractionalMaxPool2d", "FractionalMaxPool3d"},
    "upsampling": set(),
}  # of torch.nn.modules: modules of stateless layers, and which of theirs are not
# The gradient of these depends on sizes alone.
_LINEAR_NAMES = {
    "cat", "concat", "stack", "getitem", "narrow", "chunk", "split", "pad", "flatten", "reshape",
    "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "mean", "sum", "expand",
    "interpolate", "upsample", "avg_pool2d", "adaptive_avg_pool2d", "add", "sub", "neg", "flip",
    "roll", "pixel_shuffle", "pixel_unshuffle", "unbind",
}  # fmt: skip
_LINEAR_LAYERS = (
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample, nn.UpsamplingBilinear2d,
    nn.UpsamplingNearest2d, nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d,
)  # fmt: skip


def is_inner(node: fx.Node) -> bool:
    """Whether a node's value is a size, or several tensors."""
    name = name_of(node)
    if node.op == "call_method":
        return name in _SIZES | SEVERAL
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return len(node.args) > 1 and node.args[1] in _SIZES
    if name in SEVERAL:
        return True
    sources = node.all_input_nodes
    if node.target is operator.getitem:
        return is_inner(node.args[0]) and name_of(node.args[0]) not in SEVERAL
    return node.target in ARITHMETIC and bool(sources) and all(map(is_inner, sources))


def is_call(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is an operator of torch's without effect, whose value is one tensor."""
    if is_inner(node) or any(other.op == "get_attr" for other in node.all_input_nodes):
        return False
    if any(u.target is operator.getitem and isinstance(u.args[1], int) for u in node.users):
        return False  # its value may be several tensors
    name = name_of(node)
    if node.op == "call_module":
        return _is_stateless(modules[str(node.target)]) and len(node.args) == 1 and not node.kwargs
    if node.op == "call_method":
        known = callable(getattr(Tensor, name, None))
    elif node.op == "call_function":
        known = getattr(node.target, "__module__", None) in _PACKAGES or node.target is F.pad
    else:
        return False
    changes = name.endswith("_") or (name.startswith("i") and hasattr(operator, f"__{name}__"))
    changes |= bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    drawn = name in ("dropout", "dropout2d")
    refused = not drawn and (name == "item" or any(word in name for word in _REFUSED))
    return known and not changes and not refused


def is_random(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a call draws random numbers."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.modules.dropout._DropoutNd)
    return "dropout" in name_of(node)


def is_linear(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a call's gradient depends on its inputs' sizes alone."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _LINEAR_LAYERS)
    return name_of(node) in _LINEAR_NAMES


def inside(node: fx.Node) -> list[fx.Node]:
    """Return the inner nodes that a call works out along with itself, in their order."""
    found: dict[fx.Node, None] = {}

    def visit(other: fx.Node) -> None:
        if is_inner(other) and other not in found:
            for each in other.all_input_nodes:
                visit(each)
            found[other] = None

    for other in node.all_input_nodes:
        visit(other)
    return list(found)


def images_of(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a call reads, itself or through its inner nodes."""
    found: dict[fx.Node, None] = {}
    for each in (*inside(node), node):
        found |= dict.fromkeys(other for other in each.all_input_nodes if not is_inner(other))
    return list(found)


def code_of(node: fx.Node, images: Iterable[fx.Node]) -> Code:
    """Return a call as a function of its images and, if it is a module's, of the module."""
    graph = fx.Graph()
    env = {image: graph.placeholder(f"image_{n}") for n, image in enumerate(images)}
    layer = graph.placeholder("layer") if node.op == "call_module" else None
    for other in inside(node):
        env[other] = graph.node_copy(other, env.__getitem__)
    if layer is not None:
        args = fx.map_arg(node.args, env.__getitem__)
        result = graph.call_function(called, (layer, *args))
    else:
        result = graph.node_copy(node, env.__getitem__)
    graph.output(result)
    code = graph.python_code("self")
    return Code(code.src, code.globals)


def called(layer: Any, *args: Any) -> Any:
    """Return layer(*args)."""
    return layer(*args)


def name_of(node: fx.Node) -> str:
    """Return the name of what a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def _is_stateless(module: nn.Module) -> bool:
    kind, plain = type(module), False
    for base in (kind, *kind.__bases__):  # our twin of a layer is its subclass
        home, _, name = base.__module__.rpartition(".")
        ours = kind.__module__.startswith(f"{__package__.split('.')[0]}.ops.")
        if home == "torch.nn.modules" and (base is kind or ours):
            plain |= name in _LAYERS and base.__name__ not in _LAYERS[name]
    quiet = next(module.buffers(), None) is None and next(module.children(), None) is None
    return plain and quiet and not getattr(module, "inplace", False)
