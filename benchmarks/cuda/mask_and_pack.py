"""Claim: choosing the exact transposable 2:4 mask of a 4096 x 1024 weight and packing both orientations takes no more than .085
ms.

That is the published time of torch's greedy search and packing, ``torch._sparse_semi_structured_tile``, on an A100 in float16; it
runs beside ours here, as does a plain copy of the weight. The share of magnitude that each search keeps is printed too: exact is
never less.

    python -m benchmarks.cuda.mask_and_pack [--dry]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cuda.common import Setting, start
from sparsefx.ops.cuda_transposable import choose_mask, masked_both_ways, pack_both_ways, runs_here
from sparsefx.ops.semi_structured_product import CuSparseLt

BAR = 0.085e-3
GREEDY = "largest_abs_values_greedy"


@torch.no_grad()
def compare(rows: int, columns: int, dtype: torch.dtype, setting: Setting) -> None:
    """One line for each way."""
    weight = setting.random(rows, columns, dtype=dtype)
    if not setting.dry and not runs_here(weight):
        print("the Triton kernel does not run here; plain torch would be timed, which is not the claim")
        return
    room = torch.empty_like(weight)
    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: room.copy_(weight),
        "mask": lambda: choose_mask(weight),
        "mask and pack, CUTLASS": lambda: pack_both_ways(weight),
    }
    if not setting.dry and CuSparseLt() in setting.kernels:
        ways["mask and pack, cuSPARSELt"] = lambda: _for_cusparselt(weight)
    if not setting.dry:
        try:
            torch._sparse_semi_structured_tile(weight, algorithm=GREEDY, use_cutlass=True)
            ways["torch, greedy, CUTLASS"] = lambda: torch._sparse_semi_structured_tile(
                weight, algorithm=GREEDY, use_cutlass=True
            )
        except RuntimeError as error:
            print(f"torch's own search does not run here: {str(error).splitlines()[0]}")
    seconds = dict(zip(ways, setting.timer(list(ways.values())), strict=True))
    for name, time in seconds.items():
        met = f"   bar .085 ms: {'met' if time <= BAR else 'NOT met'}" if "mask and pack" in name and not setting.dry else ""
        kind = str(dtype).removeprefix("torch.")
        print(
            f"{kind:9s}{rows} x {columns}  {name:26s}{1e3 * time:9.4f} ms  {time / seconds['copy']:7.2f} x copy{met}", flush=True
        )
    total = weight.abs().double().sum()
    print(f"  magnitude kept: exact {float(weight.abs().double()[choose_mask(weight)].sum() / total):.5f}", end="")
    if "torch, greedy, CUTLASS" in ways:
        packed = torch._sparse_semi_structured_tile(weight, algorithm=GREEDY, use_cutlass=True)[0]
        print(f", greedy {float(packed.abs().double().sum() / total):.5f}", end="")
    print()


def _for_cusparselt(weight: Tensor) -> object:
    masked, turned = masked_both_ways(weight, None, weight.dtype)
    kernel = CuSparseLt()
    return kernel.pack(masked), kernel.pack(turned)


def main() -> None:
    setting = start(__doc__)
    for dtype in setting.dtypes:
        for rows, columns in ((64, 128),) if setting.dry else ((4096, 1024), (4096, 4096), (11008, 4096)):
            compare(rows, columns, dtype, setting)


if __name__ == "__main__":
    main()
