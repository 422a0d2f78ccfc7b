"""How a layer is computed by us and by others.

Every provider computes the same layer, from the same tensors, in channels_last:

    triton    our operators on our kernels; the input is raw: normalised and activated on the way in
    composed  our operators on cuDNN, with our passes of ops/pointwise.py around it: the same result
    fullres   our operators as a dispatch table decides, of which the first two are the choices
    cudnn     the bare convolution and its two gradients, of an input that is activated already, and
              of an output's gradient that was taken through the normalisation
    eager     torch's convolution, normalisation and activation, one after the other
    compile   the same under torch.compile
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..ops import dispatch
from ..ops.conv_backward import conv2d_backward
from ..ops.conv_dgrad import conv2d_dgrad
from ..ops.conv_fwd import conv2d_fwd
from ..ops.conv_wgrad import conv2d_wgrad
from ..ops.norm import batch_norm_backward, batch_norm_forward
from .case import EPS, SLOPE, Case, Results

Calls = dict[str, Callable[[], Results]]


def providers(case: Case, compiled: bool = True) -> dict[str, Calls]:
    """Return the providers' passes as calls that return what they computed.

    Both gradients in one pass are ours alone, where our kernel computes them so.
    """
    apart = [name for name in case.layer.passes if name in ("forward", "dgrad", "wgrad")]
    together = ["backward"] if case.layer.one_pass(len(case.x), case.dtype) else []
    calls = {"triton": _ours(case, "triton", apart + together)}
    calls |= {"composed": _ours(case, "cudnn", apart)}
    calls |= {"cudnn": _cudnn(case), "eager": _torch(case, lambda module: module)}
    if compiled:
        calls["compile"] = _torch(case, lambda module: torch.compile(module, dynamic=False))
    return calls


def dispatched(case: Case) -> Callable[[], Results]:
    """Return the whole layer by our operators, as the dispatch in force decides."""
    return _ours(case, None, ["layer"])["layer"]


def _ours(case: Case, choice: str | None, wanted: Iterable[str]) -> Calls:
    """Return our operators' passes, by one implementation, or by what dispatch decides."""
    c, geometry = case, case.layer.geometry
    moves = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    prologue = c.x, c.norm_in, None, None, c.act, SLOPE, "none"
    running = torch.zeros_like(c.gamma), torch.ones_like(c.gamma)
    count = c.y.numel() // c.y.shape[1]

    def forward() -> Results:
        second = None, None, "none", SLOPE, "none"
        y, moments, _ = conv2d_fwd(
            *prologue, *second, c.weight, c.bias, *moves, c.layer.norm, False
        )
        if not c.layer.norm:
            return {"y": y}
        norm = batch_norm_forward(moments, c.gamma, c.beta, *running, None, 0.1, EPS)
        return {"y": y, "norm": norm}

    def through(y: Tensor, norm: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return y and the coefficients, where the layer is normalised."""
        if norm is None:
            return None, None
        return y, batch_norm_backward(c.sums, norm, count, True)[0]

    def dgrad(y: Tensor = c.y, norm: Tensor | None = c.norm) -> Results:
        g_prev, sums = conv2d_dgrad(
            c.g, *through(y, norm), c.weight, c.x.shape, *prologue, None, *moves, True
        )
        return {"g_prev": g_prev, "sums_prev": sums}

    def wgrad(y: Tensor = c.y, norm: Tensor | None = c.norm) -> Results:
        dw, db = conv2d_wgrad(
            *prologue, c.g, *through(y, norm), c.weight.shape, *moves, c.layer.bias
        )
        return {"dw": dw, "db": db} if c.layer.bias else {"dw": dw}

    def backward(y: Tensor = c.y, norm: Tensor | None = c.norm) -> Results:
        g_prev, sums, dw, db = conv2d_backward(
            c.g, *through(y, norm), c.weight, *prologue, None, *moves, True, c.layer.bias
        )
        made = {"g_prev": g_prev, "sums_prev": sums, "dw": dw}
        return {**made, "db": db} if c.layer.bias else made

    def layer() -> Results:
        made = forward()
        gradients = wgrad if c.layer.first else backward
        return {**made, **gradients(made["y"], made.get("norm"))}

    calls = {"forward": forward, "dgrad": dgrad, "wgrad": wgrad, "backward": backward}
    calls = {name: call for name, call in (calls | {"layer": layer}).items() if name in wanted}
    return {name: _preferring(choice, call) for name, call in calls.items()}


def _preferring(choice: str | None, call: Callable[[], Results]) -> Callable[[], Results]:
    def preferred() -> Results:
        with dispatch.prefer(choice):
            return call()

    return call if choice is None else preferred


def _cudnn(case: Case) -> Calls:
    c, g = case, case.layer.geometry
    dy = c.g
    if c.layer.norm:
        dy = torch.empty_like(c.g)
        for n in range(len(dy)):
            dy[n : n + 1] = c.dy(n)

    def gradient(dz: bool, dw: bool) -> tuple[Tensor | None, ...]:
        return torch.ops.aten.convolution_backward(
            dy, c.z, c.weight, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups,
            [dz, dw, False],
        )  # fmt: skip

    calls = {
        "forward": lambda: {"y": c.convolved(c.z)},
        "dgrad": lambda: {"dz": gradient(True, False)[0]},
        "wgrad": lambda: {"dw": gradient(False, True)[1]},
    }
    return {name: call for name, call in calls.items() if name in c.layer.passes}


def _torch(case: Case, wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> Calls:
    """Return a layer of torch's own modules: its forward pass alone, and forward and backward."""
    c, g = case, case.layer.geometry
    conv = nn.Conv2d(
        c.layer.channels, c.layer.outputs, c.layer.kernel, g.stride, g.padding, g.dilation,
        g.groups, c.layer.bias, device=c.x.device, dtype=c.dtype,
    )  # fmt: skip
    conv.weight.data = c.weight
    if c.layer.bias:
        conv.bias.data = c.bias
    modules = [conv]
    if c.layer.norm:
        norm = nn.BatchNorm2d(c.layer.outputs, EPS, device=c.x.device)
        norm.weight.data, norm.bias.data = c.gamma, c.beta
        act = {"relu": lambda: nn.ReLU(inplace=True), "leaky_relu": lambda: nn.LeakyReLU(SLOPE)}
        modules += [norm, act[c.layer.act]()]
    module = nn.Sequential(*modules)
    run = wrap(module)
    z = c.z if c.layer.first else c.z.detach().requires_grad_()

    def forward() -> Results:
        with torch.no_grad():
            return {"out": run(c.z)}

    def layer() -> Results:
        wanted = dict(module.named_parameters())
        if not c.layer.first:
            wanted["dz"] = z
        out = run(z)
        gradients = torch.autograd.grad(out, list(wanted.values()), c.dout)
        made = dict(zip(wanted, gradients, strict=True))
        results = {"out": out.detach(), "dw": made["0.weight"]}
        return results if c.layer.first else {**results, "dz": made["dz"]}

    return {"forward": forward, "layer": layer}
