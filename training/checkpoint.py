"""Checkpoints: written whole or not at all, read without running code from them."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

LAST, BEST = "last.ckpt", "best.ckpt"


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint reading and writing, through `save` and `load` below."""

    def save_checkpoint(self, checkpoint: dict, path: str, storage_options: Any = None) -> None:
        """Write the file, or leave the one that is there."""
        save(checkpoint, path)

    def load_checkpoint(self, path: str, *_: Any, **__: Any) -> dict[str, Any]:
        """Return the file's contents."""
        return load(path)

    def remove_checkpoint(self, path: str) -> None:
        """Remove the file."""
        Path(path).unlink(missing_ok=True)


def save(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write checkpoint so that path holds the old file or the new one, even if power fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")  # one name, so that a killed run leaves one file
    with open(part, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's contents on the CPU, tensors and plain values only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a checkpoint of `fullres train`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: damaged, or no checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "config"} <= set(checkpoint):
        raise ValueError(f"{path}: want a checkpoint of `fullres train`; its parts are missing")
    return checkpoint
