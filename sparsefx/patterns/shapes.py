"""What patterns ask of a weight's shape, as refusals in words."""

from __future__ import annotations

from collections.abc import Sequence


def weight_refusal(shape: Sequence[int], reduction_axis: int, *, axes: int = 2, stacks: bool = False) -> str | None:
    """Why no pattern with structure along ``axes`` axes fits this shape, or None.

    Args:
        shape: of the weight.
        reduction_axis: 0 or 1; 2 for a stack of matrices ``[n, out, in]``.
        axes: how many axes the pattern needs.
        stacks: whether the pattern has structure along the reduction axis only, so that stacks of matrices can take it.
    """
    if reduction_axis not in (0, 1, 2):
        return f"reduction_axis={reduction_axis!r} was given; expected 0, 1, or 2 for a stack of matrices [n, out, in]"
    if reduction_axis == 2 and len(shape) != 3:
        return f"reduction_axis=2 was given for shape {tuple(shape)}; expected a stack of matrices [n, out, in]"
    if reduction_axis == 2 and not stacks:
        return "the weight is a stack of matrices (as of a mixture of experts), which only N:M and unstructured patterns fit"
    if len(shape) < axes:
        return f"shape {tuple(shape)} has {len(shape)} axes; expected at least {axes}: [out, in] or [out, in, ...]"
    if 0 in shape:
        return f"shape {tuple(shape)} holds no weights"
    return None


def divisibility_refusal(shape: Sequence[int], axis: int, reduction_axis: int, multiple: int) -> str | None:
    """Why ``shape[axis]`` cannot be cut into groups of ``multiple``, or None."""
    if shape[axis] % multiple == 0:
        return None
    side = "reduction" if axis == reduction_axis else "output"
    return (
        f"{shape[axis]} along the {side} axis (axis {axis} of {tuple(shape)}) is not a multiple of {multiple}; "
        "leave the layer out, or choose a pattern without groups such as 'unstructured'"
    )
