"""A training run from its configuration to its summary."""

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from .callbacks import MemoryCheck, Meter, RunKeeper, peak_memory, progress
from .checkpoint import BEST, LAST, AtomicCheckpointIO, load
from .config import TrainConfig
from .curves import FOLDER, draw_curves
from .data import open_events, training_loader, validation_loader
from .memory import plan_run, save_plan
from .module import SegmentationModule, build_model, build_network, build_optimizer

CONFIG = "config.yaml"
PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed", "fp64": "64-true"}


@dataclass(frozen=True)
class Summary:
    """What a run has done; speed is NaN where fewer than two steps ran."""

    steps: int
    images_per_second: float  # over all processes
    peak_memory: int  # bytes, of this process' device
    loss: float | None  # of the last step; None if there was none left to do
    validation: dict[str, float]  # the newest validation's values; empty without one
    folder: Path


def train(config: TrainConfig, resume: str | None = None) -> Summary:
    """Train as config says, in as many processes as torchrun started, and return a summary.

    The folder config.out gets config.yaml, last.ckpt, with validation best.ckpt, curves for
    TensorBoard, and at the end a picture of them; with config.memory also plan.json. A resumed run
    takes the same steps, on the same events, with the same losses as one that was never
    interrupted.

    Args:
        config: the run.
        resume: None to start afresh, "auto" to continue from config.out's last checkpoint if it
            has one, or the path of a checkpoint.

    Raises:
        ValueError: an option, a file or the checkpoint does not fit, or the memory does not
            suffice; before anything is written.
        NonFiniteError: a loss or a weight is NaN or infinite.
        StoppedError: a signal came; the run is saved.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    accelerator = _accelerator(config)
    events, validation_events = open_events(config)
    checkpoint, done, before = _resumed(config, resume)
    plan = None
    if config.memory is not None:
        config, plan = plan_run(
            config,
            partial(build_network, config),
            partial(build_optimizer, config),
            accelerator=accelerator,
            processes=processes,
            before=before,
        )
    steps = config.total_steps(len(events), processes)
    if done > steps:
        raise ValueError(f"{checkpoint}: has taken {done} steps already; the run has {steps}")

    seed_everything(config.seed, verbose=False)
    module = SegmentationModule(config, build_model(config, plan), steps)
    validation = None
    if validation_events is not None:
        validation = validation_loader(config, validation_events, rank=rank, world=processes)
    training = training_loader(config, events, steps=steps, done=done, rank=rank, world=processes)

    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        config.write(folder / CONFIG)
        if plan is not None:
            save_plan(plan, folder)
    meter = Meter(config)
    checks = [] if plan is None else [MemoryCheck(config, plan)]
    with _quiet():
        trainer = Trainer(
            accelerator=accelerator,
            precision=PRECISION[config.precision],
            **_processes(processes),
            max_epochs=1,
            min_epochs=0,  # so that the last step may ask for a validation
            max_steps=steps,
            accumulate_grad_batches=config.accumulate,
            val_check_interval=(config.validate_every or steps) * config.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            limit_val_batches=0 if validation is None else None,
            callbacks=[meter, RunKeeper(config, steps), progress(config, steps, meter), *checks],
            plugins=[AtomicCheckpointIO(), _environment(processes)],
            logger=TensorBoardLogger(folder, name=FOLDER, version="", purge_step=done + 1),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=sys.stdout.isatty(),
            enable_model_summary=False,
            use_distributed_sampler=False,
            deterministic="warn" if config.deterministic else False,
            default_root_dir=folder,
        )
        if config.validate_first and validation is not None and done == 0:
            trainer.validate(module, validation, verbose=False)
        trainer.fit(module, training, validation, ckpt_path=checkpoint)
    if rank == 0:
        draw_curves(folder)
    return Summary(
        steps=trainer.global_step,
        images_per_second=meter.images_per_second,
        peak_memory=peak_memory(),
        loss=module.step_loss if module.losses else None,
        validation=module.validation,
        folder=folder,
    )


def _accelerator(config: TrainConfig) -> str:
    present = torch.cuda.is_available()
    if config.device == "gpu" and not present:
        raise ValueError("want a GPU for device gpu; torch finds none")
    accelerator = "gpu" if present and config.device != "cpu" else "cpu"
    if config.precision == "fp16" and accelerator == "cpu":
        raise ValueError("want a GPU for precision fp16; a CPU trains in fp32 or bf16")
    return accelerator


def _resumed(config: TrainConfig, resume: str | None) -> tuple[Path | None, int, dict | None]:
    """Return the checkpoint to go on from, if any, its optimizer steps, and its run's options."""
    last = Path(config.out) / LAST
    if resume is None and last.exists():
        raise ValueError(
            f"{config.out} holds a run already: continue it with --resume auto, or name another "
            "folder with --out"
        )
    if resume is None or (resume == "auto" and not last.exists()):
        return None, 0, None
    path = last if resume == "auto" else Path(resume)
    checkpoint = load(path)
    for name in ("model", "preset", "network", "optimizer"):
        before, now = checkpoint["config"].get(name), getattr(config, name)
        if before != now:
            raise ValueError(f"{path}: want {name} {before!r}, as the run began; got {now!r}")
    return path, checkpoint["global_step"], checkpoint["config"]


def _processes(processes: int) -> dict:
    """Return the Trainer's arguments for what torchrun has started: nothing, or this many."""
    if processes == 1:
        return {"devices": 1}
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    strategy = DDPStrategy(gradient_as_bucket_view=True, timeout=timedelta(minutes=30))
    return {"devices": here, "num_nodes": processes // here, "strategy": strategy}


def _environment(processes: int) -> LightningEnvironment | TorchElasticEnvironment:
    # Named, because Lightning would otherwise read a batch system's variables too.
    return TorchElasticEnvironment() if processes > 1 else LightningEnvironment()


class _quiet(warnings.catch_warnings):
    """Keep Lightning's advice, to which this file is the answer, from the user."""

    def __enter__(self):
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        result = super().__enter__()
        for message in (
            ".*does not have many workers.*",
            ".*have no `val_dataloader`.*",
            ".*your dataloader is not resumable.*",
            ".*checkpoint directory .* exists and is not empty.*",
            ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
        ):
            warnings.filterwarnings("ignore", message)
        return result


__all__ = ["BEST", "CONFIG", "LAST", "Summary", "train"]
