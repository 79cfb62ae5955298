"""One contract for all patterns: counts, legality, optimality, ties, layouts, refusals and names."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.errors import NonFiniteError, PatternError
from sparsefx.patterns import Block, Channel, GlobalUnstructured, NOfM, Pattern, Transposable, Unstructured, parse
from sparsefx.patterns.two_of_four_blocks import PAIRS, all_blocks

NAMES = (
    "unstructured",
    "unstructured:global",
    "1:1",
    "1:2",
    "2:4",
    "3:4",
    "4:8",
    "3:5",
    "8:16",
    "2:4-transposable",
    "1:4-transposable",
    "4:8-transposable",
    "7:16-transposable",
    "4:4-transposable",
    "block:1x8",
    "block:4x4",
    "block:2x5:norm=2",
    "channel",
    "channel:coupled",
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((80, 80), (16, 80), (80, 16, 3, 3), (16, 16, 5), (80, 80, 1, 1))


def expected_count(pattern: Pattern, density: float, shape: Sequence[int], axis: int) -> int:
    total = torch.Size(shape).numel()
    if isinstance(pattern, (NOfM, Transposable)):
        return total * pattern.n // pattern.m
    unit = pattern.rows * pattern.columns if isinstance(pattern, Block) else 1
    if isinstance(pattern, Channel):
        unit = total // shape[1 - axis]
    return max(1, round(density * (total // unit))) * unit


def assert_legal(pattern: Pattern, mask: Tensor, axis: int) -> None:
    if isinstance(pattern, NOfM):
        assert (mask.unflatten(axis, (-1, pattern.m)).sum(axis + 1) == pattern.n).all()
    elif isinstance(pattern, Transposable):
        for along in (0, 1):
            assert (mask.unflatten(along, (-1, pattern.m)).sum(along + 1) == pattern.n).all()
    elif isinstance(pattern, Block):
        rows, columns = (pattern.rows, pattern.columns) if axis == 1 else (pattern.columns, pattern.rows)
        counts = mask.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).sum((1, 3))
        assert ((counts == 0) | (counts == rows * columns)).all()
    elif isinstance(pattern, Channel):
        by_channel = mask.movedim(1 - axis, 0).flatten(1)
        assert (by_channel.all(1) | ~by_channel.any(1)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_contract(name: str, dtype: torch.dtype) -> None:
    pattern = parse(name)
    taken = 0
    for shape, axis, density in itertools.product(SHAPES, (0, 1), (0.5, 0.13)):
        if pattern.fixed_density is not None:
            density = pattern.fixed_density
        if pattern.refusal(shape, reduction_axis=axis) is not None:
            continue
        taken += 1
        generator = torch.Generator().manual_seed(taken)
        scores = torch.randn(shape, generator=generator).to(dtype)
        before = scores.clone()
        mask = pattern.mask(scores, density, reduction_axis=axis)
        assert mask.dtype == torch.bool
        assert mask.shape == scores.shape
        assert mask.device == scores.device
        assert int(mask.sum()) == expected_count(pattern, density, shape, axis)
        assert_legal(pattern, mask, axis)
        assert torch.equal(scores, before)
        # Signs, memory layout and a second look change nothing; what participates already stays.
        assert torch.equal(pattern.mask(-scores, density, reduction_axis=axis), mask)
        assert torch.equal(pattern.mask(torch.where(mask, scores, 0), density, reduction_axis=axis), mask)
        permuted = scores.transpose(0, 1).contiguous().transpose(0, 1)
        again = pattern.mask(permuted, density, reduction_axis=axis)
        assert torch.equal(again, mask)
        assert again.stride() == permuted.stride()
        # Reduction along axis 0 is reduction along axis 1 of the transposed weight. Ties are broken by position, so that this
        # holds without them; 16-bit formats have many.
        if dtype == torch.float64:
            turned = pattern.mask(scores.transpose(0, 1), density, reduction_axis=1 - axis)
            assert torch.equal(turned.transpose(0, 1), mask)
    assert taken >= 4


@pytest.mark.parametrize("name", NAMES)
def test_all_equal_scores_keep_the_first(name: str) -> None:
    pattern = parse(name)
    for scores in (torch.zeros(80, 80), torch.ones(80, 80)):
        mask = pattern.mask(scores)
        assert int(mask.sum()) == expected_count(pattern, pattern.resolve_density(None), (80, 80), 1)
        assert_legal(pattern, mask, 1)
    if isinstance(pattern, (Unstructured, GlobalUnstructured, Channel)):
        assert mask[:40].all()
    if isinstance(pattern, NOfM):
        assert mask.unflatten(1, (-1, pattern.m))[..., : pattern.n].all()
    if isinstance(pattern, Block):
        assert mask.flatten()[: 80 * pattern.rows * (40 // pattern.rows)].all()


@pytest.mark.parametrize("name", NAMES)
def test_names_equality_and_pickle(name: str) -> None:
    pattern = parse(name)
    assert pattern.name == name
    assert parse(f"  {name.upper()} ") == pattern
    assert hash(parse(name)) == hash(pattern)
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert name in repr(pattern)
    assert len({parse(other) for other in NAMES}) == len(NAMES)
    with pytest.raises(AttributeError):
        pattern.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2:5:1", "unknown pattern"),
        ("unstructred", "did you mean 'unstructured'"),
        ("2:4-transposible", "did you mean '2:4-transposable'"),
        ("0:4", "1 <= N <= M <= 16"),
        ("5:4", "1 <= N <= M <= 16"),
        ("4:32", "1 <= N <= M <= 16"),
        ("3:2-transposable", "1 <= N <= M <= 16"),
        ("block:0x4", "sides of at least 1"),
        ("block:1x8:norm=0.5", "norm of 0.5"),
        ("block:1x8:norm=1.2.3", "unknown pattern"),
        ("", "unknown pattern ''"),
    ],
)
def test_unknown_patterns(text: str, words: str) -> None:
    with pytest.raises(PatternError, match=words.replace("(", r"\(").replace(".", r"\.")):
        parse(text)


def test_pattern_that_is_no_text() -> None:
    with pytest.raises(PatternError, match="expected a text such as '2:4'"):
        parse(24)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "shape", "axis", "words"),
    [
        ("2:4", (8, 27), 1, "27 along the reduction axis (axis 1 of (8, 27)) is not a multiple of 4"),
        ("2:4", (27, 8), 0, "27 along the reduction axis (axis 0"),
        ("2:4", (8,), 1, "1 axes; expected at least 2"),
        ("2:4", (0, 4), 1, "holds no weights"),
        ("2:4", (4, 4), 2, "reduction_axis=2 was given"),
        ("2:4", (4, 4, 4), 3, "reduction_axis=3 was given"),
        ("2:4", (3, 8, 6), 2, "6 along the reduction axis (axis 2"),
        ("channel", (3, 8, 8), 2, "is a stack of matrices"),
        ("2:4-transposable", (3, 8, 8), 2, "is a stack of matrices"),
        ("block:1x4", (3, 8, 8), 2, "is a stack of matrices"),
        ("2:4-transposable", (6, 8), 1, "6 along the output axis (axis 0"),
        ("2:4-transposable", (8, 6), 1, "6 along the reduction axis (axis 1"),
        ("block:4x2", (6, 8), 1, "6 along the output axis"),
        ("block:4x2", (8, 6), 0, "6 along the output axis (axis 1"),
        ("unstructured", (0,), 1, "holds no weights"),
        ("unstructured", (), 1, "0 axes"),
        ("channel", (8,), 1, "1 axes"),
    ],
)
def test_refusals(name: str, shape: tuple[int, ...], axis: int, words: str) -> None:
    pattern = parse(name)
    reason = pattern.refusal(shape, reduction_axis=axis)
    assert reason is not None
    assert words in reason
    with pytest.raises(PatternError):
        pattern.mask(torch.zeros(shape), reduction_axis=axis)


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan"), True, "half"])
def test_bad_densities(density: float) -> None:
    with pytest.raises(PatternError, match=r"expected a number in \(0, 1\]"):
        parse("unstructured").mask(torch.ones(4, 4), density)


def test_density_given_for_a_fixed_density() -> None:
    with pytest.raises(PatternError, match=r"density 0\.25 was given for pattern '2:4', whose density is always 0\.5"):
        parse("2:4").mask(torch.ones(4, 4), 0.25)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_scores(bad: float) -> None:
    scores = torch.ones(8, 8)
    scores[2, 3] = bad
    for name in ("2:4", "unstructured", "channel"):
        with pytest.raises(NonFiniteError):
            parse(name).mask(scores)
    with pytest.raises(NonFiniteError, match="layer 1"):
        GlobalUnstructured().masks([torch.ones(4, 4), scores])


def test_published_example() -> None:
    w = torch.tensor([[4, 3, 2, 1], [-1, -3, 0.6, 0.5], [1, 2, 3, 4], [10, 2, -1, 5]])
    one = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]], dtype=torch.bool)
    two = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(parse("2:4").mask(w), one)
    assert torch.equal(parse("2:4-transposable").mask(w), two)


def ninety() -> Tensor:
    masks = torch.zeros(90, 4, 4, dtype=torch.bool)
    for position, rows in enumerate(all_blocks()):
        for row, pair in enumerate(rows):
            masks[position, row, list(PAIRS[pair])] = True
    return masks


def test_ninety_blocks_are_all_there_are() -> None:
    every = [
        rows for rows in itertools.product(PAIRS, repeat=4) if all(sum(column in row for row in rows) == 2 for column in range(4))
    ]
    assert len(every) == 90
    assert len(torch.unique(ninety().flatten(1), dim=0)) == 90
    assert (ninety().sum(1) == 2).all()
    assert (ninety().sum(2) == 2).all()


@pytest.mark.parametrize("kind", ["gaussian", "ties", "few", "large and small"])
def test_transposable_equals_brute_force(kind: str) -> None:
    generator = torch.Generator().manual_seed(7)
    shape = (10_000, 4, 4)
    if kind == "gaussian":
        blocks = torch.randn(shape, generator=generator)
    elif kind == "ties":
        blocks = torch.randint(-4, 5, shape, generator=generator).float()
    elif kind == "few":
        blocks = torch.randint(0, 2, shape, generator=generator).float()
    else:
        blocks = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-8, 8, shape, generator=generator)
    masks = ninety()
    sums = blocks.abs().double().flatten(1) @ masks.double().flatten(1).T
    # Any order of summation is exact here, so that the first best is the first best.
    best = masks[sums.argmax(1)]
    weight = blocks.view(100, 100, 4, 4).transpose(1, 2).reshape(400, 400)
    expected = best.view(100, 100, 4, 4).transpose(1, 2).reshape(400, 400)
    assert torch.equal(parse("2:4-transposable").mask(weight), expected)


@pytest.mark.parametrize("name", ["2:4", "1:4", "4:8", "unstructured", "unstructured:global"])
def test_a_stack_of_matrices_is_one_tall_matrix(name: str) -> None:
    scores = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    pattern = parse(name)
    assert torch.equal(pattern.mask(scores, reduction_axis=2).flatten(0, 1), pattern.mask(scores.flatten(0, 1), reduction_axis=1))


def test_convolutions_have_groups_along_channels() -> None:
    w = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    for name in ("2:4", "2:4-transposable", "block:2x4"):
        mask = parse(name).mask(w)
        if name == "block:2x4":
            blocks = mask.view(4, 2, 4, 4, 3, 3)
            assert torch.equal(blocks.amax((1, 3)), blocks.amin((1, 3)))
            continue
        for r, s in itertools.product(range(3), range(3)):
            assert torch.equal(mask[:, :, r, s], parse(name).mask(w[:, :, r, s]))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), m=st.integers(1, 8), groups=st.integers(1, 4))
def test_n_of_m_is_the_best(data: st.DataObject, m: int, groups: int) -> None:
    n = data.draw(st.integers(1, m))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=2 * m * groups, max_size=2 * m * groups))
    scores = torch.tensor(values, dtype=torch.float32).view(2, m * groups)
    mask = parse(f"{n}:{m}").mask(scores)
    for group, kept in zip(scores.abs().view(-1, m).tolist(), mask.view(-1, m).tolist(), strict=True):
        first_best = sorted(range(m), key=lambda i: (-group[i], i))[:n]
        assert [i for i in range(m) if kept[i]] == sorted(first_best)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=60), density=st.floats(0.001, 1))
def test_unstructured_is_the_best(values: list[int], density: float) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    count = max(1, round(density * len(values)))
    first_best = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:count]
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[first_best] = True
    assert torch.equal(parse("unstructured").mask(scores, density), expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), density=st.floats(0.01, 1))
def test_global_is_the_best_over_all_layers(data: st.DataObject, density: float) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=sum(sizes), max_size=sum(sizes)))
    together = torch.tensor(values, dtype=torch.float32)
    layers = [layer.to(DTYPES[i % 4]) for i, layer in enumerate(together.split(sizes))]
    masks = GlobalUnstructured().masks(layers, density)
    assert torch.equal(torch.cat(masks), Unstructured().mask(together, density))
    assert [mask.shape for mask in masks] == [layer.shape for layer in layers]


def test_global_of_no_layers_and_of_unusual_layouts() -> None:
    assert GlobalUnstructured().masks([], 0.5) == []
    w = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    masks = GlobalUnstructured().masks([w.to(memory_format=torch.channels_last), w[:4]], 0.25)
    plain = GlobalUnstructured().masks([w, w[:4]], 0.25)
    assert all(torch.equal(a, b) for a, b in zip(masks, plain, strict=True))
    assert masks[0].is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(PatternError, match=r"layer 1: .* holds no weights"):
        GlobalUnstructured().masks([w, w[:0]])


@pytest.mark.parametrize(("n", "m"), [(1, 4), (3, 4), (2, 6), (4, 8), (8, 16), (1, 16), (15, 16)])
def test_other_transposable_masks_are_legal_and_keep_at_least_half(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n)
    pattern = parse(f"{n}:{m}-transposable")
    for scores in (
        torch.rand(4 * m, 4 * m, generator=generator),
        torch.randint(0, 3, (4 * m, 4 * m), generator=generator).float(),
        torch.rand(4 * m, 4 * m, generator=generator) ** 20,
    ):
        mask = pattern.mask(scores)
        assert_legal(pattern, mask, 1)
        # No transposable mask keeps more than the best N:M mask along one axis.
        bound = float((scores * parse(f"{n}:{m}").mask(scores)).sum())
        assert float((scores * mask).sum()) >= 0.5 * bound


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=32, max_size=32),
    st.sampled_from([1.0, 2.0, 3.5, 16.0]),
)
def test_block_norms(values: list[float], p: float) -> None:
    scores = torch.tensor(values).view(4, 8)
    pattern = Block(2, 4, p)
    norms = scores.double().view(2, 2, 2, 4).transpose(1, 2).reshape(4, 8).abs().pow(p).sum(1) ** (1 / p)
    ordered = norms.sort(descending=True).values
    assume(bool((ordered[1] - ordered[2]) > 1e-9 * ordered[1]))
    kept = pattern.mask(scores, 0.5).view(2, 2, 2, 4).transpose(1, 2).reshape(4, 8)[:, 0]
    assert set(kept.nonzero().flatten().tolist()) == set(norms.topk(2).indices.tolist())


def test_large_powers_do_not_overflow() -> None:
    scores = torch.full((2, 8), 1e38)
    scores[1, 4:] = 2e38
    assert torch.equal(Block(1, 4, 32.0).mask(scores, 0.25).nonzero()[:, 0], torch.tensor([1, 1, 1, 1]))
    assert int(Block(1, 4, 32.0).mask(torch.zeros(2, 8), 0.25).sum()) == 4


def test_scores_may_require_gradients_and_masks_do_not() -> None:
    w = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    for name in ("2:4", "2:4-transposable", "unstructured", "block:4x4", "channel"):
        assert not parse(name).mask(w).requires_grad
    assert not GlobalUnstructured().masks([w])[0].requires_grad


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (4, 8)])
def test_of_equal_scores_in_a_group_the_first_stay(n: int, m: int) -> None:
    """All groups of few distinct values, against a stable sort: every way in which members can tie."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cartesian_prod(*[torch.arange(3.0)] * m) if m <= 4 else torch.randint(0, 3, (4000, m), generator=generator)
    scores = values.to(torch.float32).reshape(-1, m)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :n]
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(parse(f"{n}:{m}").mask(scores), expected)
    assert torch.equal(parse(f"{n}:{m}").mask(scores.T.contiguous(), reduction_axis=0), expected.T)


@pytest.mark.parametrize(("text", "name"), [("4:8 2D", "4:8-transposable"), ("2:4-2d", "2:4-transposable"), ("2:4 1D", "2:4")])
def test_the_papers_names_of_patterns_are_understood(text: str, name: str) -> None:
    assert parse(text) == parse(name)
    assert parse(text).name == name
