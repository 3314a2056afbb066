"""What the makers' datasheets say of some GPUs. Published peaks, not measurements: `labkit.bench` measures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """num_sms: SMs (AMD: compute units). memory_gb: 1e9 bytes. bandwidth: bytes/s. bf16_flops: dense, 1/s."""

    num_sms: int
    memory_gb: int
    bandwidth: float
    bf16_flops: float

    @property
    def flops_per_byte(self) -> float:
        """Operations that fit into the time of moving one byte: below this a kernel is memory-bound."""
        return self.bf16_flops / self.bandwidth


# Sources: NVIDIA A100, H100, H200 and L4 datasheets, HGX B200 and RTX 4090 specifications, AMD MI300X datasheet.
GPUS = {
    "A100 80GB": Gpu(108, 80, 2.039e12, 312e12),
    "H100 SXM": Gpu(132, 80, 3.35e12, 989e12),
    "H200": Gpu(132, 141, 4.8e12, 989e12),
    "B200": Gpu(148, 180, 8.0e12, 2250e12),
    "L4": Gpu(58, 24, 0.3e12, 121e12),
    "RTX 4090": Gpu(128, 24, 1.008e12, 165e12),
    "MI300X": Gpu(304, 192, 5.3e12, 1307e12),
}
