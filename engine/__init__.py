"""How a network fits a budget: fusing its layers, measuring and planning memory."""

from .convert import convert, revert
from .memory_report import Alive
from .meter import LiveBytes, MemoryReport, Sample, meter
from .plan import InfeasibleError, Plan, max_batch, max_image, plan
from .report import Report, report

__all__ = [
    "Alive",
    "InfeasibleError",
    "LiveBytes",
    "MemoryReport",
    "Plan",
    "Report",
    "Sample",
    "convert",
    "max_batch",
    "max_image",
    "meter",
    "plan",
    "report",
    "revert",
]
