"""largest_among: the compiled and the plain choice are one, ties and edges included; random_among is exact and seeded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsefx.ops.select import largest_among, random_among


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.float64]), tensors=st.integers(1, 3), data=st.data()
)
def test_both_implementations_choose_the_same_and_exactly_as_many(
    seed: int, dtype: torch.dtype, tensors: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5, 2), (40,), (1, 7)][:tensors]
    # Few distinct values: zeros, subnormal numbers and infinity among them.
    values = torch.tensor([0.0, 1e-310 if dtype == torch.float64 else 1e-42, 0.5, 1.0, float("inf")], dtype=dtype)
    scores = [values[torch.randint(0, 5, shape, generator=generator)] for shape in shapes]
    candidates = [torch.rand(shape, generator=generator) < 0.6 for shape in shapes]
    possible = sum(int(candidate.sum()) for candidate in candidates)
    count = data.draw(st.integers(0, possible))
    fast = largest_among(scores, candidates, count)
    plain = largest_among(scores, candidates, count, compiled=False)
    assert all(torch.equal(a, b) for a, b in zip(fast, plain, strict=True))
    assert sum(int(chosen.sum()) for chosen in plain) == count
    assert all(not bool((chosen & ~candidate).any()) for chosen, candidate in zip(plain, candidates, strict=True))
    # As a list would have it: stable by falling score.
    flat = [
        (-float(value), place)
        for place, (value, allowed) in enumerate(
            zip(
                torch.cat([s.flatten() for s in scores]).tolist(),
                torch.cat([c.flatten() for c in candidates]).tolist(),
                strict=True,
            )
        )
        if allowed
    ]
    wanted = {place for _, place in sorted(flat)[:count]}
    assert set(torch.cat([chosen.flatten() for chosen in plain]).nonzero().flatten().tolist()) == wanted


@pytest.mark.parametrize("count", [0, 1, 20, 70, 75])
def test_a_random_choice_is_exact_seeded_and_among_the_candidates(count: int) -> None:
    candidates = torch.zeros(10, 30, dtype=torch.bool)
    candidates.view(-1)[::4] = True
    first = random_among(candidates, count, torch.Generator().manual_seed(1))
    assert int(first.sum()) == count
    assert not bool((first & ~candidates).any())
    assert torch.equal(first, random_among(candidates, count, torch.Generator().manual_seed(1)))


def test_a_random_choice_is_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    candidates = torch.ones(20, dtype=torch.bool)
    seen = torch.zeros(20)
    for _ in range(4000):
        seen += random_among(candidates, 3, generator)
    expected, deviation = 4000 * 3 / 20, (4000 * 0.15 * 0.85) ** 0.5
    assert bool(((seen - expected).abs() < 5 * deviation).all())
