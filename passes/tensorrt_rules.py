"""Whether TensorRT would likely pick its sparse kernel for a weight that is eligible, by what its maintainers say.

Eligible is not picked: the builder times sparse and dense kernels and keeps the faster. What its maintainers tell: sparse wins
where input and output channels are above about 256; a 3x3 kernel multiplies the inputs that are summed by nine, so it favours
sparse (NVIDIA/TensorRT issue 3849). An INT8 product is sparse only where its result is quantised again. No builder was run here.
"""

from __future__ import annotations

import math

# Summed values and outputs below which the dense kernel is expected to be at least as fast.
WORTHWHILE = 256


def obstacle_to_picking(inputs: int, outputs: int, taps: int) -> str:
    """Why the dense kernel is likely faster; empty where nothing is known to speak for it.

    Args:
        inputs: channels that are summed (per group).
        outputs: channels that come out.
        taps: places of the convolution kernel, 9 for 3x3; 1 for a matrix product.
    """
    summed = inputs * taps
    if summed >= WORTHWHILE and outputs >= WORTHWHILE:
        return ""
    window = f" x {taps} places of the kernel" if taps > 1 else ""
    return f"{inputs} inputs{window} and {outputs} outputs: below about {WORTHWHILE} on a side the dense kernel is likely faster"


def build_condition(dtype: str, *, quantised: bool) -> str:
    """What a build needs for the sparse kernel to be considered; empty where nothing special.

    Args:
        dtype: of the weight as stored.
        quantised: whether it passes through QuantizeLinear or DequantizeLinear.
    """
    if quantised:
        return "an INT8 product runs sparse only where its result is quantised again"
    if dtype == "float32":
        return "build with FP16, BF16 or INT8 allowed: float32 has no sparse kernel"
    return ""


def stored_bytes(shape: tuple[int, ...], item_bits: int, nonzero: int, *, encodes: bool) -> dict[str, int | None]:
    """Bytes of a weight's data in each encoding that a file may have.

    ``plain``: every value. ``compact``: two values and 4 bits for each group of four, None where the weight is not 2:4 or not
    of a type that is encoded (``encodes``). ``sparse_initializer``: ONNX's own sparse tensor, a value and an INT64 index for each
    non-zero.
    """
    size = math.prod(shape)
    groups = size // 4
    compact = groups * 2 * item_bits // 8 + (groups + 1) // 2 if encodes else None
    return {
        "plain": -(-size * item_bits // 8),
        "compact": compact,
        "sparse_initializer": -(-nonzero * item_bits // 8) + 8 * nonzero,
    }
