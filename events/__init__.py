"""Detector events: reader, writer, generator and displays."""

from .dataset import CLASSES, SIZE, Event, EventDataset, flip, flips
from .display import draw_event
from .file import EventFile, EventFileError
from .synthetic import SyntheticEvents, generate_event, generate_file
from .writer import EventWriter

__all__ = [
    "CLASSES",
    "SIZE",
    "Event",
    "EventDataset",
    "EventFile",
    "EventFileError",
    "EventWriter",
    "SyntheticEvents",
    "draw_event",
    "flip",
    "flips",
    "generate_event",
    "generate_file",
]
