"""Which events a run sees, in which order: a function of the seed and the step alone.

Nothing of this is state, so a run that resumes at step s reads exactly what it would have read.
"""

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from ..events import Event, EventFile, SyntheticEvents
from ..events import flip as flip_event
from .config import TrainConfig

VALIDATION_SEED = 1 << 20  # synthetic events for validation are none of those trained on


class TrainingEvents(Dataset[Event]):
    """Events by (epoch, index), so that an event's flips differ from epoch to epoch."""

    def __init__(self, events: Dataset[Event], flip_seed: int | None):
        """Flip at random by flip_seed, or not at all if it is None."""
        self.events, self.flip_seed = events, flip_seed

    def __getitem__(self, where: tuple[int, int]) -> Event:
        """Return the event at (epoch, index)."""
        epoch, index = where
        event = self.events[index]
        return event if self.flip_seed is None else flip_event(event, self.flip_seed, epoch)


class StepBatches(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) of every image of every batch of one process, from batch `start` on.

    Each epoch is a permutation of all events by (seed, epoch), and batches run on across epochs,
    so every event is seen equally often whatever the batch size. Process r of w takes the r-th of
    w equal parts of each batch of w * batch_size events: the whole does not depend on w.
    """

    def __init__(
        self,
        events: int,
        batch_size: int,
        batches: int,
        *,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        """Yield batches number start to batches - 1."""
        self.events, self.batch_size, self.batches = events, batch_size, batches
        self.start, self.seed, self.rank, self.world = start, seed, rank, world

    def __len__(self) -> int:
        """Return the batches of the whole run: Lightning counts those before `start` as done."""
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield one list a batch."""
        epoch, order = -1, []
        for batch in range(self.start, self.batches):
            first = (batch * self.world + self.rank) * self.batch_size
            where = []
            for position in range(first, first + self.batch_size):
                if position // self.events != epoch:
                    epoch = position // self.events
                    order = self._order(epoch)
                where.append((epoch, order[position % self.events]))
            yield where

    def _order(self, epoch: int) -> list[int]:
        random = torch.Generator().manual_seed((self.seed << 32) + epoch)
        return torch.randperm(self.events, generator=random).tolist()


def open_events(config: TrainConfig) -> tuple[Dataset[Event], Dataset[Event] | None]:
    """Return the events to train on and those to validate on, if any.

    Raises ValueError for a file that is missing, damaged or smaller than the image size, and for
    a split that leaves either side empty.
    """
    options = {
        "size": config.size,
        "clip": config.clip_charge,
        "log_unit": 1.0 if config.log_charge else None,
    }
    if config.synthetic:
        train = SyntheticEvents(config.events, config.seed, **options)
    else:
        train = EventFile(config.data, **options)
    if len(train) == 0:
        raise ValueError(f"{config.data}: want at least one event; got none")
    if config.val_data is not None:
        return train, EventFile(config.val_data, **options)
    if config.val_split == 0:
        return train, None
    held = round(config.val_split * len(train))
    if not 0 < held < len(train):
        raise ValueError(
            f"want a val_split that leaves events on both sides; got {config.val_split} "
            f"of {len(train)} events"
        )
    if config.synthetic:
        return train, SyntheticEvents(held, VALIDATION_SEED + config.seed, **options)
    kept = len(train) - held
    return Subset(train, range(kept)), Subset(train, range(kept, len(train)))


def training_loader(
    config: TrainConfig, events: Dataset[Event], *, steps: int, done: int, rank: int, world: int
) -> DataLoader:
    """Return the batches of optimizer steps done to steps - 1, for one process."""
    batches = StepBatches(
        len(events),
        config.batch_size,
        steps * config.accumulate,
        start=done * config.accumulate,
        seed=config.seed,
        rank=rank,
        world=world,
    )
    return DataLoader(
        TrainingEvents(events, config.seed if config.flip else None),
        batch_sampler=batches,
        **_reading(config),
    )


def validation_loader(
    config: TrainConfig, events: Dataset[Event], *, rank: int, world: int
) -> DataLoader:
    """Return every world-th event from the rank-th on, one at a time: no event twice.

    Raises ValueError where a process would get none.
    """
    if len(events) < world:
        raise ValueError(
            f"want an event to validate on for each process; got {len(events)} events "
            f"and {world} processes"
        )
    return DataLoader(
        Subset(events, range(rank, len(events), world)), batch_size=1, **_reading(config)
    )


def _leave_signals_to_parent(worker: int) -> None:
    # Ctrl-C and schedulers signal the whole process group; readers must outlive the last step.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _reading(config: TrainConfig) -> dict:
    return {
        "num_workers": config.workers,
        "worker_init_fn": _leave_signals_to_parent,
        "pin_memory": config.device != "cpu" and torch.cuda.is_available(),
        "persistent_workers": config.workers > 0,
    }
