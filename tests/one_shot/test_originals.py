"""The way back from one-shot masks: exact, on the disk, and no second copy of the weights in memory."""

from __future__ import annotations

import gc
import resource
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import NonFiniteError, OptionError, SparsefxError
from sparsefx.one_shot import SparseGPT, Wanda, solve
from sparsefx.one_shot.originals import Originals
from sparsefx.patterns import parse


def net(layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(48, 48) for _ in range(layers)))


def batches() -> list[Tensor]:
    return list(torch.randn(3, 64, 48, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_bit_comes_back_in_any_layout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = {
        "plain": torch.randn(5, 7).to(dtype),
        "channels_last": torch.randn(4, 8, 3, 3).to(dtype).to(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 4).to(dtype).T,
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    kept = Originals()
    wanted = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        kept.keep(name, weight)
    for name, weight in weights.items():
        weight.zero_()
        kept.restore(name, weight)
        assert torch.equal(weight, wanted[name])
        assert weight.stride() == wanted[name].stride()
    untouched = torch.ones(3)
    kept.restore("another", untouched)
    assert bool((untouched == 1).all())


def test_weights_of_earlier_layers_are_not_in_memory() -> None:
    """Of four layers, at most the one at work has copies; with all originals at hand there would be three more by the end."""
    model = net(4)
    alive: list[int] = []

    class Counting(Wanda):
        def solve(self, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            gc.collect()
            found = [one for one in gc.get_objects() if type(one) is Tensor and one.shape == (48, 48) and one.is_floating_point()]
            own = {parameter.data_ptr() for parameter in model.parameters()}
            alive.append(len({one.data_ptr() for one in found} - own))
            return super().solve(weight, *rest)

    names = [f"{layer}.weight" for layer in range(4)]
    solution = solve(model, names, pattern=parse("2:4"), density=0.5, method=Counting(), calibration=batches())
    assert len(alive) == 4
    assert max(alive) <= alive[0] + 1
    assert len(solution.masks) == 4


@pytest.mark.parametrize("algorithm", ["wanda", "sparsegpt"])
def test_mask_once_gives_the_weights_of_sparsify_and_keeps_nothing(algorithm: str) -> None:
    first, second = net(), net()
    sparsefx.finalize(sparsefx.sparsify(first, algorithm=algorithm, calibration=batches()))
    assert sparsefx.mask_once(second, algorithm=algorithm, calibration=batches()) is second
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sparsefx.masks(second) == {}
    assert float((second[0].weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"algorithm": "rigl"}, OptionError, "algorithm='rigl' was given; expected 'magnitude', 'wanda' or 'sparsegpt'"),
        ({"calibration": [torch.zeros(1, 48)]}, OptionError, "masks by magnitude use none"),
        ({"algorithm": "wanda"}, OptionError, "calibration=NoneType; expected batches"),
        ({"algorithm": "wanda", "calibration": [torch.full((1, 48), torch.nan)]}, NonFiniteError, r"0\.weight"),
        ({"algorithm": "sparsegpt", "calibration": batches(), "pattern": "2:4-transposable"}, OptionError, "cannot be used with"),
    ],
)
def test_mask_once_refuses_and_changes_nothing(options: dict[str, Any], error: type[SparsefxError], text: str) -> None:
    model = net()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(error, match=text):
        sparsefx.mask_once(model, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("features", [48, 32])  # the second layer's 9216 bytes are more than a buffer takes, 4096 are less
def test_a_full_disk_puts_everything_back(features: int) -> None:
    model = nn.Sequential(nn.Linear(features, features), nn.Linear(features, features))
    inputs = [batch[:, :features] for batch in batches()]
    size = 4 * features * features
    before = [parameter.clone() for parameter in model.parameters()]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Room for the first layer, not for the second.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2000, limits[1]))
        with pytest.raises(OptionError, match=rf"the original weights, {size} bytes .* File too large; .* set TMPDIR"):
            sparsefx.sparsify(model, algorithm="sparsegpt", calibration=inputs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert sparsefx.masks(model) == {}


@pytest.mark.parametrize("pattern", ["2:3", "1:5", "3:12", "2:16"])
def test_sparsegpt_takes_any_group_size(pattern: str) -> None:
    chosen = parse(pattern)
    n, m = map(int, pattern.split(":"))
    columns = 240
    torch.manual_seed(0)
    weight, inputs = torch.randn(8, columns, dtype=torch.float64), torch.randn(600, columns, dtype=torch.float64)
    gram = inputs.T @ inputs
    found, mask = SparseGPT(block=32).solve(weight, gram, chosen, n / m)
    assert bool((mask.view(8, -1, m).sum(-1) == n).all())
    # Blocks only defer the updates: one block of all columns gives the same.
    whole, whole_mask = SparseGPT(block=columns).solve(weight, gram, chosen, n / m)
    assert torch.equal(mask, whole_mask)
    torch.testing.assert_close(found, whole)
    kept = weight.masked_fill(~chosen.mask(weight), 0)
    assert float(((found - weight) @ inputs.T).square().sum()) < float(((kept - weight) @ inputs.T).square().sum())
