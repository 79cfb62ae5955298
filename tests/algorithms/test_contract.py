"""Every algorithm with every pattern: it works, with an exact number of weights at every step, or is refused with a reason."""

from __future__ import annotations

import io

import pytest
import torch

import sparsefx
from sparsefx.errors import OptionError
from sparsefx.sparse_parameter import sparse_parameters
from tests.algorithms.contract import BY_NAME, OPTIMIZERS, PATTERNS, STEPS, attached, counts, sparsified, steps
from tests.training import batches

_FIXED = {"2:4", "2:4-padded", "2:4-transposable", "4:8-transposable"}
# Pairs that are refused, and a word of the reason.
REFUSED: dict[str, dict[str, str]] = {
    "sparse-momentum": {
        **dict.fromkeys(_FIXED, "moves weights between layers"),
        "channel": "differ in size",
        "unstructured:global": "one ranking",
    },
    "dsr": {
        **dict.fromkeys(_FIXED, "moves weights between layers"),
        "channel": "differ in size",
        "unstructured:global": "one ranking",
    },
    "deep-r": dict.fromkeys(("block:1x8", "block:4x4:norm=2", "block:1x1", "channel"), "change sign"),
    "gradual": dict.fromkeys(_FIXED, "begins dense"),
    "accelerated": dict.fromkeys(set(PATTERNS) - {"2:4-transposable", "4:8-transposable"}, "both axes"),
}
for _name, _algorithm in BY_NAME.items():
    if not _algorithm.chooses_together:
        REFUSED[_name] = {**REFUSED.get(_name, {}), "channel:coupled": "each layer for itself"}
# Algorithms whose layers exchange weights: only the total is fixed.
EXCHANGING = {"sparse-momentum", "dsr"}
# Algorithms whose masks only lose weights.
SHRINKING = {"gradual"}
# Algorithms whose new weights begin with the update that brought them.
BEGINS_UPDATED = {"dropback"}
PAIRS = [(name, pattern) for name in BY_NAME for pattern in PATTERNS]
WORKING = [(name, pattern) for name, pattern in PAIRS if pattern not in REFUSED.get(name, {})]


@pytest.mark.parametrize(("name", "pattern"), PAIRS)
def test_each_pair_works_or_is_refused_with_a_reason(name: str, pattern: str) -> None:
    word = REFUSED.get(name, {}).get(pattern)
    if word is None:
        assert sparsified(BY_NAME[name], pattern) is not None
        return
    with pytest.raises(OptionError, match=word) as raised:
        sparsified(BY_NAME[name], pattern)
    assert f"algorithm {name!r} cannot be used with pattern {pattern!r}" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "pattern", "optimizer"),
    [
        *((name, pattern, "momentum") for name, pattern in WORKING),
        *((name, pattern, "adamw") for name, pattern in WORKING if pattern in ("unstructured", "4:8-transposable")),
    ],
)
def test_the_number_of_weights_is_exact_at_every_step(name: str, pattern: str, optimizer: str) -> None:
    model = sparsified(BY_NAME[name], pattern)
    chosen = sparsefx.patterns.parse(pattern)
    made = OPTIMIZERS[optimizer](model.parameters())
    attached(model, made, BY_NAME[name])
    first = counts(model)
    total = sum(mask.numel() for mask in sparsefx.masks(model).values())
    if chosen.fixed_density is None:
        assert sum(first.values()) == round(0.3 * total) or pattern.startswith(("block", "channel", "unstructured"))
    moved = 0
    before = sparsefx.masks(model)
    for _ in steps(model, made, batches(STEPS)):
        now = sparsefx.masks(model)
        if name in SHRINKING:
            assert all(count <= most for count, most in zip(counts(model).values(), first.values(), strict=True))
            continue
        assert sum(counts(model).values()) == sum(first.values())
        if name not in EXCHANGING and pattern != "unstructured:global":
            assert counts(model) == first
        for parameter, mask in now.items():
            assert not model.get_parameter(parameter).detach()[~mask].any()
            moved += int((mask != before[parameter]).sum())
            if chosen.fixed_density is not None:
                best = chosen.mask(mask.float(), reduction_axis=1)
                assert torch.equal(best, mask)
        before = now
    assert (moved > 0) == (BY_NAME[name].moves and name not in SHRINKING)
    if name in SHRINKING:
        for parameter, mask in sparsefx.masks(model).items():
            assert not model.get_parameter(parameter).detach()[~mask].any()
        assert sum(counts(model).values()) == sum(counts(sparsified(BY_NAME["static"], pattern)).values())


@pytest.mark.parametrize(("name", "pattern"), WORKING)
def test_a_run_is_the_same_under_the_same_seed_and_after_resuming(name: str, pattern: str) -> None:
    data = batches(STEPS)
    algorithm = BY_NAME[name]
    model = sparsified(algorithm, pattern)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    runtime = attached(model, optimizer, algorithm, seed=3)
    for _ in steps(model, optimizer, data[:7]):
        pass
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "runtime": runtime.state_dict()}, buffer)
    for _ in steps(model, optimizer, data[7:]):
        pass

    twin = sparsified(algorithm, pattern)
    optimizer = OPTIMIZERS["adamw"](twin.parameters())
    attached(twin, optimizer, algorithm, seed=3)
    for _ in steps(twin, optimizer, data):
        pass

    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    resumed = sparsified(algorithm, pattern, seed=8, generator=torch.Generator().manual_seed(11))
    resumed.load_state_dict(state["model"])
    optimizer = OPTIMIZERS["adamw"](resumed.parameters())
    optimizer.load_state_dict(state["optimizer"])
    second = attached(resumed, optimizer, algorithm, seed=99)
    second.load_state_dict(state["runtime"])
    for _ in steps(resumed, optimizer, data[7:]):
        pass
    for other in (twin, resumed):
        for parameter, mask in sparsefx.masks(model).items():
            assert torch.equal(mask, sparsefx.masks(other)[parameter]), parameter
        for key, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("name", [name for name, algorithm in BY_NAME.items() if not algorithm.keeps_dormant])
def test_without_dormant_values_weights_come_as_zeros_and_their_moments_by_rule(name: str, optimizer: str) -> None:
    algorithm = BY_NAME[name]
    model = sparsified(algorithm, "unstructured")
    made = OPTIMIZERS[optimizer](model.parameters())
    attached(model, made, algorithm)
    before = sparsefx.masks(model)
    grown_ever = 0
    for _ in steps(model, made, batches(STEPS)):
        for parameter, mask in sparsefx.masks(model).items():
            weight = model.get_parameter(parameter)
            grown, dropped = mask & ~before[parameter], before[parameter] & ~mask
            grown_ever += int(grown.sum())
            assert not weight.detach()[~mask].any()
            assert name in BEGINS_UPDATED or not weight.detach()[grown].any()
            for value in made.state[weight].values():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape and not algorithm.keeps_moments:
                    assert not value[grown | dropped].any()
                    assert not value[~mask].any()
                elif isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    assert value[~mask].any()
        before = sparsefx.masks(model)
    assert (grown_ever > 0) == (algorithm.moves and name not in SHRINKING)
    assert all(record.dormant is None for _, _, record in sparse_parameters(model))
