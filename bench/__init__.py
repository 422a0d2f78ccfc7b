"""Benchmarks: one module each, with run(out) -> rows; run by `fullres bench` and `make gpu`."""

BENCHMARKS = ("kernels", "focal_loss", "memory", "events")  # what `fullres bench` knows, by module name
