"""merge and split: the compiled kernels against plain torch, bit for bit, and the contract of both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.errors import OptionError
from sparsefx.ops import native
from sparsefx.ops.split import merge, rewire_masks, split
from sparsefx.patterns import parse
from sparsefx.sparse_parameter import SparseParameter

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PATTERNS = (
    "2:4",
    "1:4",
    "4:8",
    "3:5",
    "5:16",
    "1:1",
    "2:4-transposable",
    "unstructured",
    "unstructured:global",
    "block:1x4",
    "channel",
    "channel:coupled",
)
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
needs_library = pytest.mark.skipif(not native.available(), reason="the compiled extension was not built")


def contiguous(w: Tensor) -> Tensor:
    return w


def channels_last(w: Tensor) -> Tensor:
    return w.to(memory_format=torch.channels_last) if w.dim() == 4 else w


def reversed_axes(w: Tensor) -> Tensor:
    axes = tuple(reversed(range(w.dim())))
    return w.permute(axes).contiguous().permute(axes)


def swapped_front(w: Tensor) -> Tensor:
    return w.transpose(0, 1).contiguous().transpose(0, 1)


def strided(w: Tensor) -> Tensor:
    return torch.stack([w, w], dim=-1)[..., 0]


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (contiguous, channels_last, reversed_axes, swapped_front, strided)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype == torch.bool:
        return torch.equal(a, b)
    words = WORDS[a.element_size()]
    return torch.equal(a.contiguous().view(words), b.contiguous().view(words))


def hard_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Gaussian values with many ties, zeros of both signs, subnormals and large values among them."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator).to(dtype)
    kind = torch.randint(0, 10, shape, generator=generator)
    tiny = torch.finfo(dtype).smallest_normal / 4
    w = torch.where(kind == 0, torch.zeros((), dtype=dtype), w)
    w = torch.where(kind == 1, -torch.zeros((), dtype=dtype), w)
    w = torch.where(kind == 2, torch.tensor(tiny, dtype=dtype), w)
    w = torch.where(kind == 3, torch.tensor(torch.finfo(dtype).max / 4, dtype=dtype), w)
    return torch.where(kind == 4, torch.randint(-3, 4, shape, generator=generator).to(dtype), w)


def case(
    pattern: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: Callable[[Tensor], Tensor] = contiguous,
    *,
    seed: int = 0,
    axis: int = 1,
    density: float = 0.3,
    dormant: bool = True,
) -> tuple[Tensor, SparseParameter]:
    weight = layout(hard_values(shape, dtype, seed))
    generator = torch.Generator().manual_seed(seed + 1)
    mask = layout(torch.rand(shape, generator=generator) < 0.5)
    chosen = parse(pattern)
    record = SparseParameter(
        chosen,
        chosen.fixed_density or density,
        axis,
        torch.empty_strided(weight.shape, weight.stride(), dtype=torch.bool).copy_(mask),
        torch.full((int((~mask).sum()),), 7, dtype=dtype) if dormant else None,
    )
    return weight, record


def assert_same(a: tuple[Tensor, SparseParameter], b: tuple[Tensor, SparseParameter]) -> None:
    assert torch.equal(a[1].mask, b[1].mask)
    assert same_bits(a[0], b[0])
    assert (a[1].dormant is None) == (b[1].dormant is None)
    if a[1].dormant is not None and b[1].dormant is not None:
        assert same_bits(a[1].dormant, b[1].dormant)


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_kernels_equal_torch(pattern: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    shapes = (
        ((80, 240), 1, 1.0),
        ((80, 240), 0, 0.0),
        ((16, 80, 3, 3), 1, 0.9998),
        ((80, 16, 1, 1), 0, 1.0),
        ((80, 80, 5), 1, 0.5),
    )
    for shape, axis, scale in shapes:
        if parse(pattern).refusal(shape, reduction_axis=axis):
            continue
        ours = case(pattern, shape, dtype, layout, axis=axis)
        theirs = case(pattern, shape, dtype, layout, axis=axis)
        assert not split([ours[0]], [ours[1]], dormant_scale=scale, threads=2)
        assert not split([theirs[0]], [theirs[1]], dormant_scale=scale, compiled=False)
        assert_same(ours, theirs)
        merge([ours[0]], [ours[1]])
        merge([theirs[0]], [theirs[1]], compiled=False)
        assert_same(ours, theirs)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_call_for_many_weights(dtype: torch.dtype, threads: int) -> None:
    """All kinds of job together, large enough for a selection by all threads, tied and untied."""
    specs = [
        ("unstructured", (1100, 1024), contiguous),
        ("2:4", (64, 64, 3, 3), channels_last),
        ("unstructured", (33, 57), contiguous),
        ("unstructured:global", (65, 31, 3, 3), channels_last),
        ("2:4-transposable", (64, 2048), contiguous),
        ("unstructured:global", (1, 7), contiguous),
        ("unstructured:global", (500, 301), reversed_axes),
        ("block:1x4", (16, 16), contiguous),
        ("1:16", (8, 160000), swapped_front),
        ("1:4", (4, 40000), contiguous),
    ]
    results = []
    for compiled in (True, False):
        made = [case(p, s, dtype, layout, seed=i) for i, (p, s, layout) in enumerate(specs)]
        weights, records = [w for w, _ in made], [r for _, r in made]
        before = [w.clone(memory_format=torch.preserve_format) for w in weights]
        for _ in range(2):  # the second time with hints
            assert not split(weights, records, threads=threads, compiled=compiled)
            merge(weights, records, threads=threads, compiled=compiled)
            assert all(same_bits(w, b) for w, b in zip(weights, before, strict=True))
        assert not split(weights, records, dormant_scale=0.5, threads=threads, compiled=compiled)
        results.append(made)
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs)
    kept = sum(int(r.mask.sum()) for _, r in results[0] if r.pattern.name == "unstructured:global")
    assert kept == round(0.3 * sum(w.numel() for w, r in results[0] if r.pattern.name == "unstructured:global"))


@needs_library
@pytest.mark.parametrize("hint", [None, 0.0, -0.0, 1e-45, 0.67, 0.6745, 1.0, 3e38, -1.0, float("inf"), float("nan"), 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_hints_change_nothing(hint: float | None, dtype: torch.dtype, threads: int) -> None:
    weight = torch.randn(1200, 900, generator=torch.Generator().manual_seed(3), dtype=dtype)
    for w in (weight, weight.round(), torch.zeros_like(weight), weight[:13, :7].clone()):
        mask = torch.zeros_like(w, dtype=torch.bool)
        ours = (w.clone(), SparseParameter(parse("unstructured"), 0.5, 1, mask.clone(), w.flatten(), threshold=hint))
        theirs = (w.clone(), SparseParameter(parse("unstructured"), 0.5, 1, mask.clone(), w.flatten()))
        split([ours[0]], [ours[1]], threads=threads)
        split([theirs[0]], [theirs[1]], compiled=False)
        assert_same(ours, theirs)
        assert ours[1].threshold == float(w.abs().flatten().kthvalue(w.numel() - round(w.numel() / 2) + 1).values)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_library), False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["2:4", "2:4-transposable", "unstructured", "unstructured:global", "channel"])
def test_non_finite_is_seen_and_nothing_is_lost(pattern: str, dtype: torch.dtype, bad: float, compiled: bool) -> None:
    weight, record = case(pattern, (16, 32), dtype)
    weight[3, 5] = bad
    before = weight.clone()
    flag = split([weight], [record], compiled=compiled)
    assert flag.dtype == torch.bool
    assert flag.dim() == 0
    assert flag
    merge([weight], [record], compiled=compiled)
    assert same_bits(weight, before)
    # Also where the value itself is cleared, and where the masks stay.
    record.mask.fill_(False)
    assert split([weight], [record], dormant_scale=0.0, compiled=compiled)
    weight[3, 5] = bad
    assert split([weight], [record], rewire=False, compiled=compiled)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_library), False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_scale_rewire_and_split(dtype: torch.dtype, compiled: bool) -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0]], dtype=dtype)
    used = torch.tensor([[True, True, False, False]])

    def record() -> SparseParameter:
        return SparseParameter(parse("2:4"), 0.5, 1, used.clone(), torch.full((2,), 9.0, dtype=dtype))

    for scale, rewire, kept, dormant in (
        (1.0, True, [0, 0, 3, -4], [1, -2, 0, 0]),
        (0.0, True, [1, -2, 0, 0], [0, 0, 0, 0]),
        (0.5, True, [0, -2, 0, -2], [1, 0, 1.5, 0]),
        (1.0, False, [1, -2, 0, 0], [0, 0, 3, -4]),
        (0.5, False, [1, -2, 0, 0], [0, 0, 1.5, -2]),
        (0.0, False, [1, -2, 0, 0], [0, 0, 0, 0]),
    ):
        w, r = weight.clone(), record()
        split([w], [r], dormant_scale=scale, rewire=rewire, compiled=compiled)
        assert same_bits(w, torch.tensor([kept], dtype=dtype) + 0)
        assert r.dormant is not None
        assert same_bits(r.dormant, torch.tensor([dormant], dtype=dtype) + 0)
        assert rewire or torch.equal(r.mask, used)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_library), False])
def test_without_dormant_values(compiled: bool) -> None:
    weight, record = case("2:4", (8, 16), dormant=False)
    values = weight.clone()
    split([weight], [record], compiled=compiled)
    assert torch.equal(weight, values * record.mask)
    merge([weight], [record], compiled=compiled)
    assert torch.equal(weight, values * record.mask)
    assert record.dormant is None


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_library), False])
def test_densities_override(compiled: bool) -> None:
    made = [case("unstructured", (10, 10), seed=s) for s in range(2)]
    split([w for w, _ in made], [r for _, r in made], densities=[0.1, 0.9], compiled=compiled)
    assert [int(r.mask.sum()) for _, r in made] == [10, 90]
    assert [r.density for _, r in made] == [0.3, 0.3]


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_library), False])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "unstructured:global", "2:4-transposable"])
def test_rewire_masks_leaves_weights_alone(pattern: str, compiled: bool) -> None:
    weight, record = case(pattern, (16, 32))
    before, version = weight.clone(), weight._version
    rewire_masks([weight], [record], compiled=compiled)
    assert torch.equal(record.mask, record.pattern.mask(weight, record.density))
    assert same_bits(weight, before)
    assert weight._version == version
    assert record.compact is not None
    assert (record.compact == 7).all()


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_library), False])
def test_autograd_notices_the_write(compiled: bool) -> None:
    weight, record = case("2:4", (8, 16))
    parameter = torch.nn.Parameter(weight.clamp(-1, 1))
    loss = (parameter**2).sum()
    split([parameter.detach()], [record], compiled=compiled)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_library), False])
def test_split_again_changes_nothing_more(compiled: bool) -> None:
    weight, record = case("2:4", (8, 16))
    split([weight], [record], compiled=compiled)
    first, mask = weight.clone(), record.mask.clone()
    merge([weight], [record], compiled=compiled)
    split([weight], [record], compiled=compiled)
    assert same_bits(weight, first)
    assert torch.equal(record.mask, mask)


def test_nothing_to_split() -> None:
    assert not split([], [])
    merge([], [])


def test_scale_outside_its_range() -> None:
    weight, record = case("2:4", (8, 16))
    before = weight.clone()
    with pytest.raises(OptionError, match=r"dormant_scale=1\.5"):
        split([weight], [record], dormant_scale=1.5)
    assert same_bits(weight, before)


def test_description_names_the_means() -> None:
    assert ("compiled" in native.describe()) == native.available() or "not built" in native.describe()


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1e-40, 3e38, -7.0]), min_size=16, max_size=16),
    rows=st.integers(1, 12),
    pattern=st.sampled_from(["2:4", "3:4", "2:4-transposable", "unstructured", "unstructured:global"]),
    density=st.floats(0.01, 1.0),
    transposed=st.booleans(),
)
def test_any_values(values: list[float], rows: int, pattern: str, density: float, transposed: bool) -> None:
    weight = torch.tensor(values).view(4, 4).repeat(1, rows)
    weight = swapped_front(weight) if transposed else weight
    results = []
    for compiled in (True, False):
        chosen = parse(pattern)
        w = weight.clone(memory_format=torch.preserve_format)
        mask = torch.zeros_like(w, dtype=torch.bool)
        record = SparseParameter(chosen, chosen.fixed_density or density, 1, mask, torch.zeros(w.numel()))
        split([w], [record], compiled=compiled)
        results.append((w, record))
    assert_same(*results)
