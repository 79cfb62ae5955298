"""A slice of the sweep over files with a free batch, and its page."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.dynamic_batch import page
from benchmarks.dynamic_batch_checks import check, rows
from benchmarks.zoo import Case, find

NAMES = ("shipped/digits_net", "torchvision/squeezenet1_1", "timm/vit_tiny_patch16_224", "transformers/Llama", "transformers/T5")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:timm.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchvision.*"),
]


@pytest.mark.parametrize("name", NAMES)
def test_real_models_run_at_other_batches(name: str) -> None:
    library = name.partition("/")[0]
    if library != "shipped" and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (pip install 'sparsefx[zoo]')")
    result = check(find(name))
    assert result["outcome"] == "exported", result["detail"]
    assert list(result["errors"]) == ["1", "3", "5"]
    assert 0 <= max(result["errors"].values()) < 1e-4
    assert result["sparse"] > 0


def case(model: type[nn.Module], call: Any) -> Case:
    return Case("shipped", model.__name__, "none", model, call)


class Fixed(nn.Module):
    """Its own code says that there are two images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(2, 4, 4).sum(1)


class Branching(nn.Module):
    """What torch.export does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Two(nn.Module):
    """Inputs without a common first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x) + y.sum()


@pytest.mark.parametrize(
    ("model", "call", "outcome"),
    [
        (Fixed, lambda: ((torch.randn(2, 16),), {}), "batch baked in"),
        (Branching, lambda: ((torch.randn(2, 16),), {}), "not exported"),
        (Two, lambda: ((torch.randn(2, 16), torch.randn(5)), {}), "no batch"),
    ],
)
def test_why_a_batch_is_not_free(model: type[nn.Module], call: Any, outcome: str) -> None:
    result = check(case(model, call))
    assert (result["outcome"], bool(result["detail"])) == (outcome, True)


def test_rows_are_all_different() -> None:
    args, kwargs = rows(case(Fixed, lambda: ((torch.randn(2, 16),), {"y": torch.randn(2), "n": 3})), 5)
    assert (args[0].shape, kwargs["y"].shape, kwargs["n"]) == ((5, 16), (5,), 3)
    assert len({tuple(row) for row in args[0].tolist()}) == 5


def test_the_page_counts_outcomes_and_gives_reasons() -> None:
    common = {"library": "timm", "family": "odd", "detail": ""}
    text = page(
        [
            {**common, "name": "a", "outcome": "exported", "bytes": 2e6, "sparse": 3, "errors": {"1": 0, "3": 1e-6, "5": 2e-6}},
            {**common, "name": "b", "outcome": "batch baked in", "detail": "torch.export refuses | it"},
        ]
    )
    assert "| exported | 1 | 1 |" in text
    assert "| batch baked in | 1 | 1 |" in text
    assert "| timm/b | batch baked in | torch.export refuses \\| it |" in text
    assert "| timm/a | exported | 2.0 MB | 3 | 0.0e+00 | 1.0e-06 | 2.0e-06 | 0 s |" in text
