"""sparsefx.save and sparsefx.load: what comes back, into what model, and what is told where a file does not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparsefx
from sparsefx.errors import OptionError, StateError
from sparsefx.sparse_parameter import sparse_parameters
from sparsefx.weights_file import load_weights
from tests.training import batches, small_net, train


def trained(steps: int = 4, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, sparsefx.MaskRuntime]:
    model = sparsefx.sparsify(small_net(), **options)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    every = {"rewire_every": 10} if options.get("algorithm") == "rigl" else {}
    runtime = sparsefx.attach(model, optimizer, total_steps=20, **every)
    train(model, optimizer, batches(steps))
    return model, optimizer, runtime


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a failed load must leave alone, as copies."""
    found: dict[str, Any] = dict(copy.deepcopy(model.state_dict()))
    for name, _, record in sparse_parameters(model):
        found[name, "mask"] = record.mask.clone()
        found[name, "dormant"] = None if record.dormant is None else record.dormant.clone()
        found[name, "rest"] = (record.density, record.target, record.merged, record.algorithm, record.pattern.name)
    return found


def assert_equal(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert same, key


@pytest.mark.parametrize(
    ("pattern", "algorithm"),
    [
        ("2:4", "magnitude"),
        ("2:4-transposable", "static"),
        ("unstructured", "rigl"),
        ("unstructured:global", "magnitude"),
        ("block:1x8", "magnitude"),
        ("channel", "static"),
        ("unstructured", sparsefx.algorithms.RigL(drop_fraction=0.2, rewire_every=3)),
    ],
    ids=str,
)
def test_a_dense_model_becomes_sparse_as_the_saved_one_was(tmp_path: Path, pattern: str, algorithm: Any) -> None:
    model, _, _ = trained(pattern=pattern, algorithm=algorithm, example_inputs=batches(1)[0][0])
    sparsefx.save(model, tmp_path / "model.safetensors")
    again = small_net(seed=5)
    loaded = sparsefx.load(again, tmp_path / "model.safetensors")
    assert_equal(everything(model), everything(again))
    assert set(loaded.masked) == set(sparsefx.masks(model))
    assert sparsefx.audit(again).to_json() == sparsefx.audit(model).to_json()
    assert next(sparse_parameters(again))[2].algorithm == next(sparse_parameters(model))[2].algorithm
    assert len(list(sparsefx.graph(again).graph.nodes)) == len(list(sparsefx.graph(model).graph.nodes))
    # It is a sparsified model in every respect: dense weights that are loaded are masked, and it can be finalized.
    again.load_state_dict(small_net(seed=7).state_dict())
    assert all(not again.get_parameter(name)[~mask].any() for name, mask in sparsefx.masks(again).items())
    sparsefx.finalize(again)


@pytest.mark.parametrize("first", ["sparse", "dense"])
@pytest.mark.parametrize("algorithm", ["magnitude", "sparse-momentum", "set", "rigl"])
def test_a_run_goes_on_from_a_file_bit_for_bit(tmp_path: Path, algorithm: str, first: str) -> None:
    options: dict[str, Any] = {} if algorithm == "magnitude" else {"rewire_every": 3}
    pattern = "2:4" if algorithm == "magnitude" else "unstructured"

    def begin(seed: int, sparse: bool = True) -> Any:
        model = small_net(seed)
        if sparse:
            sparsefx.sparsify(model, pattern=pattern, algorithm=algorithm)
        else:
            sparsefx.load(model, tmp_path / "run")
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        return model, optimizer, sparsefx.attach(model, optimizer, total_steps=20, **options)

    data = batches(12)
    model, optimizer, runtime = begin(0)
    train(model, optimizer, data[:7])
    sparsefx.save(model, tmp_path / "run", runtime=runtime, extra={"optimizer": optimizer.state_dict(), "epoch": 3})
    train(model, optimizer, data[7:])

    resumed, again, second = begin(9, sparse=first == "sparse")
    loaded = sparsefx.load(resumed, tmp_path / "run", runtime=second)
    again.load_state_dict(loaded.extra["optimizer"])
    assert (loaded.extra["epoch"], second.step) == (3, 7)
    train(resumed, again, data[7:])
    assert_equal(everything(model), everything(resumed))
    for key, value in optimizer.state_dict()["state"].items():
        assert_equal(value, again.state_dict()["state"][key])


def test_the_file_is_small_and_any_reader_finds_the_sparse_model_in_it(tmp_path: Path) -> None:
    model = sparsefx.sparsify(nn.Sequential(nn.Linear(256, 256, bias=False)), algorithm="static")
    sparsefx.save(model, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 256 * 256 * (4 + 1 / 8) + 4096  # the weights, one bit a weight, and the description
    dense = nn.Sequential(nn.Linear(256, 256, bias=False))
    dense.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(dense[0].weight, model[0].weight)
    other = nn.Sequential(nn.Linear(256, 256, bias=False))
    load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(other[0].weight, model[0].weight)


def test_weights_alone(tmp_path: Path) -> None:
    model, _, _ = trained()
    sparsefx.save(model, tmp_path / "model")
    dense = small_net(seed=5)
    assert sparsefx.load(dense, tmp_path / "model", masks=False).masked == ()
    assert sparsefx.masks(dense) == {}
    assert torch.equal(dense[0].weight, model[0].weight)
    other = sparsefx.sparsify(small_net(seed=5), pattern="1:4")
    sparsefx.load(other, tmp_path / "model", masks=False)
    assert all(int(mask.sum()) * 4 == mask.numel() for mask in sparsefx.masks(other).values())


@pytest.mark.parametrize("how", ["torch.save", "safetensors", "finalized", "wrapped in a dict", "of a replica"])
def test_a_file_without_masks(tmp_path: Path, how: str) -> None:
    path = tmp_path / "weights.safetensors"
    source = small_net(seed=4)
    if how == "torch.save":
        torch.save(source.state_dict(), path := tmp_path / "weights.pt")
    elif how == "safetensors":
        save_file(source.state_dict(), path)
    elif how == "finalized":
        sparsefx.save(source, path)
    elif how == "wrapped in a dict":
        torch.save({"model": source.state_dict(), "epoch": 1}, path := tmp_path / "weights.pt")
    else:
        torch.save({f"module.{name}": value for name, value in source.state_dict().items()}, path := tmp_path / "weights.pt")
    dense, sparse = small_net(), sparsefx.sparsify(small_net())
    sparsefx.load(dense, path)
    sparsefx.load(sparse, path)
    assert_equal(everything(dense), everything(source))
    assert_equal(everything(sparse), everything(sparsefx.sparsify(small_net(seed=4))))


def test_other_patterns_and_layers_are_told(tmp_path: Path) -> None:
    model, _, runtime = trained()
    sparsefx.save(model, tmp_path / "model")
    for other, text in (
        (
            sparsefx.sparsify(small_net(seed=5), pattern="1:4"),
            "has pattern '2:4' for 0.weight, but the model has '1:4'; call spars",
        ),
        (sparsefx.sparsify(small_net(seed=5), exclude="5"), "only in the file is 5.weight sparse"),
    ):
        before = everything(other)
        with pytest.raises(StateError, match=text):
            sparsefx.load(other, tmp_path / "model")
        assert_equal(before, everything(other))
        sparsefx.finalize(other)  # the remedy that the message names
        sparsefx.load(other, tmp_path / "model")
        assert_equal(everything(model), everything(other))
    with pytest.raises(StateError, match="holds no state of a runtime"):
        sparsefx.load(model, tmp_path / "model", runtime=runtime)


def test_a_file_of_another_runtime_changes_nothing(tmp_path: Path) -> None:
    model, _, runtime = trained()
    sparsefx.save(model, tmp_path / "model", runtime=runtime)
    other, _, static = trained(algorithm="static")
    before = everything(other)
    with pytest.raises(StateError, match="algorithm 'magnitude', expected 'static'"):
        sparsefx.load(other, tmp_path / "model", runtime=static)
    assert_equal(before, everything(other))


@pytest.mark.parametrize("sparse", [False, True])
def test_partial_files(tmp_path: Path, sparse: bool) -> None:
    trunk = small_net()[:3]
    sparsefx.save(sparsefx.sparsify(trunk), tmp_path / "trunk")
    model = sparsefx.sparsify(small_net(seed=5)) if sparse else small_net(seed=5)
    before = everything(model)
    with pytest.raises(
        OptionError, match=r"does not fit the model: 2 missing \(5.weight, 5.bias\); strict=False loads what fits"
    ):
        sparsefx.load(model, tmp_path / "trunk")
    assert_equal(before, everything(model))
    loaded = sparsefx.load(model, tmp_path / "trunk", strict=False)
    assert (loaded.missing, loaded.masked) == (("5.weight", "5.bias"), ("0.weight",))
    assert torch.equal(model[0].weight, trunk[0].weight)
    assert torch.equal(model[5].weight, before["5.weight"])
    assert set(sparsefx.masks(model)) == ({"0.weight", "5.weight"} if sparse else {"0.weight"})


def test_another_shape_is_refused_even_where_parts_may_be_missing(tmp_path: Path) -> None:
    sparsefx.save(sparsefx.sparsify(nn.Sequential(nn.Linear(32, 32))), tmp_path / "model")
    model = nn.Sequential(nn.Linear(32, 16))
    before = everything(model)
    with pytest.raises(OptionError, match="2 of another shape"):
        sparsefx.load(model, tmp_path / "model", strict=False)
    assert_equal(before, everything(model))


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    model, _, _ = trained()
    sparsefx.save(nn.DataParallel(torch.compile(model, backend="eager")), tmp_path / "model")
    again = small_net(seed=5)
    sparsefx.load(torch.compile(again, backend="eager"), tmp_path / "model")
    assert_equal(everything(model), everything(again))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.register_buffer("rows", self.first.bias.detach()[4:8])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x))
        return result

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": 3, "scale": torch.ones(2)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def test_tied_weights_views_other_formats_and_extra_state(tmp_path: Path) -> None:
    model = sparsefx.sparsify(_Tied().to(torch.bfloat16))
    sparsefx.save(model, tmp_path / "model")
    again = _Tied().to(torch.bfloat16)
    sparsefx.load(again, tmp_path / "model")
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.rows, model.rows)
    assert again.second.weight is again.first.weight
    assert again.calls == 3
    last = sparsefx.sparsify(small_net().to(memory_format=torch.channels_last))
    sparsefx.save(last, tmp_path / "last")
    sparsefx.load(other := small_net(seed=3), tmp_path / "last")
    assert_equal(everything(last), everything(other))


def test_an_algorithm_of_ones_own_wants_a_model_sparsified_with_it(tmp_path: Path) -> None:
    own = sparsefx.algorithms.Composed(
        label="mine", drop=sparsefx.algorithms.scores.magnitude, grow=sparsefx.algorithms.scores.momentum, rewire_every=2
    )
    model = sparsefx.sparsify(small_net(), pattern="unstructured", algorithm=own)
    sparsefx.save(model, tmp_path / "model")
    dense = small_net(seed=5)
    before = everything(dense)
    with pytest.raises(
        StateError, match="an algorithm of your own, 'mine', which a file cannot hold; sparsify the model with it"
    ):
        sparsefx.load(dense, tmp_path / "model")
    assert_equal(before, everything(dense))
    sparse = sparsefx.sparsify(small_net(seed=5), pattern="unstructured", algorithm=own)
    sparsefx.load(sparse, tmp_path / "model")
    assert_equal(everything(model), everything(sparse))


@pytest.mark.parametrize("masks", [True, False])
def test_a_file_of_untied_layers_is_refused_by_a_model_that_ties_them(tmp_path: Path, masks: bool) -> None:
    def build(tied: bool) -> nn.Sequential:
        torch.manual_seed(3)
        made = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        if tied:
            made[1].weight = made[0].weight
        return made

    sparsefx.save(sparsefx.sparsify(build(False)), tmp_path / "model.safetensors")
    model = build(True)
    before = everything(model)
    with pytest.raises(OptionError, match=r"0\.weight and 1\.weight are one tensor"):
        sparsefx.load(model, tmp_path / "model.safetensors", masks=masks)
    assert_equal(before, everything(model))
    sparsefx.save(sparsefx.sparsify(build(True)), tmp_path / "tied.safetensors")
    sparsefx.load(model, tmp_path / "tied.safetensors")
    assert model[0].weight is model[1].weight


def test_a_mask_for_what_is_a_buffer_here_is_refused(tmp_path: Path) -> None:
    sparsefx.save(sparsefx.sparsify(nn.Sequential(nn.Linear(16, 16))), tmp_path / "model.safetensors")
    model = nn.Sequential(nn.Linear(16, 16))
    weight = model[0].weight.detach().clone()
    del model[0].weight
    model[0].register_buffer("weight", weight)
    with pytest.raises(StateError, match=r"0\.weight, which is a buffer"):
        sparsefx.load(model, tmp_path / "model.safetensors")
