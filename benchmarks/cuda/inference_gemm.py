"""Claim: a 2:4 weight makes the matrix products of transformers at least 1.4 times as fast as dense ones where they are bound by
arithmetic.

Weights of BERT-large and ViT-L, Llama 7B and 70B, at numbers of rows from one token to large batches, in bfloat16 and float16,
and in int8 with inputs quantized as they come; every kernel of the GPU, and torch's own SparseSemiStructuredTensor beside it,
against the dense layer of the same run. The bar counts for products of at least 4096 rows with a weight of at least 4096 x 4096.

    python -m benchmarks.cuda.inference_gemm [--dtype bfloat16] [--dry]
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from benchmarks.cuda.common import Setting, start, verdict
from sparsefx.ops.semi_structured import Compressed, compress
from sparsefx.ops.semi_structured_layers import SemiStructuredLinear, quantize_rows
from sparsefx.patterns import parse

BAR = 1.4
WEIGHTS = {
    "ViT-L, BERT-large attention": (1024, 1024),
    "ViT-L, BERT-large up": (4096, 1024),
    "ViT-L, BERT-large down": (1024, 4096),
    "Llama 7B attention": (4096, 4096),
    "Llama 7B up": (11008, 4096),
    "Llama 7B down": (4096, 11008),
    "Llama 70B attention": (8192, 8192),
    "Llama 70B up": (28672, 8192),
    "Llama 70B down": (8192, 28672),
}
ROWS = (1, 16, 512, 4096, 16384)


def of_torch(weight: Tensor, bias: Tensor) -> nn.Linear | None:
    """torch's own sparse layer, where it takes the weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype).requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its interface is a prototype
            layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
    except RuntimeError as error:
        print(f"  SparseSemiStructuredTensor does not take it: {str(error).splitlines()[0]}")
        return None
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


@torch.no_grad()
def compare(name: str, outputs: int, inputs: int, rows: int, dtype: torch.dtype, setting: Setting) -> None:
    """One line for every kernel."""
    data = setting.random(rows, inputs, dtype=dtype)
    weight = setting.random(outputs, inputs, dtype=dtype) / inputs**0.5
    weight = weight.masked_fill(~parse("2:4").mask(weight), 0)
    bias = setting.random(outputs, dtype=dtype)
    dense = nn.Linear(inputs, outputs, device=setting.device, dtype=dtype).requires_grad_(False)
    dense.weight.copy_(weight)
    dense.bias.copy_(bias)
    layers: dict[str, nn.Module] = {"dense": dense}
    values, factors = quantize_rows(weight)
    for kernel in setting.kernels:
        for kind, compressed, scale in (
            ("", compress(weight), None),
            (" int8", Compressed(*compress(values)), factors[:, 0].contiguous()),
        ):
            if kernel.refusal(outputs, inputs, compressed.values.dtype):
                continue
            layer = SemiStructuredLinear(compressed, scale, bias, kernel).eval()
            if scale is None:
                layer.algorithm = kernel.fastest_algorithm(data, layer.operands(), layer.bias)
            layers[f"{kernel.name}{kind}"] = layer
    peer = None if setting.dry else of_torch(weight, bias)
    if peer is not None:
        layers["torch's SparseSemiStructuredTensor"] = peer
    seconds = dict(zip(layers, setting.timer([lambda layer=layer: layer(data) for layer in layers.values()]), strict=True))
    base = seconds.pop("dense")
    bar = BAR if rows >= 4096 and min(outputs, inputs) >= 4096 else None
    for kind, time in seconds.items():
        shown = bar if " " not in kind else None
        speed = 2e-12 * rows * inputs * outputs / time
        print(
            f"{str(dtype).removeprefix('torch.'):9s}{name:28s}{outputs:6d} x {inputs:<6d}{rows:6d} rows  {kind:36s}"
            f"{1e6 * time:9.1f} us (dense {1e6 * base:9.1f}) {speed:7.1f} TFLOP/s {verdict(base / time, shown, setting)}",
            flush=True,
        )


def main() -> None:
    setting = start(__doc__)
    weights = {"tiny": (64, 128)} if setting.dry else WEIGHTS
    for dtype in setting.dtypes:
        for name, (outputs, inputs) in weights.items():
            for rows in (1, 16) if setting.dry else ROWS:
                compare(name, outputs, inputs, rows, dtype, setting)


if __name__ == "__main__":
    main()
