"""What cards can do, by name: memory, and how fast they copy, multiply and reach their host."""

import re
from dataclasses import dataclass, replace

import torch

from ..ops.dispatch import tf32_allowed

# What is reached of a published peak: on an H200 4.3 of 4.8 TB/s in a copy and 790 of 989 TFLOP/s
# in a large bfloat16 product, measured by its owners. Nobody measured the others, nor any bus.
COPY, PRODUCT, BUS = 0.9, 0.8, 0.8


@dataclass(frozen=True)
class Hardware:
    """A card, in bytes, FLOP and seconds.

    Attributes:
        name: as torch or its maker calls it.
        memory: bytes of the whole card, as its driver counts them; the driver's own are in it.
        copy: bytes a second, read and written together.
        product: FLOP a second of a large dense product in 16 bits, summed in float32.
        product_float32: in IEEE float32.
        product_tf32: of float32 factors rounded to TF32; None where our kernels never do.
        host: bytes a second to pinned memory of the host, and as many back at the same time.
        launch: seconds that a kernel takes at least, and until the next one runs.
        shared: bytes a second of all shared memories together, where known.
        processors, clock: of those that run programs, and Hz at work, where known.
    """

    name: str
    memory: int
    copy: float
    product: float
    product_float32: float
    product_tf32: float | None
    host: float
    launch: float = 4e-6
    shared: float | None = None
    processors: int | None = None
    clock: float | None = None

    def product_of(self, dtype: torch.dtype) -> float:
        """Return FLOP a second of a large product of this dtype; float32 as torch now has it.

        Raises:
            ValueError: for another dtype than float32, float16 and bfloat16.
        """
        if dtype in (torch.float16, torch.bfloat16):
            return self.product
        if dtype != torch.float32:
            wanted = "torch.float32, torch.float16 or torch.bfloat16"
            raise ValueError(f"dtype: want {wanted}, got {dtype}")
        if self.product_tf32 is not None and tf32_allowed():
            return self.product_tf32
        return self.product_float32


def _card(
    name: str,
    mib: int,
    tb_s: float,
    tflops: float,
    float32: float,
    tf32: float | None,
    pcie: int,
) -> Hardware:
    """Return a card from published peaks, dense; pcie: the generation, of 16 lanes."""
    lanes = {3: 15.75e9, 4: 31.5e9, 5: 63e9}[pcie]
    product = PRODUCT * 1e12
    return Hardware(
        name, mib * 2**20, COPY * tb_s * 1e12, product * tflops, product * float32,
        tf32 and product * tf32, BUS * lanes,
    )  # fmt: skip


# Peaks: the makers' datasheets and architecture whitepapers, without sparsity; of consumers' cards
# the 16-bit products that are summed in float32. MiB: what nvidia-smi and rocm-smi show.
HARDWARE = {
    "h200": replace(  # SXM; copy and product measured, the rest its datasheet
        _card("NVIDIA H200", 143_771, 4.8, 989, 67, 494, 5),
        copy=4.3e12, product=790e12, processors=132,
        # Its peaks are published for 1.83 GHz (989e12 / (132 * 4096)) and 1.98 GHz (67e12 / (132 *
        # 256)), up to which its clock rises; at work its limit of power allows less.
        clock=1.7e9, shared=132 * 128 * 1.7e9,  # processors x bytes a clock x Hz
    ),
    "h100": _card("NVIDIA H100 80GB HBM3", 81_559, 3.35, 989, 67, 494, 5),  # SXM
    "h100-nvl": _card("NVIDIA H100 NVL", 95_830, 3.9, 835, 60, 417, 5),
    "h100-pcie": _card("NVIDIA H100 PCIe", 81_559, 2.0, 756, 51, 378, 5),
    "a100-80": _card("NVIDIA A100-SXM4-80GB", 81_920, 2.039, 312, 19.5, 156, 4),
    "a100-40": _card("NVIDIA A100-SXM4-40GB", 40_960, 1.555, 312, 19.5, 156, 4),
    # Its tensor cores take float16 only: in bfloat16 it is slower than this says.
    "v100-32": _card("Tesla V100-SXM2-32GB", 32_510, 0.9, 125, 15.7, None, 3),
    "v100-16": _card("Tesla V100-SXM2-16GB", 16_160, 0.9, 125, 15.7, None, 3),
    "l40s": _card("NVIDIA L40S", 46_068, 0.864, 362, 91.6, 183, 4),
    "rtx4090": _card("NVIDIA GeForce RTX 4090", 24_564, 1.008, 165.2, 82.6, 82.6, 4),
    "rtx3090": _card("NVIDIA GeForce RTX 3090", 24_576, 0.936, 71, 35.6, 35.6, 4),
    "mi300x": _card("AMD Instinct MI300X", 196_592, 5.3, 1307, 163.4, None, 5),
}  # fmt: skip


def hardware(name: str | None = None) -> Hardware:
    """Return the card of this name in HARDWARE, or without one the card that is here.

    The present card is known by its own name and, where there are several of that, by the nearest
    memory; its memory is as it says itself. One that HARDWARE does not know has an H200's rates,
    by which one may compare but not predict. Without a card this is an H200.

    Raises:
        ValueError: HARDWARE has no such name.
    """
    if name is not None:
        if name not in HARDWARE:
            raise ValueError(f"hardware: want one of {', '.join(HARDWARE)}, got {name!r}")
        return HARDWARE[name]
    if not torch.cuda.is_available():
        return HARDWARE["h200"]
    here = torch.cuda.get_device_properties()
    return _present(here.name, here.total_memory)


def _present(name: str, memory: int) -> Hardware:
    """Return a card as it names itself: "NVIDIA A100 80GB PCIe" is an A100 of 80 GB."""
    said = {*re.findall(r"[a-z0-9]+", name.lower().replace("rtx ", "rtx"))}
    matches = []
    for short, card in HARDWARE.items():
        words = {word for word in short.split("-") if not word.isdigit()}
        if words <= said:
            matches.append((len(words), -abs(card.memory - memory), short))
    if not matches:
        return replace(HARDWARE["h200"], name=f"{name}, at an H200's rates", memory=memory)
    return replace(HARDWARE[max(matches)[2]], name=name, memory=memory)
