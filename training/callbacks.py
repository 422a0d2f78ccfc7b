"""What happens around the steps: checkpoints, stopping, curves, speed and memory, progress."""

import contextlib
import math
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from ..engine import Plan
from .checkpoint import BEST, LAST
from .config import TrainConfig
from .memory import comparison, summary

GIB = 2**30
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; a scheduler's two warnings


class NonFiniteError(RuntimeError):
    """The loss or a weight is NaN or infinite; the message names the optimizer step."""


class StoppedError(RuntimeError):
    """A signal ended the run after a checkpoint; the message names both."""


class RunKeeper(Callback):
    """Keeps the run: a checkpoint now and then and at the end, the best one, a clean stop.

    A checkpoint is written between optimizer steps only, never from weights that are not finite,
    and where a validation follows the step, after it: a resumed run must not skip it. (Only a
    signal does not wait for that validation.) All processes take the same decisions.
    """

    def __init__(self, config: TrainConfig, steps: int):
        """Keep a run of that many steps."""
        self.config, self.steps, self.best = config, steps, -math.inf
        self.folder = Path(config.out)
        self._handlers: dict[int, object] = {}
        self._signal: int | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Take over the signals: Lightning's handler talks to other processes mid-step."""

        def note(number: int, _: object) -> None:
            if self._signal == number == signal.SIGINT:
                raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step's end
            self._signal = number

        with contextlib.suppress(ValueError):  # not the main thread: signals are not ours to take
            self._handlers = {number: signal.signal(number, note) for number in SIGNALS}

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        """After each optimizer step: check the loss; save; stop if told to."""
        if (batch_idx + 1) % self.config.accumulate:
            return
        step = trainer.global_step
        if not math.isfinite(module.step_loss):
            raise NonFiniteError(
                f"loss is {module.step_loss} in optimizer step {step}; {self._kept()}"
            )
        last = step == self.steps
        if last:
            trainer.should_stop = True  # which makes Lightning validate now
        told = trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)
        if told and not last:
            self._save(trainer, LAST)
            raise StoppedError(
                f"stopped by a signal after optimizer step {step} of {self.steps}; "
                f"{self.folder / LAST} continues it with --resume auto"
            )
        if not self._validates(trainer, step):
            self._save_when_due(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the best; save what waited for the validation."""
        if trainer.state.fn != "fit":
            return
        score = module.validation["mean_iou"]
        if score > self.best:
            self.best = score
            self._save(trainer, BEST)
        self._save_when_due(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: Exception) -> None:
        """Give the signals back."""
        self.on_train_end(trainer, module)

    def state_dict(self) -> dict:
        """Return the best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        """Take up the best score of the resumed run."""
        self.best = state["best"]

    def _validates(self, trainer: Trainer, step: int) -> bool:
        every = self.config.validate_every
        return bool(trainer.enable_validation) and (
            step == self.steps or (every > 0 and step % every == 0)
        )

    def _save_when_due(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step % self.config.checkpoint_every == 0 or step == self.steps:
            self._save(trainer, LAST)

    def _save(self, trainer: Trainer, name: str) -> None:
        state = trainer.lightning_module.model.state_dict()
        finite = [t.isfinite().all() for t in state.values() if t.is_floating_point()]
        if not torch.stack(finite).all():
            broken = [name for name, t in state.items() if not t.isfinite().all()]
            raise NonFiniteError(
                f"{len(broken)} tensors, {broken[0]} the first, hold NaN or Inf after optimizer "
                f"step {trainer.global_step}; {self._kept()}"
            )
        for logger in trainer.loggers:
            logger.save()  # so that the curves reach as far as the checkpoint
        trainer.save_checkpoint(self.folder / name)

    def _kept(self) -> str:
        kept = self.folder / LAST
        return f"{kept} is the last good checkpoint" if kept.exists() else "no checkpoint was due"


class Meter(Callback):
    """Curves of loss, learning rate, images/s and peak memory, a point an optimizer step.

    A step's time runs from the end of the step before, reading of events included; steps after a
    validation or a checkpoint, and a run's first, are not timed.
    """

    def __init__(self, config: TrainConfig):
        """Begin with nothing measured."""
        self.config = config
        self.images, self.seconds, self._learning_rate = 0, 0.0, 0.0
        self._since: float | None = None

    @property
    def images_per_second(self) -> float:
        """Images over all processes a second, over the timed steps; NaN if there are none."""
        return self.images / self.seconds if self.seconds else math.nan

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer):
        """Note the step's learning rate: at the step's end it is the next one's."""
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        """Log the optimizer step that has ended."""
        if (batch_idx + 1) % self.config.accumulate:
            return
        values = {"loss": module.step_loss}  # first: it waits for the device
        now = time.perf_counter()
        images = self.config.batch_size * self.config.accumulate * trainer.world_size
        if self._since is not None:
            self.images += images
            self.seconds += now - self._since
            values["images_per_second"] = images / (now - self._since)
        values["peak_memory_gib"] = peak_memory() / GIB
        values["learning_rate"] = self._learning_rate
        if trainer.logger is not None:
            named = {f"training/{name}": value for name, value in values.items()}
            trainer.logger.log_metrics(named, step=trainer.global_step)
        shown = {"loss": values["loss"]}
        if "images_per_second" in values:
            shown["images/s"] = values["images_per_second"]
        module.log_dict(shown, prog_bar=True, logger=False, rank_zero_only=True)
        self._since = now

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave the validation out of the next step's time."""
        self._since = None

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint) -> None:
        """Leave the saving out of the next step's time."""
        self._since = None


class MemoryCheck(Callback):
    """Prints what the run's plan promises, and on a GPU the second step's peak beside it.

    The first step is not measured, for it tunes kernels; peaks are counted anew after it.
    """

    def __init__(self, config: TrainConfig, plan: Plan):
        """Check a plan."""
        self.config, self.plan, self._steps = config, plan, 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Print the promise."""
        if trainer.is_global_zero:
            print(summary(self.plan), flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        """Measure the second step."""
        if (batch_idx + 1) % self.config.accumulate or module.device.type != "cuda":
            return
        self._steps += 1
        if self._steps == 1:
            torch.cuda.reset_peak_memory_stats(module.device)
        elif self._steps == 2 and trainer.is_global_zero:
            measured = torch.cuda.max_memory_allocated(module.device)
            print(comparison(self.plan, measured), flush=True)


class Bar(RichProgressBar):
    """Lightning's progress bar over the run's batches, without its epochs."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


class Lines(Callback):
    """Progress for a log file: a line every ten seconds at most."""

    def __init__(self, config: TrainConfig, steps: int, meter: Meter):
        """Report on a run of that many steps."""
        self.config, self.steps, self.meter = config, steps, meter
        self._printed = -math.inf

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        """Print, if it is time."""
        due = time.perf_counter() - self._printed >= 10 or trainer.global_step == self.steps
        if trainer.is_global_zero and due and (batch_idx + 1) % self.config.accumulate == 0:
            self._printed = time.perf_counter()
            line = f"step {trainer.global_step}/{self.steps}  loss {module.step_loss:.4g}"
            if self.meter.seconds:
                line += f"  {self.meter.images_per_second:.3g} images/s"
            print(line, flush=True)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Print the newest validation."""
        if trainer.is_global_zero:
            values = "  ".join(
                f"{name} {module.validation[name]:.4g}"
                for name in ("loss", "non_background_accuracy", "cosmic_iou", "neutrino_iou")
            )
            print(f"step {trainer.global_step}/{self.steps}  validation  {values}", flush=True)


def progress(config: TrainConfig, steps: int, meter: Meter) -> Callback:
    """Return a progress bar for a terminal, and lines for anything else."""
    return Bar() if sys.stdout.isatty() else Lines(config, steps, meter)


def peak_memory() -> int:
    """Return the most bytes in use so far: the GPU's where one is in use, or else the host's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
