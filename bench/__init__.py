"""Benchmarks, one module each, and the folder where their results are recorded."""
