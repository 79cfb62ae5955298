"""The Triton kernel of `sparsefx.ops.cuda_transposable`; imported only where Triton is installed.

A program works on 16 x 16 blocks of 4 x 4 weights, one block a thread with eight warps. It finds the best of the 90 masks by the
search that `sparsefx.patterns.two_of_four_blocks` describes, with sums in float64 taken in the same order and ties decided in the
same order, so that masks are equal bit for bit. A mask is 16 bits, bit ``4 * row + column``.
"""

# The names of a kernel's arguments say what they point to; types are Triton's own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

SIDE = tl.constexpr(16)
"""Blocks along each side of what one program works on: 64 x 64 weights."""

# The two bits of each pair of columns, by the pair's number: 01, 02, 03, 12, 13, 23.
_PAIR_BITS = tl.constexpr(0xCA6953)
# The code of a row (two places, two bits each) by its four bits, four bits an entry; only those with two bits set are read.
_CODES = tl.constexpr((4 << 12) | (8 << 20) | (9 << 24) | (12 << 36) | (13 << 40) | (14 << 48))


@triton.jit
def _bits(pair: tl.constexpr, row: tl.constexpr):
    return ((_PAIR_BITS >> (4 * pair)) & 15) << (4 * row)


@triton.jit
def _pairs(w0, w1, w2, w3):
    """What a row keeps with each pair of columns."""
    return (w0 + w1, w0 + w2, w0 + w3, w1 + w2, w1 + w3, w2 + w3)


@triton.jit
def _take(best, mask, total, candidate):
    """The larger of two, the first of equal ones."""
    better = total > best
    return tl.where(better, total, best), tl.where(better, candidate, mask)


@triton.jit
def _opposite(first, second, row: tl.constexpr):
    """The best half whose second row holds what the first lacks."""
    best = first[0] + second[5]
    mask = tl.zeros_like(best).to(tl.int32) + (_bits(0, row) | _bits(5, row + 1))
    for pair in tl.static_range(1, 6):
        best, mask = _take(best, mask, first[pair] + second[5 - pair], _bits(pair, row) | _bits(5 - pair, row + 1))
    return best, mask


@triton.jit
def _sharing(first, second, c: tl.constexpr, d: tl.constexpr, row: tl.constexpr):
    """The better of the two halves whose rows share a column: pairs ``c`` and ``d``, or the other way round."""
    best = first[c] + second[d]
    mask = tl.zeros_like(best).to(tl.int32) + (_bits(c, row) | _bits(d, row + 1))
    return _take(best, mask, first[d] + second[c], _bits(d, row) | _bits(c, row + 1))


@triton.jit
def _class(best, mask, r0, r1, r2, r3, uc: tl.constexpr, ud: tl.constexpr, lc: tl.constexpr, ld: tl.constexpr):
    upper, upper_mask = _sharing(r0, r1, uc, ud, 0)
    lower, lower_mask = _sharing(r2, r3, lc, ld, 2)
    return _take(best, mask, upper + lower, upper_mask | lower_mask)


@triton.jit
def _best_mask(r0, r1, r2, r3):
    """The best of the 90, from what each row keeps with each pair."""
    best = (r0[0] + r1[0]) + (r2[5] + r3[5])
    mask = tl.zeros_like(best).to(tl.int32) + (_bits(0, 0) | _bits(0, 1) | _bits(5, 2) | _bits(5, 3))
    for pair in tl.static_range(1, 6):
        equal = _bits(pair, 0) | _bits(pair, 1) | _bits(5 - pair, 2) | _bits(5 - pair, 3)
        best, mask = _take(best, mask, (r0[pair] + r1[pair]) + (r2[5 - pair] + r3[5 - pair]), equal)
    upper, upper_mask = _opposite(r0, r1, 0)
    lower, lower_mask = _opposite(r2, r3, 2)
    best, mask = _take(best, mask, upper + lower, upper_mask | lower_mask)
    # One line for each ordered pair of columns (a, b): the upper rows share a, the lower rows b.
    best, mask = _class(best, mask, r0, r1, r2, r3, 1, 2, 3, 4)
    best, mask = _class(best, mask, r0, r1, r2, r3, 0, 2, 3, 5)
    best, mask = _class(best, mask, r0, r1, r2, r3, 0, 1, 4, 5)
    best, mask = _class(best, mask, r0, r1, r2, r3, 3, 4, 1, 2)
    best, mask = _class(best, mask, r0, r1, r2, r3, 0, 4, 1, 5)
    best, mask = _class(best, mask, r0, r1, r2, r3, 0, 3, 2, 5)
    best, mask = _class(best, mask, r0, r1, r2, r3, 3, 5, 0, 2)
    best, mask = _class(best, mask, r0, r1, r2, r3, 1, 5, 0, 4)
    best, mask = _class(best, mask, r0, r1, r2, r3, 1, 3, 2, 4)
    best, mask = _class(best, mask, r0, r1, r2, r3, 4, 5, 0, 1)
    best, mask = _class(best, mask, r0, r1, r2, r3, 2, 5, 0, 3)
    best, mask = _class(best, mask, r0, r1, r2, r3, 2, 4, 1, 3)
    return mask


@triton.jit
def _code(bits):
    """The code of a row from its four bits, two of which are set."""
    table = tl.zeros_like(bits).to(tl.int64) + _CODES
    return ((table >> (4 * bits).to(tl.int64)) & 15).to(tl.int32)


@triton.jit
def _value(place, w0, w1, w2, w3):
    return tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))


@triton.jit
def _store_row(values, words, bits, w0, w1, w2, w3, row, start, half, rows, valid):
    """One row of a block in CUTLASS's order: two values; and of four blocks side by side the word of their four codes.

    Everything is [rows of blocks, blocks along the row], of which ``start`` is the first. The word of row r and column c stands
    at pair of columns, bundle of 32 rows, r % 8, r % 32 / 16, c % 2, r / 8 % 2, from the slowest to the fastest.
    """
    code = _code(bits)
    block = start + tl.arange(0, SIDE)
    place = values + row[:, None] * half + 2 * block[None, :]
    first = _value(code & 3, w0, w1, w2, w3).to(values.dtype.element_ty)
    second = _value(code >> 2, w0, w1, w2, w3).to(values.dtype.element_ty)
    tl.store(place, first, mask=valid)
    tl.store(place + 1, second, mask=valid)
    shift = 4 * (tl.arange(0, SIDE) % 4)
    word = tl.sum(tl.reshape(code << shift[None, :], [SIDE, SIDE // 4, 4]), axis=2)
    column = start // 4 + tl.arange(0, SIDE // 4)
    line = row % 32
    where = (column // 2)[None, :] * (2 * rows) + (row // 32 * 64 + line % 8 * 8 + line // 16 * 4 + line // 8 % 2)[:, None]
    inside = (row < rows)[:, None] & (column < half // 8)[None, :]
    tl.store(words + where + (column % 2)[None, :] * 2, word.to(tl.int16), mask=inside)


@triton.jit
def transposable_kernel(
    weight,
    given,
    mask_out,
    values,
    words,
    values_t,
    words_t,
    rows,
    columns,
    HAS_MASK: tl.constexpr,
    WRITE_MASK: tl.constexpr,
    PACK: tl.constexpr,
    WRITE_DENSE: tl.constexpr,
):
    """Choose (or read) the mask of ``weight [rows, columns]``, both multiples of 4, and write what is asked for.

    ``given`` and ``mask_out`` hold a byte a weight. With ``PACK`` (multiples of 64) ``values [rows, columns / 2]`` and ``words``
    are the operands that CUTLASS takes, ``values_t`` and ``words_t`` those of the transposed weight. With ``WRITE_DENSE``,
    ``values`` is the masked weight ``[rows, columns]`` and ``values_t`` its transpose.
    """
    start_row, start_column = tl.program_id(0) * SIDE, tl.program_id(1) * SIDE
    block_row, block_column = start_row + tl.arange(0, SIDE), start_column + tl.arange(0, SIDE)
    valid = (block_row < rows // 4)[:, None] & (block_column < columns // 4)[None, :]
    corner = block_row[:, None] * 4 * columns + block_column[None, :] * 4
    w00 = tl.load(weight + corner, mask=valid, other=0)
    w01 = tl.load(weight + corner + 1, mask=valid, other=0)
    w02 = tl.load(weight + corner + 2, mask=valid, other=0)
    w03 = tl.load(weight + corner + 3, mask=valid, other=0)
    w10 = tl.load(weight + corner + columns, mask=valid, other=0)
    w11 = tl.load(weight + corner + columns + 1, mask=valid, other=0)
    w12 = tl.load(weight + corner + columns + 2, mask=valid, other=0)
    w13 = tl.load(weight + corner + columns + 3, mask=valid, other=0)
    w20 = tl.load(weight + corner + 2 * columns, mask=valid, other=0)
    w21 = tl.load(weight + corner + 2 * columns + 1, mask=valid, other=0)
    w22 = tl.load(weight + corner + 2 * columns + 2, mask=valid, other=0)
    w23 = tl.load(weight + corner + 2 * columns + 3, mask=valid, other=0)
    w30 = tl.load(weight + corner + 3 * columns, mask=valid, other=0)
    w31 = tl.load(weight + corner + 3 * columns + 1, mask=valid, other=0)
    w32 = tl.load(weight + corner + 3 * columns + 2, mask=valid, other=0)
    w33 = tl.load(weight + corner + 3 * columns + 3, mask=valid, other=0)
    if HAS_MASK:
        mask = tl.zeros([SIDE, SIDE], dtype=tl.int32)
        for place in tl.static_range(16):
            at = corner + place // 4 * columns + place % 4
            bit = tl.load(given + at, mask=valid, other=0)
            mask |= tl.where(bit != 0, 1 << place, 0)
    else:
        r0 = _pairs(_score(w00), _score(w01), _score(w02), _score(w03))
        r1 = _pairs(_score(w10), _score(w11), _score(w12), _score(w13))
        r2 = _pairs(_score(w20), _score(w21), _score(w22), _score(w23))
        r3 = _pairs(_score(w30), _score(w31), _score(w32), _score(w33))
        mask = _best_mask(r0, r1, r2, r3)
    if WRITE_MASK:
        for place in tl.static_range(16):
            at = corner + place // 4 * columns + place % 4
            tl.store(mask_out + at, ((mask >> place) & 1).to(tl.uint8), mask=valid)
    if PACK:
        half = columns // 2
        _store_row(values, words, mask & 15, w00, w01, w02, w03, 4 * block_row, start_column, half, rows, valid)
        _store_row(values, words, mask >> 4 & 15, w10, w11, w12, w13, 4 * block_row + 1, start_column, half, rows, valid)
        _store_row(values, words, mask >> 8 & 15, w20, w21, w22, w23, 4 * block_row + 2, start_column, half, rows, valid)
        _store_row(values, words, mask >> 12 & 15, w30, w31, w32, w33, 4 * block_row + 3, start_column, half, rows, valid)
        turned, across = tl.trans(valid), rows // 2
        c0, c1, c2, c3 = _column(mask, 0), _column(mask, 1), _column(mask, 2), _column(mask, 3)
        c0, c1, c2, c3 = tl.trans(c0), tl.trans(c1), tl.trans(c2), tl.trans(c3)
        t00, t01, t02, t03 = tl.trans(w00), tl.trans(w10), tl.trans(w20), tl.trans(w30)
        _store_row(values_t, words_t, c0, t00, t01, t02, t03, 4 * block_column, start_row, across, columns, turned)
        t10, t11, t12, t13 = tl.trans(w01), tl.trans(w11), tl.trans(w21), tl.trans(w31)
        _store_row(values_t, words_t, c1, t10, t11, t12, t13, 4 * block_column + 1, start_row, across, columns, turned)
        t20, t21, t22, t23 = tl.trans(w02), tl.trans(w12), tl.trans(w22), tl.trans(w32)
        _store_row(values_t, words_t, c2, t20, t21, t22, t23, 4 * block_column + 2, start_row, across, columns, turned)
        t30, t31, t32, t33 = tl.trans(w03), tl.trans(w13), tl.trans(w23), tl.trans(w33)
        _store_row(values_t, words_t, c3, t30, t31, t32, t33, 4 * block_column + 3, start_row, across, columns, turned)
    if WRITE_DENSE:
        _store_dense(values, values_t, corner, block_row, block_column, mask, 0, w00, w01, w02, w03, rows, columns, valid)
        _store_dense(values, values_t, corner, block_row, block_column, mask, 1, w10, w11, w12, w13, rows, columns, valid)
        _store_dense(values, values_t, corner, block_row, block_column, mask, 2, w20, w21, w22, w23, rows, columns, valid)
        _store_dense(values, values_t, corner, block_row, block_column, mask, 3, w30, w31, w32, w33, rows, columns, valid)


@triton.jit
def _score(weight):
    return tl.abs(weight.to(tl.float64))


@triton.jit
def _column(mask, column: tl.constexpr):
    """The four bits of one column."""
    picked = mask >> column
    return (picked & 1) | (picked >> 3 & 2) | (picked >> 6 & 4) | (picked >> 9 & 8)


@triton.jit
def _store_dense(dense, dense_t, corner, block_row, block_column, mask, row: tl.constexpr, w0, w1, w2, w3, rows, columns, valid):
    """One row of each block, masked, in place and transposed."""
    bits = mask >> (4 * row)
    at = dense + corner + row * columns
    turned = dense_t + block_column[None, :] * 4 * rows + block_row[:, None] * 4 + row
    kind = dense.dtype.element_ty
    v0 = tl.where((bits & 1) != 0, w0, 0).to(kind)
    v1 = tl.where((bits & 2) != 0, w1, 0).to(kind)
    v2 = tl.where((bits & 4) != 0, w2, 0).to(kind)
    v3 = tl.where((bits & 8) != 0, w3, 0).to(kind)
    tl.store(at, v0, mask=valid)
    tl.store(at + 1, v1, mask=valid)
    tl.store(at + 2, v2, mask=valid)
    tl.store(at + 3, v3, mask=valid)
    tl.store(turned, v0, mask=valid)
    tl.store(turned + rows, v1, mask=valid)
    tl.store(turned + 2 * rows, v2, mask=valid)
    tl.store(turned + 3 * rows, v3, mask=valid)
