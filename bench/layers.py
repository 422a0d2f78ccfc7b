"""The convolution layers of our networks as data: which there are, what they must move and compute.

A layer is a convolution with the normalisation and activation after it. Ours reads a raw image and
normalises and activates it on the way in, as the layer before would have; that is the same work, a
layer later. Bytes and FLOP are the least that a pass must do, every tensor once:

    pass      reads                 writes   products
    forward   x                     y        1
    dgrad     g, y, x               g_prev   1    y where normalised, x where it has a prologue
    wgrad     x, g, y               -        1
    backward  x, g, y               g_prev   2    dgrad and wgrad in one pass
    layer     forward and backward; where the image itself is the input, forward and wgrad

The roof of a pass is the larger of its bytes over the rate of a copy and its FLOP over the rate of
a large product; a layer's is the sum of its two passes', which run one after the other.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..engine.cards import HARDWARE, Hardware
from ..models import resnet50, uresnet
from ..ops.conv_backward import takes_one_pass
from ..ops.dispatch import Shape, prefer
from ..ops.fuse import Prologue
from ..ops.geometry import Geometry

SIZE = (1260, 2048)  # of a detector plane; the U-ResNet fills it up to its own multiple by itself
H200 = HARDWARE["h200"]
PASSES = ("forward", "dgrad", "wgrad", "backward", "layer")
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {  # network, and its activation
    **{name: (lambda name=name: uresnet(name), "leaky_relu") for name in ("uresnet", "a21")},
    "polaris": (lambda: uresnet("polaris"), "leaky_relu"),
    "resnet50": (resnet50, "relu"),
}


@dataclass(frozen=True)
class Layer:
    """A convolution at the size of image that a network gives it."""

    channels: int
    outputs: int
    kernel: tuple[int, int]
    height: int  # of its input
    width: int
    act: str
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    norm: bool = True  # normalised and activated afterwards
    first: bool = False  # reads the network's image: no prologue, and nobody asks for its gradient

    @property
    def name(self) -> str:
        """Return "3x3 16->16 at 1280x2048", and what else tells it from others."""
        words = [f"{self.kernel[0]}x{self.kernel[1]} {self.channels}->{self.outputs}"]
        words += [f"/{self.stride[0]}"] * (self.stride != (1, 1))
        words += [f"at {self.height}x{self.width}"]
        words += [word for word in ("first",) if self.first]
        words += [] if self.norm else ["last"]
        return " ".join(words)

    @property
    def geometry(self) -> Geometry:
        """Return its filter and how that moves."""
        shape = (self.outputs, self.channels // self.groups, *self.kernel)
        return Geometry(shape, self.stride, self.padding, self.dilation, self.groups)

    @property
    def output_size(self) -> tuple[int, int]:
        """Return (P, Q)."""
        P, Q = self.geometry.output_size(self.height, self.width)
        return P, Q

    @property
    def passes(self) -> tuple[str, ...]:
        """Return those of PASSES that it has."""
        return ("forward", "wgrad", "layer") if self.first else PASSES

    def one_pass(self, N: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        """Return whether our kernels make both gradients of N images in one pass."""
        if self.first:
            return False
        x = torch.empty(N, self.channels, self.height, self.width, dtype=dtype, device="meta")
        y = torch.empty(N, self.outputs, *self.output_size, dtype=dtype, device="meta")
        weight = torch.empty(self.geometry.weight_shape, dtype=dtype, device="meta")
        prologue, given = Prologue(x, act=self.act), y if self.norm else None
        with prefer("triton"):
            return takes_one_pass(y, given, weight, prologue, None, self.geometry, sums=True)

    def shape(self, pass_: str, dtype: torch.dtype) -> Shape:
        """Return what a dispatch table knows it by."""
        numbers = self.channels, self.outputs, self.kernel, self.stride, self.dilation, self.groups
        return Shape(pass_, dtype, *numbers)

    def flop(self, pass_: str, N: int) -> int:
        """Return the multiplications and additions of a pass over N images."""
        P, Q = self.output_size
        product = 2 * N * P * Q * self.outputs * self.channels // self.groups
        product *= self.kernel[0] * self.kernel[1]
        products = {"backward": 2, "layer": 2 if self.first else 3}
        return products.get(pass_, 1) * product

    def images(self, N: int, itemsize: int = 2) -> tuple[int, int]:
        """Return the bytes of N inputs and of N outputs."""
        P, Q = self.output_size
        x = N * self.channels * self.height * self.width
        return x * itemsize, N * self.outputs * P * Q * itemsize

    def bytes(self, pass_: str, N: int, itemsize: int = 2) -> int:
        """Return the least bytes that a pass over N images moves."""
        x, y = self.images(N, itemsize)
        w = self.outputs * self.channels // self.groups * self.kernel[0] * self.kernel[1] * itemsize
        g = 2 * y if self.norm else y  # the gradient, with y to take it through the normalisation
        moved = {"forward": x + y + w, "wgrad": x + g + w}
        moved |= {"dgrad": g + 2 * x + w, "backward": g + 2 * x + 2 * w}
        moved["layer"] = moved["forward"] + moved["wgrad" if self.first else "backward"]
        return moved[pass_]

    def roof(self, pass_: str, N: int, rates: Hardware, itemsize: int = 2) -> float:
        """Return the least seconds that a pass over N images takes."""
        if pass_ == "layer":
            parts = "forward", "wgrad" if self.first else "backward"
            return sum(self.roof(part, N, rates, itemsize) for part in parts)
        moved, flop = self.bytes(pass_, N, itemsize), self.flop(pass_, N)
        return max(moved / rates.copy, flop / rates.product)

    def predicted(self, pass_: str, N: int, rates: Hardware, itemsize: int = 2) -> float:
        """Return the seconds that our kernels could come to: the roof, or their shared memory's.

        A tile of an operand is written to shared memory and read from it once a tap, and once for
        every 128 channels of the other side. Instructions are not counted, nor are latencies.
        """
        if pass_ == "layer":
            both = ("backward",) if self.one_pass(N) else ("dgrad", "wgrad")
            parts = "forward", *(("wgrad",) if self.first else both)
            return sum(self.predicted(part, N, rates, itemsize) for part in parts)
        P, Q = self.output_size
        windows = N * P * Q * self.kernel[0] * self.kernel[1] // self.groups
        x = windows * self.channels * -(-self.outputs // 128)
        g = windows * self.outputs * -(-self.channels // 128)
        values = {"forward": x, "wgrad": x, "dgrad": g, "backward": x + g}[pass_]
        shared = 2 * values * itemsize / rates.shared if rates.shared else 0.0
        return max(self.roof(pass_, N, rates, itemsize), shared)

    def torch_predicted(self, pass_: str, N: int, rates: Hardware, merged: bool) -> float:
        """Return the seconds of a forward pass or a layer in torch at these rates, in 16 bits.

        Every operator reads and writes whole tensors. Forward, the normalisation passes y once for
        its statistics and twice to apply them, the activation twice; backward the activation passes
        it three times, the normalisation twice and three times. torch.compile merges neighbours:
        three passes of y forward and seven backward.
        """
        x, y = self.images(N)
        product = max((x + y) / rates.copy, self.flop("forward", N) / rates.product)
        forward = product + self.norm * (3 if merged else 5) * y / rates.copy
        if pass_ == "forward":
            return forward
        products = product if self.first else 2 * product
        return forward + products + self.norm * (7 if merged else 8) * y / rates.copy

    def bound(self, pass_: str, N: int, rates: Hardware, itemsize: int = 2) -> str:
        """Return which of the two the roof is: "memory" or "arithmetic"."""
        intensity = self.flop(pass_, N) / self.bytes(pass_, N, itemsize)
        return "arithmetic" if intensity > rates.product / rates.copy else "memory"


def collect(
    names: Iterable[str] = tuple(NETWORKS), size: tuple[int, int] = SIZE
) -> dict[Layer, Counter]:
    """Return every distinct layer of these networks, with how often each network runs it.

    The networks run on fake tensors of [1, 3, *size]; what takes most time at the roof is first:
    by the network that it takes most of.
    """
    found: dict[Layer, Counter] = {}
    for name in names:
        build, act = NETWORKS[name]
        with FakeTensorMode():
            for layer in _layers(build(), act, size):
                found.setdefault(layer, Counter())[name] += 1

    def share(layer: Layer) -> float:
        total = {n: sum(c[n] * k.roof("layer", 1, H200) for k, c in found.items()) for n in names}
        return max(c * layer.roof("layer", 1, H200) / total[n] for n, c in found[layer].items())

    return {layer: found[layer] for layer in sorted(found, key=share, reverse=True)}


def _layers(model: nn.Module, act: str, size: tuple[int, int]) -> list[Layer]:
    """Return the layers of a network in the order in which they run."""
    layers: list[Layer] = []
    made_by: dict[int, int] = {}  # a convolution's output, by id: its place in layers
    alive = []  # so that no id is given twice

    def convolved(module: nn.Conv2d, inputs: tuple, output: torch.Tensor) -> None:
        (x,) = inputs
        padding = module.padding  # the networks give numbers, never "same"
        numbers = module.in_channels, module.out_channels, module.kernel_size, *x.shape[2:]
        made_by[id(output)] = len(layers)
        alive.append(output)
        layers.append(
            Layer(
                *numbers, act, module.stride, padding, module.dilation, module.groups,
                bias=module.bias is not None, norm=False, first=not x.requires_grad,
            )
        )  # fmt: skip

    def normalised(_: nn.BatchNorm2d, inputs: tuple) -> None:
        place = made_by[id(inputs[0])]
        layers[place] = replace(layers[place], norm=True)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolved)
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(normalised)
    model(torch.empty(1, 3, *size))
    return layers
