"""Why Sparse Tensor Cores would not take a layer, as far as its shape and its pattern tell.

The figures are the rule of thumb that PyTorch-side tools share for half precision: outputs a multiple of 8, inputs of 16.
Whether a runtime *picks* the sparse kernel is its own decision, by speed.
"""

from __future__ import annotations

from collections.abc import Sequence

OUTPUT_MULTIPLE = 8
REDUCTION_MULTIPLE = 16
PATTERNS = ("2:4", "2:4-transposable", "2:4-padded")


def tensor_core_refusal(shape: Sequence[int], reduction_axis: int, groups: int, op: str, pattern: str) -> str:
    """The reason in words; empty where nothing stands against it.

    Args:
        shape: of the weight.
        reduction_axis: 0 or 1; 2 for a stack of matrices.
        groups: of the convolution.
        op: what reads the weight.
        pattern: name of the pattern, empty for a dense layer.
    """
    if not pattern:
        return "is dense"
    if pattern not in PATTERNS:
        return f"pattern {pattern!r} is not 2:4, the only structure that Sparse Tensor Cores take"
    if op.startswith("conv_transpose"):
        return "is a transposed convolution, for which no runtime is known to have a sparse kernel"
    if not op.startswith("conv") and len(shape) == 3:
        return "is a stack of matrices (as of a mixture of experts), for which no runtime is known to have a sparse kernel"
    reason = shape_refusal(shape[reduction_axis], shape[1 - reduction_axis], groups)
    remedy = "; export with pad_channels=True" if pattern == "2:4-padded" and reason.endswith(f"of {REDUCTION_MULTIPLE}") else ""
    return reason + remedy


def shape_refusal(inputs: int, outputs: int, groups: int) -> str:
    """What stands against the shape of a product of ``inputs`` summed channels (per group) and ``outputs`` channels."""
    if groups > 1:
        return f"is a convolution with {groups} groups; sparse kernels take one group"
    if outputs % OUTPUT_MULTIPLE:
        return f"{outputs} outputs is not a multiple of {OUTPUT_MULTIPLE}"
    if inputs % REDUCTION_MULTIPLE:
        return f"{inputs} inputs is not a multiple of {REDUCTION_MULTIPLE}"
    return ""
