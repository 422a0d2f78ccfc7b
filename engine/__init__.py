"""How a network fits a budget: fusing its layers, measuring and planning memory."""

from .convert import convert, revert
from .memory_report import Alive
from .meter import LiveBytes, MemoryReport, Sample, meter
from .report import Report, report

__all__ = [
    "Alive",
    "LiveBytes",
    "MemoryReport",
    "Report",
    "Sample",
    "convert",
    "meter",
    "report",
    "revert",
]
