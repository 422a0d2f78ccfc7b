"""Batch normalisation with the statistics of all ranks' batches, on any device and backend.

Over the M pixels of a channel, those of all ranks together:

    mean = sum x / M            var = sum (x - mean)^2 / M         rstd = 1 / sqrt(var + eps)
    y    = (x - mean) * rstd * weight + bias
    dx   = weight * rstd * (dy - sum dy / M - (x - mean) * rstd^2 * sum(dy * (x - mean)) / M)

Each rank takes (M, mean, M2), M2 = sum (x - mean)^2, of its own pixels; what the ranks found is
joined by the pairwise update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances", 1979, over all parts at once: a weighted mean, and the
parts' M2 plus what their means deviate. No variance is the difference of two large moments.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .autograd import first_order

PART_ELEMENTS = 1 << 24  # 64 MiB of fp32: what half-precision inputs are widened by at a time

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SyncBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of [N, C, ...] over the global batch of all ranks in `process_group`.

    Takes `torch.nn.SyncBatchNorm`'s place: its arguments, attributes, `state_dict` and results.
    It works on CPU tensors too, and with gloo. In training, with `torch.distributed` initialised
    and more than one rank, statistics are those of the global batch, whatever each rank's share
    of it is, none included; otherwise this is the ordinary batch normalisation.

    Communicates on every rank alike: one all_gather of 2 C + 1 numbers in forward, one all_reduce
    of 2 C in backward if the input requires a gradient. Ranks' parts are joined in the order of
    ranks, so a run can be repeated bit by bit. The gradients of weight and bias are this rank's
    part, for DistributedDataParallel to average as those of any layer.

    Statistics are float32 (float64 for float64 inputs), the output has the input's dtype and
    memory format. Saves for backward: the input, and [C] statistics. Backward with
    create_graph=True raises RuntimeError: there are no second derivatives.

    It is not a subclass of `torch.nn.SyncBatchNorm`, since DistributedDataParallel refuses those
    on a CPU.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Make the layer.

        Args:
            num_features: channels C.
            eps: added to the variance.
            momentum: share of the batch in the running statistics; None for the mean over all
                batches.
            affine: whether there are a weight and a bias.
            track_running_stats: whether running statistics are kept, for evaluation.
            process_group: the ranks whose batches are one; None is all.
            device: of parameters and statistics.
            dtype: of parameters and statistics.
        """
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.process_group = process_group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [N, C, ...] normalised, of its dtype and memory format.

        Running statistics move once a forward in training: towards the global batch's mean and
        its unbiased variance, M2 / (M - 1). A global batch without pixels leaves them.

        Raises:
            ValueError: x is not [N, num_features, ...] of floating-point numbers; or without
                other ranks, there is but one value a channel in training.
        """
        if x.ndim < 2 or x.shape[1] != self.num_features or x.dtype not in _DTYPES:
            raise ValueError(
                f"x must be [N, {self.num_features}, ...] of float16, bfloat16, float32 or "
                f"float64; got {list(x.shape)} of {x.dtype}"
            )
        share = self._count_batch()
        if not (self.training and _world_size(self.process_group) > 1):
            tracked = not self.training or self.track_running_stats
            return F.batch_norm(
                x,
                self.running_mean if tracked else None,
                self.running_var if tracked else None,
                self.weight,
                self.bias,
                self.training or self.running_mean is None,
                share,
                self.eps,
            )
        count, mean, m2 = _global_moments(x.detach(), self.process_group)
        if self.running_mean is not None and self.track_running_stats:
            with torch.no_grad():
                share = (count > 0).double() * share
                unbiased = m2 / (count - 1).clamp(min=1)
                for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
                    running.copy_(running * (1 - share) + batch * share)
        rstd = (m2 / count.clamp(min=1) + self.eps).rsqrt()
        return _Normalise.apply(x, self.weight, self.bias, count, mean, rstd, self.process_group)

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: dist.ProcessGroup | None = None
    ) -> torch.nn.Module:
        """Return `module` with each batch normalisation in it replaced by this one.

        Modules around them are changed in place; parameters, buffers and modes are kept, so an
        optimizer made before stays valid. A `module` that is itself a batch normalisation is
        left, and its replacement returned. One that stands in several places stays one.

        Args:
            module: any network, with BatchNorm1d, 2d, 3d or SyncBatchNorm of torch or of ours.
            process_group: as in the constructor, for all of them.
        """
        return _convert(cls, module, process_group, {})

    def _count_batch(self) -> float:
        """Count a batch in training, and return its share in the running statistics."""
        counted = self.training and self.track_running_stats
        if counted and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum


def _convert(cls, module, process_group, converted):
    if id(module) in converted:
        return converted[id(module)]
    result = module
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        result = cls(
            module.num_features,
            module.eps,
            module.momentum,
            affine=False,
            track_running_stats=False,
            process_group=process_group,
        )
        result.affine = module.affine
        result.track_running_stats = module.track_running_stats
        result.training = module.training
        result.weight, result.bias = module.weight, module.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(result, name, getattr(module, name))
    converted[id(module)] = result
    for name, child in list(module._modules.items()):  # named_children omits second places
        if child is not None:
            setattr(result, name, _convert(cls, child, process_group, converted))
    return result


class _Normalise(torch.autograd.Function):
    """y from x and the global batch's statistics, whose own part of the gradient is included."""

    @staticmethod
    def forward(ctx, x, weight, bias, count, mean, rstd, process_group):
        dtype = _statistics_dtype(x)
        scale = rstd if weight is None else rstd * weight
        mean_, scale_ = (_per_channel(v, x, dtype) for v in (mean, scale))
        bias_ = None if bias is None else _per_channel(bias, x, dtype)
        y = torch.empty_like(x)
        for part in _parts(x):
            z = (x[part].to(dtype) - mean_).mul_(scale_)
            y[part] = z if bias_ is None else z.add_(bias_)
        ctx.save_for_backward(x, weight, count, mean, rstd)
        ctx.process_group = process_group
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, weight, count, mean, rstd = ctx.saved_tensors
        dtype = _statistics_dtype(x)
        mean_ = _per_channel(mean, x, dtype)
        dims = [i for i in range(x.ndim) if i != 1]
        sums = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
        for part in _parts(x):
            dy_part = dy[part].to(dtype)
            sums[0] += dy_part.sum(dims)
            sums[1] += (x[part].to(dtype) - mean_).mul_(dy_part).sum(dims)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[1]:
            dweight = (sums[1] * rstd).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = sums[0].to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            # On every rank, one without pixels too: the others wait for it.
            totals = sums.clone()  # dbias may be a view of sums, and is this rank's part
            dist.all_reduce(totals, group=ctx.process_group)
            mean_dy, slope = totals / count.clamp(min=1)
            scale = rstd if weight is None else rstd * weight
            mean_dy_, slope_, scale_ = (
                _per_channel(v, x, dtype) for v in (mean_dy, slope * rstd * rstd, scale)
            )
            dx = torch.empty_like(x)
            for part in _parts(x):
                z = (x[part].to(dtype) - mean_).mul_(slope_).add_(mean_dy_)
                dx[part] = torch.sub(dy[part].to(dtype), z, out=z).mul_(scale_)
        return dx, dweight, dbias, None, None, None, None


def _global_moments(
    x: torch.Tensor, process_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (M [], mean [C], M2 [C]) over all ranks' x, float64: it counts exactly."""
    local = torch.cat([v.view(-1) for v in _local_moments(x)])
    gathered = [torch.empty_like(local) for _ in range(_world_size(process_group))]
    dist.all_gather(gathered, local, group=process_group)
    count, mean, m2 = torch.stack(gathered).split([1, x.shape[1], x.shape[1]], dim=1)
    return _merge(count, mean, m2)


def _local_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (M [], mean [C], M2 [C]) of this rank, float64 of what x's accumulator yields."""
    dtype = _statistics_dtype(x)
    dims = [i for i in range(x.ndim) if i != 1]
    counts, means, m2s = [], [], []
    for part in _parts(x):
        values = x[part].to(dtype)
        var, mean = torch.var_mean(values, dims, correction=0)
        counts.append(values.numel() // x.shape[1])
        means.append(mean.double())
        m2s.append(var.double() * counts[-1])
    if not counts:
        zeros = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
        return zeros.new_zeros(()), zeros[0], zeros[1]
    count = torch.tensor(counts, dtype=torch.float64, device=x.device).unsqueeze(1)
    return _merge(count, torch.stack(means), torch.stack(m2s))


def _merge(
    count: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (M [], mean [C], M2 [C]) of K parts joined: count [K, 1], mean and m2 [K, C]."""
    total = count.sum()
    weight = count / total.clamp(min=1)
    merged = (weight * mean).sum(0)
    return total, merged, (m2 + count * (mean - merged).square()).sum(0)


def _parts(x: torch.Tensor) -> Iterator[slice]:
    """Yield slices of the batch of at most `PART_ELEMENTS` values, or of one image."""
    image = math.prod(x.shape[1:])
    step = max(1, PART_ELEMENTS // max(1, image))
    for start in range(0, x.shape[0] if image else 0, step):
        yield slice(start, start + step)


def _per_channel(values: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype).view(1, -1, *(1 for _ in x.shape[2:]))


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _world_size(process_group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(process_group)
