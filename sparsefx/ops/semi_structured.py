"""The compressed form of a 2:4 matrix, and the order in which CUTLASS reads its metadata; plain torch, on every device.

Compressed, a group of four weights along a row is two values and a 4-bit *code*: the place of the first value in bits 0 and 1,
that of the second in bits 2 and 3, the first before the second. That is the pair that NVIDIA's sparse matrix instructions take
("PTX ISA", sparse ``mma``: "selector" and "metadata"), 9/16 of the dense bytes with two bytes a value and 10/16 with one. It is
the form that files and state_dicts hold, since it does not depend on a GPU: the kernels' own orders of the same bits do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx.errors import PatternError

GROUP = 4
_ROWS_TOGETHER = {2: 32, 4: 16}  # by the bytes of a word of metadata
WORDS = {2: torch.int16, 1: torch.int32}
"""The words that CUTLASS keeps metadata in, by the bytes of a value."""


class Compressed(NamedTuple):
    """A 2:4 matrix ``[outputs, inputs]``.

    Attributes:
        values: ``[outputs, inputs / 2]``, two of each group, in order.
        codes: uint8 ``[outputs, inputs / 8]``, two codes a byte, the earlier group in the lower bits.
    """

    values: Tensor
    codes: Tensor


def _places(bits: int) -> list[int]:
    """The two places that are stored of a group whose non-zeros are the bits of ``bits``; more than two where there are more.

    Empty places are filled by the third, then the fourth, as torch's own conversion does, so that the results can be compared.
    """
    kept = [place for place in range(GROUP) if bits >> place & 1]
    for place in (2, 3):
        if len(kept) < 2 and place not in kept:
            kept.append(place)
    return sorted(kept)


_TOO_MANY = 255
CODES = tuple(kept[0] | kept[1] << 2 if len(kept := _places(bits)) == 2 else _TOO_MANY for bits in range(1 << GROUP))
"""The code of each set of places, given as four bits; 255 for those that are not 2:4."""


def compress(weight: Tensor, mask: Tensor | None = None) -> Compressed:
    """The compressed form of a 2:4 matrix.

    Args:
        weight: ``[outputs, inputs]`` of any dtype, with ``inputs`` a multiple of 8.
        mask: bool, which weights participate (exactly two in each group); None stands for ``weight != 0``. Weights outside the
            mask count as zero.

    Raises:
        PatternError: a group of four holds more than two, or the shape does not fit.
    """
    if weight.ndim != 2 or weight.shape[1] % (2 * GROUP):
        raise PatternError(
            f"a weight of shape {tuple(weight.shape)} was given; expected [outputs, inputs], inputs a multiple of 8"
        )
    outputs, inputs = weight.shape
    kept = weight != 0 if mask is None else mask
    bits = torch.zeros(outputs, inputs // GROUP, dtype=torch.int64, device=weight.device)
    for place in range(GROUP):
        bits |= kept[:, place::GROUP].to(torch.int64) << place
    codes = torch.tensor(CODES, dtype=torch.uint8, device=weight.device)[bits]
    if bool((codes == _TOO_MANY).any()):
        where = (codes == _TOO_MANY).nonzero()[0].tolist()
        raise PatternError(
            f"the weight is not 2:4: row {where[0]}, columns {GROUP * where[1]} to {GROUP * where[1] + 3} hold more than two; "
            "sparsify it along its reduction axis first"
        )
    places = torch.stack((codes & 3, codes >> 2), dim=-1).to(torch.int64)
    values = (weight if mask is None else weight.masked_fill(~mask, 0)).view(outputs, -1, GROUP).gather(-1, places)
    return Compressed(values.view(outputs, inputs // 2), codes[:, 0::2] | codes[:, 1::2] << 4)


def decompress(compressed: Compressed) -> Tensor:
    """The dense matrix ``[outputs, inputs]``, with +0 where nothing participates."""
    values, codes = compressed
    outputs, half = values.shape
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).view(outputs, -1)
    places = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).to(torch.int64)
    dense = values.new_zeros(outputs, half // 2, GROUP)
    return dense.scatter_(-1, places, values.view(outputs, -1, 2)).view(outputs, 2 * half)


def cutlass_metadata(codes: Tensor, word: torch.dtype) -> Tensor:
    """Codes in the order in which CUTLASS's sparse kernels read them (``ColumnMajorInterleaved<2>`` of reordered rows).

    Rows go in bundles of 32 (16 with words of four bytes), and two columns of words together; within them the words of rows
    8 apart lie side by side, with the squares of 2 x 2 transposed. See ``tools/util/include/cutlass/util/host_reorder.h`` in
    CUTLASS.

    Args:
        codes: as `Compressed.codes`; rows a multiple of the bundle, columns of two words.
        word: int16 for values of two bytes, int32 for those of one.

    Returns:
        ``word`` ``[rows, inputs / 4 / codes in a word]``, the shape that torch's operators take.
    """
    words = codes.contiguous().view(word)
    rows, columns = words.shape
    bundle = _ROWS_TOGETHER[word.itemsize]
    # row = bundle, far, near, step of 8; column = pair, side
    split = words.view(rows // bundle, bundle // 16, 2, 8, columns // 2, 2)
    return split.permute(4, 0, 3, 1, 5, 2).reshape(rows, columns)


def codes_of_cutlass(metadata: Tensor) -> Tensor:
    """The inverse of `cutlass_metadata`."""
    rows, columns = metadata.shape
    bundle = _ROWS_TOGETHER[metadata.dtype.itemsize]
    split = metadata.contiguous().view(columns // 2, rows // bundle, 8, bundle // 16, 2, 2)
    return split.permute(1, 3, 5, 2, 0, 4).reshape(rows, columns).view(torch.uint8)
