"""What GPUs have, by the makers' data sheets: memory, dense bf16 operations, links."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of GPU in the node that it is usually sold in."""

    memory_bytes: int
    peak_bf16_flops: float
    """Operations a second."""
    link_bytes_per_s: float
    """To the other GPUs of the node, one direction (NVLink)."""
    network_bytes_per_s: float
    """To other nodes, one direction: one network card for each GPU."""


GPUS = {
    "A100": Gpu(
        memory_bytes=80 << 30,
        peak_bf16_flops=312e12,
        link_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
    ),
    "H100": Gpu(
        memory_bytes=80 << 30,
        peak_bf16_flops=989e12,
        link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
    ),
    "H200": Gpu(
        memory_bytes=141 * 10**9,
        peak_bf16_flops=989e12,
        link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
    ),
    "B200": Gpu(
        memory_bytes=180 * 10**9,
        peak_bf16_flops=2250e12,
        link_bytes_per_s=900e9,
        network_bytes_per_s=50e9,
    ),
}
