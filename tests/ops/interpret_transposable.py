"""Run by a test in a process of its own, with Triton's interpreter in place of a GPU: the kernel against plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.ops.cuda_transposable import choose_mask, empty_both_ways, launch, pack_both_ways


def weights(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices with ties of several kinds."""
    generator = torch.Generator().manual_seed(rows + columns)
    normal = torch.randn(rows, columns, generator=generator)
    few = torch.randint(-2, 3, (rows, columns), generator=generator).float()
    return {
        "normal": normal.to(dtype),
        "ties": few.to(dtype),
        "masked": (normal * choose_mask(normal)).to(dtype),
    }


def check_packing(weight: Tensor, dtype: torch.dtype) -> None:
    expected = pack_both_ways(weight, dtype=dtype)
    made = empty_both_ways(weight, None, dtype)
    launch(weight, None, mask=made.mask, packed=made)
    for name, one, other in zip(made._fields, made, expected, strict=True):
        assert torch.equal(one, other), name
    again = empty_both_ways(weight, expected.mask, dtype)
    launch(weight, expected.mask, packed=again)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


def check_masks(weight: Tensor) -> None:
    expected, mask = choose_mask(weight), torch.empty_like(weight, dtype=torch.bool)
    masked, turned = torch.empty_like(weight), weight.new_empty(weight.shape[::-1])
    launch(weight, None, mask=mask, dense=(masked, turned))
    assert torch.equal(mask, expected)
    assert torch.equal(masked, weight.masked_fill(~expected, 0))
    assert torch.equal(turned, masked.t())


def main() -> None:
    count = 0
    for rows, columns, dtype in ((64, 128, torch.float16), (128, 64, torch.bfloat16)):
        for weight in weights(rows, columns, dtype).values():
            check_packing(weight, dtype)
            count += 1
    # The interpreter rounds to bfloat16 in a way of its own, so another format stands for conversions.
    check_packing(weights(64, 64, torch.float32)["normal"], torch.float16)
    for rows, columns, dtype in ((4, 4, torch.float32), (20, 68, torch.float32), (16, 80, torch.float64)):
        for weight in weights(rows, columns, dtype).values():
            check_masks(weight)
            count += 1
    print(f"{count + 1} matrices equal")  # noqa: T201


if __name__ == "__main__":
    main()
