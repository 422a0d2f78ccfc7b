"""A layer's tensors for a benchmark, and whether what a provider makes of them is right.

A result is compared with float64: of images by whole rows at the edges and in the middle, of weight
gradients by whole filters over all pixels, of sums by all of them. What is allowed is the result's
rounding, that of the factors, and eight deviations of a float32 sum of as many terms.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.fuse import (
    Prologue,
    activated,
    gradient_reference,
    normalised,
    prologue_backward_reference,
    prologue_reference,
)
from .layers import Layer

Results = dict[str, Tensor]
SLOPE = 0.01  # of LeakyReLU
EPS = 1e-5  # of BatchNorm2d
FILTERS = 3  # whose weight gradients are compared


class Case:
    """A layer's tensors over N images, seeded: what its passes read, and float64's word on them.

    Attributes:
        layer: the layer.
        x: the input as it is stored, [N, C, H, W]; norm_in: its norm [4, C], None for an image.
        z: the input as it is multiplied.
        weight, bias: of the convolution, in the compute type.
        y: the convolution's output as it is stored; norm: its norm [4, K], None without one.
        gamma, beta: of the normalisation.
        dout: the gradient of the layer's result; g: that of what its activation is applied to.
        sums: of g and of g * (y - mean), [3, K]; coef: of batch normalisation's backward, [4, K].
    """

    def __init__(self, layer: Layer, N: int, dtype: torch.dtype, device: str):
        """Draw the tensors, and compute what follows from them, an image at a time."""
        self.layer, self.dtype = layer, dtype
        C, K, (P, Q) = layer.channels, layer.outputs, layer.output_size
        rng = torch.Generator(device).manual_seed(1)

        def image(channels: int, height: int, width: int) -> Tensor:
            return torch.empty(
                N, channels, height, width,
                dtype=dtype, device=device, memory_format=torch.channels_last,
            )  # fmt: skip

        def table(channels: int) -> tuple[Tensor, Tensor]:
            gamma = torch.empty(channels, device=device).uniform_(0.5, 1.5, generator=rng)
            return gamma, torch.empty(channels, device=device).normal_(0, 0.5, generator=rng)

        filters = layer.geometry.weight_shape
        self.x = image(C, layer.height, layer.width).normal_(generator=rng)
        self.weight = torch.empty(
            filters, dtype=dtype, device=device, memory_format=torch.channels_last
        ).normal_(0, (filters[1] * filters[2] * filters[3]) ** -0.5, generator=rng)
        self.bias = None
        if layer.bias:
            self.bias = torch.empty(K, dtype=dtype, device=device).normal_(generator=rng)
        self.norm_in = None if layer.first else _norm(self.x, *table(C))
        self.z, self.y = image(C, layer.height, layer.width), image(K, P, Q)
        for n in range(N):
            self.z[n : n + 1] = prologue_reference(self._prologue(n))
            self.y[n : n + 1] = self.convolved(self.z[n : n + 1].float())
        self.gamma, self.beta = table(K)
        self.norm = _norm(self.y, self.gamma, self.beta) if layer.norm else None
        self.dout = image(K, P, Q).normal_(generator=rng)
        self.g, self.sums, self.coef, self.coef64 = self.dout, None, None, None
        if layer.norm:
            self.g = torch.empty_like(self.dout)
            for n in range(N):
                after = Prologue(self.y[n : n + 1], self.norm, act=layer.act, slope=SLOPE)
                self.g[n : n + 1] = prologue_backward_reference(after, self.dout[n : n + 1])
            sums, (mean, scale, _, rstd) = _sums(self.g, self.y, self.norm), self.norm.double()
            g, gy = sums[:2] / (N * P * Q)
            self.coef64 = torch.stack([mean, scale, -scale * rstd**2 * gy, -scale * g])
            self.sums, self.coef = sums.float(), self.coef64.float()

    @property
    def act(self) -> str:
        """The activation of the prologue."""
        return "none" if self.layer.first else self.layer.act

    def convolved(self, z: Tensor) -> Tensor:
        """Return the convolution of z in z's own type."""
        g = self.layer.geometry
        bias = None if self.bias is None else self.bias.to(z.dtype)
        return F.conv2d(z, self.weight.to(z.dtype), bias, g.stride, g.padding, g.dilation, g.groups)

    def dy(self, n: int, rows: slice = slice(None), channels: slice = slice(None)) -> Tensor:
        """Return image n's gradient of y, as it is multiplied, in float64: [1, k, p, Q]."""
        g = self.g[n : n + 1, channels, rows].double()
        coef = None if self.coef64 is None else self.coef64[:, channels]
        dy = gradient_reference(g, self.y[n : n + 1, channels, rows].double(), coef)
        return dy.to(self.dtype).double()

    def _prologue(self, n: int, rows: slice = slice(None), wide: bool = False) -> Prologue:
        x, norm = self.x[n : n + 1, :, rows], self.norm_in
        if wide:
            x, norm = x.double(), None if norm is None else norm.double()
        return Prologue(x, norm, act=self.act, slope=SLOPE)


def wrong(case: Case, results: Results) -> list[str]:
    """Return the names of the results that differ from float64 by more than is allowed."""
    checks = {
        "y": _check_rows(case, results, "y", _want_y),
        "out": _check_rows(case, results, "out", _want_out),
        "dz": _check_rows(case, results, "dz", _want_dz),
        "g_prev": _check_rows(case, results, "g_prev", _want_g_prev),
        "norm": _check_norm(case, results),
        "sums_prev": _check_sums(case, results),
        "dw": _check_dw(case, results),
        "db": _check_db(case, results),
    }
    return [name for name, agrees in checks.items() if name in results and not all(agrees)]


def _check_rows(case: Case, results: Results, name: str, want) -> Iterator[bool]:
    """Yield whether rows at the edges and in the middle of the first and the last image agree."""
    image = results[name]
    N, H = image.shape[0], image.shape[2]
    for n in sorted({0, N - 1}):
        for h in sorted({0, 1 % H, H // 2, H - 1}):
            expected, allowed = want(case, n, h)
            yield _agree(image[n : n + 1, :, h : h + 1], expected, allowed)


def _agree(given: Tensor, wanted: Tensor, allowed: Tensor) -> bool:
    return bool(((given.double() - wanted).abs() <= allowed).all())  # NaN agrees with nothing


def _allowed(case: Case, wanted: Tensor, spread: Tensor, terms: int) -> Tensor:
    """Return what a sum of terms may be off; spread is the root of the sum of their squares."""
    eps, eps32 = torch.finfo(case.dtype).eps, torch.finfo(torch.float32).eps
    # Factors may be rounded to either side, and torch.compile rounds some later than others do.
    return eps * wanted.abs() + (4 * eps + 8 * eps32 * terms**0.5) * spread


def _want_y(case: Case, n: int, p: int) -> tuple[Tensor, Tensor]:
    """Return row p of y, and what it may be off."""
    g, weight = case.layer.geometry, case.weight.double()
    first = p * g.stride[0] - g.padding[0]
    taps = torch.arange(weight.shape[2]) * g.dilation[0] + first
    inside = (taps >= 0) & (taps < case.layer.height)
    rows = case.z[n : n + 1, :, taps.clamp(0, case.layer.height - 1)].double()
    rows *= inside.to(rows.device, rows.dtype)[:, None]
    moves = (1, g.stride[1]), (0, g.padding[1]), (1, g.dilation[1]), g.groups
    bias = None if case.bias is None else case.bias.double()
    y = F.conv2d(rows, weight, bias, *moves)
    spread = F.conv2d(rows**2, weight**2, None, *moves).sqrt()
    return y, _allowed(case, y, spread, weight[0].numel())


def _want_out(case: Case, n: int, p: int) -> tuple[Tensor, Tensor]:
    """Return row p of act(norm(y)), or of y without a norm, and what it may be off."""
    y, off = _want_y(case, n, p)
    if case.norm is None:
        return y, off
    norm, eps = case.norm.double(), torch.finfo(case.dtype).eps
    scale = norm[1, :, None, None].abs()
    pre = normalised(y, norm)
    return activated(pre, case.layer.act, SLOPE), (
        off + eps * y.abs()
    ) * scale + 2 * eps * pre.abs()


def _want_dz(case: Case, n: int, h: int) -> tuple[Tensor, Tensor]:
    """Return row h of the gradient of z, and what it may be off."""
    g, weight = case.layer.geometry, case.weight.double()
    (P, _), span = case.layer.output_size, (weight.shape[2] - 1) * g.dilation[0]
    # Row h meets row p of y by the tap (h + padding - p * stride) / dilation.
    first = max(0, -(-(h + g.padding[0] - span) // g.stride[0]))
    last = min(P - 1, (h + g.padding[0]) // g.stride[0])
    if first > last:
        nothing = torch.zeros(1, case.layer.channels, 1, case.layer.width).to(weight)
        return nothing, nothing
    dy = case.dy(n, slice(first, last + 1))
    size = (last - first) * g.stride[0] + span + 1
    shape = 1, case.layer.channels, size, case.layer.width
    moves = g.stride, (0, g.padding[1]), g.dilation, g.groups
    row = h + g.padding[0] - first * g.stride[0]

    def taken_back(weight: Tensor, dy: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_input(shape, weight, dy, *moves)[:, :, row : row + 1]

    dz, spread = taken_back(weight, dy), taken_back(weight**2, dy**2).clamp(min=0).sqrt()
    return dz, _allowed(case, dz, spread, weight[:, 0].numel())


def _want_g_prev(case: Case, n: int, h: int) -> tuple[Tensor, Tensor]:
    """Return row h of the gradient of what the prologue activates, and what it may be off."""
    dz, off = _want_dz(case, n, h)
    prologue = case._prologue(n, slice(h, h + 1), wide=True)
    pre = normalised(prologue.x, prologue.norm)
    near = pre.abs() < 1e-4  # float32 may see the other side of the activation's kink
    return prologue_backward_reference(prologue, dz), off + dz.abs() * near


def _check_norm(case: Case, results: Results) -> Iterator[bool]:
    """Yield whether mean, scale, shift and inverse deviation are those of y as it was stored."""
    wanted = _norm(results["y"], case.gamma, case.beta, wide=True)
    deviation = 1 / wanted[3]
    eps = torch.finfo(torch.float32).eps
    for row, size in enumerate((wanted[0].abs() + deviation, wanted[1], wanted[2], wanted[3])):
        yield _agree(results["norm"][row], wanted[row], 64 * eps * size.abs())


def _check_sums(case: Case, results: Results) -> Iterator[bool]:
    g, x = results["g_prev"], case.x
    wanted, spread = _sums(g, x, case.norm_in), _sums(g, x, case.norm_in, squared=True).sqrt()
    terms = g.numel() // g.shape[1]
    allowed = 8 * torch.finfo(torch.float32).eps * terms**0.5 * spread
    yield _agree(results["sums_prev"][:2], wanted[:2], allowed[:2])


def _check_dw(case: Case, results: Results) -> Iterator[bool]:
    """Yield whether the gradients of the first, the middle and the last filter agree."""
    g, dw = case.layer.geometry, results["dw"]
    K, CG, R, S = dw.shape
    (P, Q), N = case.layer.output_size, len(case.x)
    chosen = sorted({0, K // 2, K - 1})[:FILTERS]
    wanted = torch.zeros(2, len(chosen), CG, R, S, dtype=torch.float64, device=dw.device)
    for n in range(N):
        z = F.pad(case.z[n].double(), (g.padding[1],) * 2 + (g.padding[0],) * 2)
        for i, k in enumerate(chosen):
            dy = case.dy(n, channels=slice(k, k + 1))[0, 0]
            group = z[k // (K // g.groups) * CG :][:CG]
            for r in range(R):
                rows = group[:, r * g.dilation[0] :][:, :: g.stride[0]][:, :P]
                for s in range(S):
                    seen = rows[:, :, s * g.dilation[1] :][:, :, :: g.stride[1]][:, :, :Q]
                    terms = seen * dy
                    wanted[0, i, :, r, s] += terms.sum((1, 2))
                    wanted[1, i, :, r, s] += terms.square_().sum((1, 2))
    allowed = _allowed(case, wanted[0], 2 * wanted[1].sqrt(), N * P * Q)
    yield _agree(dw[chosen], wanted[0], allowed)


def _check_db(case: Case, results: Results) -> Iterator[bool]:
    (P, Q), N = case.layer.output_size, len(case.x)
    wanted = torch.zeros(2, case.layer.outputs, dtype=torch.float64, device=case.x.device)
    for n in range(N):
        dy = case.dy(n)
        wanted += torch.stack([dy.sum((0, 2, 3)), dy.square().sum((0, 2, 3))])
    allowed = _allowed(case, wanted[0], 2 * wanted[1].sqrt(), N * P * Q)
    yield _agree(results["db"], wanted[0], allowed)


def _norm(y: Tensor, gamma: Tensor, beta: Tensor, wide: bool = False) -> Tensor:
    """Return the norm [4, K] of y's own statistics, summed in float64."""
    count = y.numel() // y.shape[1]
    mean = sum(image.double().sum((1, 2)) for image in y) / count
    m2 = sum((image.double() - mean[:, None, None]).square_().sum((1, 2)) for image in y)
    rstd = (m2 / count + EPS).rsqrt()
    norm = torch.stack([mean, rstd * gamma, beta.double(), rstd])
    return norm if wide else norm.float()


def _sums(g: Tensor, x: Tensor, norm: Tensor | None, squared: bool = False) -> Tensor:
    """Return the sums over pixels of g and of g (x - mean), or of their squares, [3, C]."""
    sums = torch.zeros(3, g.shape[1], dtype=torch.float64, device=g.device)
    mean = 0 if norm is None else norm[0, :, None, None].double()
    for n in range(len(g)):
        one = g[n : n + 1].double()
        both = torch.stack([one, one * (x[n : n + 1].double() - mean)])
        sums[:2] += (both.square_() if squared else both).sum((1, 3, 4))
    return sums
