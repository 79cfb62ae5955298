"""A slice of the coverage sweep: a model or two of each library through every check, from sparsify to onnxruntime."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from benchmarks.coverage_checks import STEPS, cover
from benchmarks.coverage_table import page
from benchmarks.zoo import LIBRARIES, cases, find

SLICE = {
    "shipped": ("digits_net", "tagging_lstm"),
    "torchvision": ("shufflenet_v2_x0_5",),
    "timm": ("starnet_s050",),
    "transformers": ("Bert", "Mixtral"),
}
NAMES = [f"{library}/{name}" for library, names in SLICE.items() for name in names]
pytestmark = [
    pytest.mark.filterwarnings("ignore:this model was sparsified"),
    pytest.mark.filterwarnings("ignore::UserWarning:timm.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchvision.*"),
]


def _need(library: str) -> None:
    if library != "shipped" and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (pip install 'sparsefx[zoo]')")


@pytest.mark.parametrize("name", NAMES)
def test_a_real_model_passes_every_check(name: str) -> None:
    _need(name.partition("/")[0])
    result = cover(find(name))
    assert list(result["steps"]) == list(STEPS)
    failed = {step: found["detail"] for step, found in result["steps"].items() if not found["ok"]}
    assert failed == {}
    sparsity = result["sparsity"]
    assert sparsity["audit_flops"] == sparsity["flops"] > 0
    assert sparsity["dense_against_rule"] == sparsity["sparse_against_rule"] == []
    assert sparsity["sparse_flops"] == sparsity["allowed_flops"] > 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_names_of_the_zoo_are_unique(library: str) -> None:
    _need(library)
    names = [case.name for case in cases(library)]
    assert len(names) == len(set(names)) >= len(SLICE[library])
    assert all(case.library == library for case in cases(library))


def test_the_page_tells_of_failures_and_refusals() -> None:
    result: dict[str, Any] = {
        "library": "timm",
        "name": "odd_net",
        "family": "odd",
        "steps": {
            "sparsify": {"ok": True, "detail": "", "seconds": 1},
            "export": {"ok": False, "detail": "torch.export refuses | it", "parts": "backbone", "seconds": 1},
        },
        "sparsity": {
            "flops": 100,
            "computed_flops": 0,
            "sparse_flops": 50,
            "allowed_flops": 60,
            "audit_flops": 100,
            "dense_against_rule": ["head.weight: is odd"],
            "sparse_against_rule": [],
        },
    }
    text = page([result])
    assert "| sparsify | 1 of 1 | 1 of 1 |" in text
    assert "| export | 0 of 1 | 0 of 1 |" in text
    assert "| timm/odd_net | torch.export refuses \\| it | backbone |" in text
    assert "| timm/odd | 1 | 50.0000% | 60.0000% | NO | yes |  |" in text
    assert "- timm/odd: head.weight: is odd" in text
