"""U-ResNet: labels every pixel of a detector's planes, which meet only at the coarsest resolution.

The network that separates cosmic from neutrino pixels in Acciarri et al., Frontiers in Artificial
Intelligence 4 (2021) 649917, with the parameter names of its published checkpoints.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class UResNetConfig:
    """The numbers of one network; the defaults are those of the preset "uresnet".

    Raises ValueError on a number out of its range, or an unknown join.
    """

    filters: int = 16  # channels at full resolution; each level down has as many more
    depth: int = 6  # levels, each of half the resolution of the one above
    level_blocks: int = 2  # blocks on the way down and again on the way up, at every level
    residual: bool = True  # residual blocks of two convolutions, else plain ones of one
    join: Literal["concat", "sum"] = "concat"  # how a skip meets the way up
    deepest_blocks: int = 5
    deepest_channels: int = 256
    deepest_kernel: int = 5  # pixels, odd
    final_blocks: int = 5
    normalized: bool = True  # False leaves the normalisation out, whatever class is given for it
    planes: int = 3
    classes: int = 3

    def __post_init__(self):
        """Check the ranges."""
        for name in ("filters", "deepest_channels", "deepest_kernel", "planes", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: want at least 1, got {getattr(self, name)}")
        for name in ("depth", "level_blocks", "deepest_blocks", "final_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: want at least 0, got {getattr(self, name)}")
        if self.deepest_kernel % 2 == 0:
            raise ValueError(f"deepest_kernel: want an odd number, got {self.deepest_kernel}")
        if self.join not in ("concat", "sum"):
            raise ValueError(f"join: want 'concat' or 'sum', got {self.join!r}")


PRESETS = {
    "uresnet": UResNetConfig(),
    "a21": UResNetConfig(filters=8, residual=False, join="sum", final_blocks=0),
    "polaris": UResNetConfig(
        depth=7,
        residual=False,
        join="sum",
        deepest_blocks=2,
        deepest_channels=96,
        final_blocks=2,
    ),
    "scc21": UResNetConfig(normalized=False),
}


class Layers(NamedTuple):
    """Makers of the layers that blocks are built from; None leaves the layer out."""

    conv: Callable[..., nn.Module]  # (in_channels, out_channels, kernel_size, padding=)
    norm: Callable[[int], nn.Module] | None
    activation: Callable[[], nn.Module] | None


class Block(nn.Sequential):
    """Convolution with bias, normalisation, activation: [N, C, H, W] to [N, K, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, layers: Layers):
        """Draw the weight from Xavier's uniform distribution; start the bias at zero."""
        super().__init__()
        self.conv = layers.conv(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        _initialize(self.conv)
        if layers.norm is not None:
            self.norm = layers.norm(out_channels)
        if layers.activation is not None:
            self.activation = layers.activation()


class ResidualBlock(nn.Module):
    """activation(x + block(block(x))), the second block without its activation."""

    def __init__(self, channels: int, kernel_size: int, layers: Layers):
        """Keep channels and resolution."""
        super().__init__()
        self.convolution_1 = Block(channels, channels, kernel_size, layers)
        linear = layers._replace(activation=None)
        self.convolution_2 = Block(channels, channels, kernel_size, linear)
        self.activation = layers.activation()

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of x's shape [N, C, H, W]."""
        return self.activation(self.convolution_2(self.convolution_1(x)) + x)


class Concat(nn.Module):
    """Join two tensors by their channels, then mix these down to the number of one of them."""

    def __init__(self, channels: int, layers: Layers):
        """Mix 2 * channels down to channels."""
        super().__init__()
        self.bottleneck = Block(2 * channels, channels, 1, layers)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return [N, C, H, W] from two tensors of that shape."""
        return self.bottleneck(torch.cat([x, skip], dim=1))


class Sum(nn.Module):
    """Join two tensors by addition."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return [N, C, H, W] from two tensors of that shape."""
        return x + skip


class Level(nn.Module):
    """The layers of one resolution, around main_module: the level below, or the deepest one.

    A shelf for parameters: the published names nest the levels, while the order in which the
    planes pass through them is UResNet.forward's to tell.
    """

    def __init__(
        self, config: UResNetConfig, channels: int, main_module: nn.Module, layers: Layers
    ):
        """Lead channels down to config.filters more, and back."""
        super().__init__()
        below = channels + config.filters
        self.down_blocks = _blocks(config.level_blocks, channels, 3, config.residual, layers)
        self.downsample = _chain(pool=nn.MaxPool2d(2), bottleneck=Block(channels, below, 1, layers))
        self.main_module = main_module
        self.upsample = _chain(
            interpolate=nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            bottleneck=Block(below, channels, 1, layers),
        )
        self.up_blocks = _blocks(config.level_blocks, channels, 3, config.residual, layers)
        self.connection = Concat(channels, layers) if config.join == "concat" else Sum()


class Deepest(nn.Module):
    """The one place where the planes see each other."""

    def __init__(self, config: UResNetConfig, channels: int, layers: Layers):
        """Take channels from each plane and give as many back."""
        super().__init__()
        together, mixed = config.planes * channels, config.deepest_channels
        self.bottleneck = Block(together, mixed, 1, layers)
        self.blocks = _blocks(
            config.deepest_blocks, mixed, config.deepest_kernel, config.residual, layers
        )
        self.unbottleneck = Block(mixed, together, 1, layers)

    def forward(self, planes: list[Tensor]) -> list[Tensor]:
        """Return one [N, C, H, W] a plane, from as many of that shape."""
        x = self.unbottleneck(self.blocks(self.bottleneck(torch.cat(planes, dim=1))))
        channels = x.shape[1] // len(planes)
        return [x.narrow(1, i * channels, channels) for i in range(len(planes))]


class UResNet(nn.Module):
    """A U-shaped network whose weights all planes share, each with batch statistics of its own.

    With f filters and depth d (H x W already a multiple of 2^d), each plane is

        [N, 1, H, W] -> [N, f, H, W]                            the first block, 5 x 5
        [N, (l+1)f, H/2^l, W/2^l] -> [N, (l+2)f, H/2^(l+1), ..] level l = 0 ... d-1, going down
        [N, (d+1)f, H/2^d, W/2^d]                               the deepest, all planes as one
        [N, (l+2)f, H/2^(l+1), ..] -> [N, (l+1)f, H/2^l, W/2^l] level l = d-1 ... 0, going up
        [N, f, H, W] -> [N, classes, H, W]                      the final blocks, then 1 x 1

    A level's skip is what enters it. It lives from there until its own plane's join on the way up,
    so the deepest level sees the skips of every level and plane alive.

    A normalisation with running statistics updates them once a plane, plane 0 first; at the deepest
    level once. In training mode BatchNorm2d refuses one image of up to 2^d x 2^d pixels: its
    deepest map is a single pixel, which has no variance.

    Args:
        config: the network's numbers.
        conv: called as nn.Conv2d with (in_channels, out_channels, kernel_size, padding=...); its
            module has a weight and, if it likes, a bias.
        norm: called with the number of channels; None for no normalisation.
        activation: called without arguments, once a place.
    """

    def __init__(
        self,
        config: UResNetConfig,
        *,
        conv: Callable[..., nn.Module] = nn.Conv2d,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
    ):
        """Build the network from the deepest level outwards."""
        super().__init__()
        self.config = config
        layers = Layers(conv, norm if config.normalized else None, activation)
        width = [config.filters * (level + 1) for level in range(config.depth + 1)]

        self.initial_convolution = Block(1, config.filters, 5, layers)
        core = nn.ModuleDict({"main_module": Deepest(config, width[-1], layers)})
        for channels in reversed(width[:-1]):
            core = Level(config, channels, core, layers)
        self.net_core = core
        self.final_layer = _blocks(config.final_blocks, width[0], 3, config.residual, layers)
        self.bottleneck = conv(width[0], config.classes, 1, padding=0)
        _initialize(self.bottleneck)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return one tensor of logits [N, classes, H, W] a plane, for x [N, planes, H, W].

        Any H and W: zeros fill x at the bottom and the right up to a multiple of 2^depth, and the
        logits are cropped back. Raises ValueError on another number of dimensions or planes, or
        an x that is not of a floating-point dtype.
        """
        image = _padded(x, self.config.planes, 2**self.config.depth)
        height, width = x.shape[2], x.shape[3]
        each = range(self.config.planes)
        # A popped tensor is freed as soon as the next one exists, unless autograd stores it.
        planes = [self.initial_convolution(image[:, i : i + 1]) for i in each]
        skips = []

        core = self.net_core
        levels = []
        for _ in range(self.config.depth):
            skips.append(planes)
            planes = [core.downsample(core.down_blocks(plane)) for plane in planes]
            levels.append(core)
            core = core.main_module

        planes = core.main_module(planes)

        while levels:
            level, skip = levels.pop(), skips.pop()
            planes = [
                level.up_blocks(level.connection(level.upsample(planes.pop(0)), skip.pop(0)))
                for _ in each
            ]

        logits = [self.bottleneck(self.final_layer(planes.pop(0))) for _ in each]
        return tuple(plane[:, :, :height, :width] for plane in logits)


def uresnet(
    preset: str | UResNetConfig = "uresnet",
    *,
    conv: Callable[..., nn.Module] = nn.Conv2d,
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    activation: Callable[[], nn.Module] = nn.LeakyReLU,
) -> UResNet:
    """Return a U-ResNet with fresh weights; see UResNet for conv, norm and activation.

    The presets are "uresnet" (18,382,131 parameters), "a21" (8,510,547), "polaris" (1,926,403) and
    "scc21" (18,367,891; without normalisation). Other numbers come as a config, most easily as
    `dataclasses.replace(PRESETS["uresnet"], filters=4)`. Raises ValueError on an unknown preset.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset: want one of {', '.join(PRESETS)}, got {preset!r}")
        preset = PRESETS[preset]
    return UResNet(preset, conv=conv, norm=norm, activation=activation)


@torch.fx.wrap  # one opaque step to the tracer, which cannot follow decisions about sizes
def _padded(x: Tensor, planes: int, multiple: int) -> Tensor:
    if x.ndim != 4 or x.shape[1] != planes:
        raise ValueError(f"x: want [N, {planes}, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: want a floating-point dtype, got {x.dtype}")
    bottom, right = -x.shape[2] % multiple, -x.shape[3] % multiple
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


def _chain(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _blocks(
    count: int, channels: int, kernel_size: int, residual: bool, layers: Layers
) -> nn.Sequential:
    if residual:
        blocks = [ResidualBlock(channels, kernel_size, layers) for _ in range(count)]
    else:
        blocks = [Block(channels, channels, kernel_size, layers) for _ in range(count)]
    return _chain(blocks=nn.Sequential(*blocks))


def _initialize(conv: nn.Module) -> None:
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
