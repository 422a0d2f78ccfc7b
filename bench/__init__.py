"""Benchmarks: one module each, with run(out) -> rows; run by `fullres bench` and `make gpu`."""

BENCHMARKS = ("kernels", "memory", "events")  # what `fullres bench` knows, by module name
