"""How a network fits a budget: measuring and planning memory."""

from .meter import LiveBytes, MemoryReport, Sample, meter

__all__ = ["LiveBytes", "MemoryReport", "Sample", "meter"]
