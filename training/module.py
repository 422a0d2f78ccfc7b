"""What one training step and one validation are, as a Lightning module."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ..engine import Plan, convert
from ..events import Event
from ..models import uresnet
from ..ops.batch_norm import SyncBatchNorm
from .config import TrainConfig, parse_network
from .loss import SegmentationLoss
from .metrics import SegmentationMetrics


def build_network(config: TrainConfig) -> nn.Module:
    """Return the network as torch's layers, with fresh weights, from torch's random generator.

    Raises ValueError as `parse_network`.
    """
    model = uresnet(parse_network(config.preset, config.network))
    if config.sync_batch_norm:
        model = SyncBatchNorm.convert_sync_batchnorm(model)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def build_model(config: TrainConfig, plan: Plan | None = None) -> nn.Module:
    """Return `build_network`'s network, converted as a plan or else config says.

    A run's network without its plan, as for predictions, has fused segments too.

    Raises ValueError as `parse_network`, and for the plan of another network.
    """
    model = build_network(config)
    if plan is not None:
        return convert(model, plan=plan, inplace=True)
    if config.policy != "none" or config.memory is not None:
        policy = "keep" if config.policy == "none" else config.policy
        return convert(model, policy=policy, inplace=True)
    return model


def build_optimizer(
    config: TrainConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimizer of a run."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
        )
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return kind(parameters, config.lr, weight_decay=config.weight_decay)


class SegmentationModule(LightningModule):
    """A network that labels pixels, with its loss, optimizer and validation.

    Attributes:
        step_loss: the loss of the optimizer step under way: the mean over its forward passes so
            far, of the whole batch over all processes; equal on every process.
        validation: the newest validation's values by name, equal on every process.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, steps: int):
        """Train model over that many optimizer steps."""
        super().__init__()
        self.config, self.model, self.steps = config, model, steps
        self.loss = SegmentationLoss(config.loss)
        # Processes may hold different numbers of events here, so nothing is summed before the end.
        self.validation_loss = SegmentationLoss(config.loss, synchronize=False)
        self.metrics = SegmentationMetrics()
        self.losses: list[Tensor] = []
        self.register_buffer("validation_sums", torch.zeros(2), persistent=False)
        self.validation: dict[str, float] = {}

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the network's logits, a [N, 3, H, W] a plane, for image [N, 3, H, W]."""
        return self.model(image)

    def on_train_batch_start(self, batch: Event, batch_idx: int) -> None:
        """Seed whatever the network draws by the batch's number, so that a resumed run draws it."""
        if batch_idx % self.config.accumulate == 0:
            self.losses.clear()
        words = np.random.SeedSequence((self.config.seed, self.global_rank, batch_idx))
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0]) >> 1)

    def training_step(self, batch: Event, batch_idx: int) -> Tensor:
        """Return the batch's loss."""
        loss = self.loss(self.model(batch["image"]), batch["labels"])
        self.losses.append(self.loss.global_value)
        return loss

    @property
    def step_loss(self) -> float:
        """See the class."""
        return torch.stack(self.losses).mean().item()

    def validation_step(self, batch: Event, batch_idx: int) -> None:
        """Count one batch."""
        logits = self.model(batch["image"])
        images = len(batch["labels"])
        self.validation_sums[0] += images * self.validation_loss(logits, batch["labels"]).float()
        self.validation_sums[1] += images
        self.metrics.update(logits, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Add up over all processes, log, and begin anew."""
        sums = self.trainer.strategy.reduce(self.validation_sums.clone(), reduce_op="sum")
        values = {"loss": sums[0] / sums[1], **self.metrics.compute()}
        self.validation = {name: float(value) for name, value in values.items()}
        self.metrics.reset()
        self.validation_sums.zero_()
        if self.logger is not None:
            logged = {f"validation/{name}": value for name, value in self.validation.items()}
            self.logger.log_metrics(logged, step=self.trainer.global_step)

    def configure_optimizers(self) -> dict:
        """Return the optimizer, and its learning rate as a function of the step."""
        optimizer = build_optimizer(self.config, self.model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_share)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _lr_share(self, step: int) -> float:
        """Return the share of the learning rate in optimizer step `step`, from 0."""
        c = self.config
        if step < c.warmup:
            return (step + 1) / (c.warmup + 1)
        if c.schedule == "constant":
            return 1.0
        progress = (step - c.warmup) / max(1, self.steps - c.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the configuration, so that a checkpoint alone tells what it holds."""
        checkpoint["config"] = self.config.as_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Let a run that had ended go on, where it is given more steps."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["is_last_batch"] = False

    def state_dict(self, *args, **kwargs) -> dict:
        """Return the network's own state_dict: a checkpoint's weights are usable without us."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """Load the network's own state_dict."""
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)
