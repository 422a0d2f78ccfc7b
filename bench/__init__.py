"""Benchmarks: one module each, with run(out) -> rows; run by `fullres bench` and `make gpu`."""

# What `fullres bench` knows, by module name.
BENCHMARKS = ("kernels", "networks", "focal_loss", "memory", "batches", "events")
