"""Benchmarks: one module each, with run(out) -> rows; run by `fullres bench` and `make gpu`."""

# What `fullres bench` knows, by module name.
BENCHMARKS = (
    "kernels", "focal_loss", "memory", "batches", "largest", "training", "convergence", "scaling",
    "emulated", "events",
)  # fmt: skip

# What `make gpu` and `fullres bench all` run, in this order: a module, and the seconds of its box.
SECTIONS: dict[str, tuple[str, int]] = {
    "tests": ("device_tests", 200),
    "kernels": ("kernels", 100),
    "focal_loss": ("focal_loss", 35),
    "largest": ("largest", 110),
    "training": ("training", 75),
    "convergence": ("convergence", 40),
    "scaling": ("scaling", 25),
}
