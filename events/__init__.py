"""Detector events: reader, writer, generator and displays."""

from .dataset import CLASSES, SIZE, Event, EventDataset, flip, flips
from .file import EventFile, EventFileError

__all__ = [
    "CLASSES",
    "SIZE",
    "Event",
    "EventDataset",
    "EventFile",
    "EventFileError",
    "flip",
    "flips",
]
