"""What the machine at hand computes in."""

from __future__ import annotations

import torch


def machine_multiple(device: torch.device) -> int:
    """The step in which widths pay: what a vector register holds of float32, or a Tensor Core's tile.

    Measured with oneDNN and onnxruntime on AVX-512, times fall at multiples of 16 and hardly in between.
    """
    if device.type == "cuda":
        return 16
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 8)
