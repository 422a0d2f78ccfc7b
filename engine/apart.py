"""Which calls compute each image of a batch by itself, as far as their node in the graph tells.

A call does where it is of a kind known here, and whatever it is told - dimensions, sizes, indices -
leaves dimension 0 alone. What is not known may mix images. Ranks are not in the graph: so the
answer is the least rank that its images must have, such as 4 for one that pads the last two of
three dimensions or more. `ops.parts.apart` compares.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from . import calls

# Functions and methods of images and numbers, element by element; of several images, which are of
# one rank, one may be spread over another.
_ELEMENTWISE = {
    "abs", "add", "addcdiv", "addcmul", "atan", "atan2", "bfloat16", "ceil", "celu", "clamp",
    "clamp_max", "clamp_min", "clip", "clone", "contiguous", "cos", "cosh", "div", "double", "elu",
    "eq", "erf", "erfc", "exp", "exp2", "expand_as", "expm1", "float", "floor", "floordiv", "fmod",
    "ge", "gelu", "gt", "half", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "le",
    "leaky_relu", "lerp", "log", "log10", "log1p", "log2", "logical_and", "logical_not",
    "logical_or", "logsigmoid", "lt", "masked_fill", "maximum", "minimum", "mish", "mod", "mul",
    "multiply", "nan_to_num", "ne", "neg", "pow", "reciprocal", "relu", "relu6", "remainder",
    "round", "rsqrt", "rsub", "selu", "sigmoid", "sign", "silu", "sin", "sinh", "softplus",
    "softshrink", "softsign", "sqrt", "square", "sub", "subtract", "tan", "tanh", "tanhshrink",
    "threshold", "to", "truediv", "trunc", "type_as", "where",
}  # fmt: skip
_ALONG = {  # name: where its dimensions are among the arguments after the image
    "amax": 0, "amin": 0, "argmax": 0, "argmin": 0, "chunk": 1, "cumprod": 0, "cumsum": 0,
    "flip": 0, "glu": 0, "log_softmax": 0, "logsumexp": 0, "mean": 0, "narrow": 0, "prod": 0,
    "roll": 1, "select": 0, "softmax": 0, "softmin": 0, "split": 1, "split_with_sizes": 1,
    "squeeze": 0, "std": 0, "sum": 0, "tensor_split": 1, "unbind": 0, "unflatten": 0, "var": 0,
}  # fmt: skip
_RANKS = {  # of functions and methods of one image
    "adaptive_avg_pool1d": 3, "adaptive_avg_pool2d": 4, "adaptive_avg_pool3d": 5,
    "adaptive_max_pool1d": 3, "adaptive_max_pool2d": 4, "adaptive_max_pool3d": 5,
    "avg_pool1d": 3, "avg_pool2d": 4, "avg_pool3d": 5, "channel_shuffle": 3, "fold": 3,
    "interpolate": 3, "lp_pool1d": 3, "lp_pool2d": 4, "max_pool1d": 3, "max_pool2d": 4,
    "max_pool3d": 5, "pixel_shuffle": 4, "pixel_unshuffle": 4, "unfold": 4, "upsample": 3,
}  # fmt: skip
LEAST = 3  # where a call works with sizes: the last two are others' than dimension 0's
_PRODUCTS = {"bmm": 3, "matmul": 3}  # of two images, one matrix or more a row of dimension 0


def rank_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> int:
    """Return the least rank of a call's images from which on it computes each by itself; 0: none.

    node: for which `calls.is_call` is true.
    """
    inner = calls.inside(node)
    if not all(map(_leaves_batch, inner)):
        return 0
    layer = modules[str(node.target)] if node.op == "call_module" else None
    rank = _rank(node) if layer is None else _rank_of_layer(layer)
    return max(rank, LEAST) if rank and any(map(_takes_size, inner)) else rank


def _rank(node: fx.Node) -> int:
    """Return `rank_of` for a function or method whose inner nodes are known to leave the batch."""
    name = calls.name_of(node)
    first, *rest = node.args or (None,)
    if name in _ELEMENTWISE:
        return 1
    if name in ("cat", "concat", "concatenate", "stack"):
        return _along(node, rest, 0)
    if node.target is operator.getitem:
        one_of = isinstance(first, fx.Node) and calls.is_inner(first)  # several, parted elsewhere
        return 1 if one_of else _rank_of_index(rest[0])
    if name in _ALONG:
        return _along(node, rest, _ALONG[name])
    if name in _RANKS:
        return _RANKS[name]
    if name in _PRODUCTS:
        return _PRODUCTS[name]
    if name == "pad":
        sides = rest[0] if rest else node.kwargs.get("pad")
        return 1 + len(sides) // 2 if isinstance(sides, tuple | list) else 0
    if name == "flatten":
        start = rest[0] if rest else node.kwargs.get("start_dim", 0)
        end = rest[1] if len(rest) > 1 else node.kwargs.get("end_dim", -1)
        return _least([start, *([] if end == -1 else [end])])
    if name in ("transpose", "swapaxes"):
        return _least(rest) if len(rest) == 2 else 0
    if name == "unsqueeze":
        (place,) = rest or (node.kwargs.get("dim"),)
        rank = _least([place])  # of what it makes
        return rank if type(place) is int and place > 0 else max(1, rank - 1) if rank else 0
    if name == "permute":
        order = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        plain = bool(order) and all(type(dim) is int and dim >= 0 for dim in order)
        return 1 if plain and order[0] == 0 else 0
    if name in ("view", "reshape"):
        sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        return 1 if sizes and _is_batch(sizes[0]) and isinstance(first, fx.Node) else 0
    return 0


def _along(node: fx.Node, rest: list[Any], place: int) -> int:
    """Return the rank at which the dimensions that a node is told are others than 0."""
    name = calls.name_of(node)
    words = {"dim", "dims", "axis"} & {*node.kwargs}
    if words:
        dims = node.kwargs[words.pop()]
    elif name in ("flip", "squeeze") and len(rest) > 1:
        dims = rest
    elif len(rest) > place:
        dims = rest[place]
    else:
        dims = -1 if name == "glu" else None  # all, or as it defaults to: 0
    dims = list(dims) if isinstance(dims, tuple | list) else [dims]
    if name in ("stack", "unflatten") and not all(type(d) is int and d > 0 for d in dims):
        return 0  # it counts from the end of what it makes
    return _least(dims)


def _least(dims: list[Any]) -> int:
    """Return the least rank at which none of these is dimension 0; 0 if one is, or is unknown."""
    if not dims or not all(type(dim) is int and dim != 0 for dim in dims):
        return 0
    return max(dim + 1 if dim > 0 else 1 - dim for dim in dims)


def _rank_of_index(index: Any) -> int:
    """Return the rank at which an index takes dimension 0 as it is."""
    parts = index if isinstance(index, tuple) else (index,)
    known = (int, slice, type(None), type(Ellipsis))
    if not parts or any(not isinstance(p, known) or isinstance(p, bool) for p in parts):
        return 0
    taken = sum(p is not None and p is not Ellipsis for p in parts)
    if parts[0] is Ellipsis:
        return 1 + taken if Ellipsis not in parts[1:] else 0
    return max(1, taken) if parts[0] == slice(None) else 0


# What a call works out along with itself


def _leaves_batch(inner: fx.Node) -> bool:
    """Whether an inner node leaves dimension 0 whole, and tells its size to shapes alone."""
    name = calls.name_of(inner)
    if name in calls.SEVERAL:
        return name in _ALONG and _parted_along(inner) == 1
    if inner.target is getattr:
        return inner.args[1] != "shape" or _only_indexed(inner)
    if _is_shape(inner):
        return _only_indexed(inner)
    if name == "size" or inner.target is operator.getitem:
        return _takes_others(inner) or (
            _is_batch(inner) and all(_shapes(inner, u) for u in inner.users)
        )
    return name in ("dim", "ndim") or (inner.target in calls.ARITHMETIC and inner.target is not len)


def _parted_along(inner: fx.Node) -> Any:
    """Return the dimension along which a node makes several tensors of one."""
    place = 1 + _ALONG[calls.name_of(inner)]
    return inner.kwargs.get("dim", inner.args[place] if len(inner.args) > place else 0)


def _is_shape(node: Any) -> bool:
    """Whether a node is all sizes of an image."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.op == "call_method" and node.target == "size" and len(node.args) == 1


def _only_indexed(shape: fx.Node) -> bool:
    """Whether nobody takes all sizes: those that are taken one by one are looked at themselves."""
    return all(user.target is operator.getitem for user in shape.users)


def _takes_size(inner: fx.Node) -> bool:
    return calls.name_of(inner) == "size" or inner.target is operator.getitem


def _takes_others(inner: fx.Node) -> bool:
    """Whether sizes are taken of other dimensions than 0, at a rank of `LEAST` or more."""
    source, *rest = inner.args
    if inner.target is operator.getitem and not _is_shape(source):
        return True  # of what was taken elsewhere
    index = rest[0] if rest else inner.kwargs.get("dim")
    if isinstance(index, slice):
        return index.step is None and index.start in (1, 2, 3, 4, -1, -2)
    return type(index) is int and (index > 0 or index in (-1, -2))


def _is_batch(value: Any) -> bool:
    """Whether a value is the size of dimension 0."""
    if not isinstance(value, fx.Node):
        return False
    of_shape = value.target is operator.getitem and _is_shape(value.args[0])
    of_image = value.op == "call_method" and value.target == "size"
    return (of_shape or of_image) and value.args[1:] == (0,)


def _shapes(size: fx.Node, user: fx.Node) -> bool:
    """Whether a node gives a tensor this size in dimension 0, and uses it for nothing else."""
    if user.op != "call_method" or user.target not in ("view", "reshape"):
        return False
    sizes = user.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    return bool(sizes) and sizes[0] is size and size not in sizes[1:]


# Layers


def _rank_of_layer(layer: nn.Module) -> int:
    """Return the rank at which a layer computes each image by itself."""
    for kinds, rank in _LAYERS:
        if isinstance(layer, kinds):
            return rank(layer) if callable(rank) else rank
    return 0


def _spatial(layer: nn.Module) -> int:
    """Return the rank of a layer's batches by the dimensions in its name, or its base's."""
    for base in type(layer).__mro__:
        if base.__module__.startswith("torch.nn.modules") and base.__name__[-1:] == "d":
            return 2 + int(base.__name__[-2])
    return 0


def _along_dim(layer: Any) -> int:
    return _least([layer.dim])


def _normalised(layer: Any) -> int:
    return 1 + len(layer.normalized_shape)


def _flattened(layer: Any) -> int:
    return _least([layer.start_dim] if layer.end_dim == -1 else [layer.start_dim, layer.end_dim])


def _unflattened(layer: Any) -> int:
    return 1 + layer.dim if type(layer.dim) is int and layer.dim > 0 else 0


_LAYERS: tuple[tuple[tuple[type[nn.Module], ...], int | Callable[[Any], int]], ...] = (
    ((nn.Identity,), 1),
    (
        (
            nn.Threshold, nn.ReLU, nn.Hardtanh, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh,
            nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.Hardshrink,
            nn.LeakyReLU, nn.LogSigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanhshrink,
        ),
        1,
    ),
    ((nn.PReLU, nn.Linear, nn.GroupNorm), 2),
    ((nn.GLU, nn.Softmax, nn.Softmin, nn.LogSoftmax), _along_dim),
    ((nn.Softmax2d,), 4),
    ((nn.LayerNorm, nn.RMSNorm), _normalised),
    ((nn.LocalResponseNorm, nn.ChannelShuffle, nn.Fold, nn.Upsample), 3),
    ((nn.CrossMapLRN2d, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unfold), 4),
    ((nn.Flatten,), _flattened),
    ((nn.Unflatten,), _unflattened),
    (
        (
            nn.modules.conv._ConvNd, nn.modules.padding._ConstantPadNd,
            nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd,
            nn.modules.padding._CircularPadNd, nn.modules.pooling._MaxPoolNd,
            nn.modules.pooling._AvgPoolNd, nn.modules.pooling._LPPoolNd,
            nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
        ),
        _spatial,
    ),
)  # fmt: skip
