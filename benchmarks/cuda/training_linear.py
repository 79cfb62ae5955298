"""Claim: forward and backward of a transposable 2:4 Linear layer, packing included, are at least 1.35 times as fast as dense.

The layers of ViT-L's MLP at the number of rows of the published measurement (44 160, DINO shapes; 1.24 to 1.27 on an A100,
PyTorch's blog "Accelerating Neural Network Training with Semi-Structured (2:4) Sparsity", 2024), and larger ones. Gradients for
inputs, weight and bias; the weight is packed anew at every forward pass, as training does.

    python -m benchmarks.cuda.training_linear [--dry]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cuda.common import Setting, start, verdict
from sparsefx.ops.sparse_training import sparse_linear, training_refusal
from sparsefx.patterns import parse

BAR = 1.35
LAYERS = {
    "ViT-L up": (4096, 1024, 44160),
    "ViT-L down": (1024, 4096, 44160),
    "ViT-L attention": (3072, 1024, 44160),
    "Llama 7B up": (11008, 4096, 8192),
    "Llama 7B down": (4096, 11008, 8192),
}


def compare(name: str, outputs: int, inputs: int, rows: int, dtype: torch.dtype, setting: Setting) -> None:
    """One line for every kernel that takes the layer."""
    data = setting.random(rows, inputs, dtype=dtype).requires_grad_()
    gradient = setting.random(rows, outputs, dtype=dtype)
    weight = setting.random(outputs, inputs, dtype=dtype) / inputs**0.5
    mask = parse("2:4-transposable").mask(weight)
    weight = weight.masked_fill(~mask, 0).requires_grad_()
    bias = torch.zeros(outputs, dtype=dtype, device=setting.device, requires_grad=True)

    def step(linear: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.enable_grad():
                return torch.autograd.grad(linear(data), (data, weight, bias), gradient)

        return run

    kernels = [kernel for kernel in setting.kernels if not training_refusal(kernel, outputs, inputs, dtype)]
    sparse = [step(lambda one, kernel=kernel: sparse_linear(one, weight, mask, bias, kernel.name)) for kernel in kernels]
    dense, *times = setting.timer([step(lambda one: functional.linear(one, weight, bias)), *sparse])
    for kernel, time in zip(kernels, times, strict=True):
        print(
            f"{str(dtype).removeprefix('torch.'):9s}{name:16s}{outputs:6d} x {inputs:<6d}{rows:6d} rows  {kernel.name:11s}"
            f"{1e3 * time:8.3f} ms (dense {1e3 * dense:8.3f}) {verdict(dense / time, BAR, setting)}",
            flush=True,
        )


def main() -> None:
    setting = start(__doc__)
    layers = {"tiny": (64, 128, 32)} if setting.dry else LAYERS
    for dtype in setting.dtypes:
        for name, (outputs, inputs, rows) in layers.items():
            compare(name, outputs, inputs, rows, dtype, setting)


if __name__ == "__main__":
    main()
