"""Pattern channel:coupled from sparsify to a smaller network: what training empties can be cut out."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import sparsefx
from sparsefx.errors import OptimizerError, OptionError, StateError
from sparsefx.sparse_parameter import sparse_parameters

IMAGE = (2, 16, 8, 8)


class Residual(nn.Module):
    """Two blocks behind a shortcut, with batch norms, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Conv2d(16, 32, 1, bias=False)
        self.first, self.second = nn.Conv2d(16, 48, 3, padding=1), nn.Conv2d(48, 32, 3, padding=1)
        self.third, self.fourth = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 32, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in (48, 32, 16)])
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.norms[0](self.first(x)))
        x = functional.relu(self.norms[1](self.short(x) + self.second(inner)))
        x = x + self.fourth(functional.gelu(self.norms[2](self.third(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def _model() -> Residual:
    torch.manual_seed(0)
    return Residual()


def _sparse(model: nn.Module, **options: object) -> nn.Module:
    choice = {"pattern": "channel:coupled", "density": 0.5, "example_inputs": torch.randn(IMAGE)} | options
    return sparsefx.sparsify(model, **choice)  # type: ignore[arg-type]


def _train(model: nn.Module, steps: int, **options: object) -> Iterator[sparsefx.MaskRuntime]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    runtime = sparsefx.attach(model, optimizer, total_steps=steps, **options)  # type: ignore[arg-type]
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randn(8, *IMAGE[1:])), torch.randint(0, 16, (8,))).backward()
        optimizer.step()
        yield runtime


def _left(model: nn.Module) -> dict[str, list[int]]:
    found = {}
    for name, mask in sparsefx.masks(model).items():
        some = mask.flatten(1).any(1)
        assert torch.equal(some, mask.flatten(1).all(1))
        found[name.removesuffix(".weight")] = some.nonzero().flatten().tolist()
    return found


def test_the_audit_says_which_layers_gain_nothing() -> None:
    audit = sparsefx.audit(_model(), pattern="channel:coupled", example_inputs=torch.randn(IMAGE))
    reasons = {layer.name: layer.reason for layer in audit.layers if not layer.sparse}
    assert reasons == {"head": "none of its channels could be cut out: it is an output of the model"}


def test_layers_that_are_added_up_keep_the_same_filters_at_every_step_and_all_others_are_cut_out() -> None:
    model = _sparse(_model())
    seen = set()
    for _ in _train(model, 12, exploit="regularize"):
        left = _left(model)
        assert {name: len(rows) for name, rows in left.items()} == {
            "short": 16,
            "first": 24,
            "second": 16,
            "third": 8,
            "fourth": 16,
        }
        assert left["short"] == left["second"] == left["fourth"]
        seen.add(tuple(map(tuple, left.values())))
    assert len(seen) > 1, "masks never moved"
    model.eval()
    x = torch.randn(IMAGE)
    small = sparsefx.prune_channels(model, x, multiple=1)
    torch.testing.assert_close(small(x), model(x))
    plan = sparsefx.channel_plan_of(small)
    assert plan is not None
    rows = {row.weight: row for row in plan.report.layers}
    # One filter may stay behind batch norm and relu, to carry the constants of the others over padding.
    assert rows["first.weight"].outputs_after in (24, 25)
    assert [rows[f"{name}.weight"].outputs_after for name in ("short", "second", "third", "fourth")] == [16, 16, 9, 16]


def test_layers_with_a_dense_companion_stay_dense() -> None:
    model = _sparse(_model(), exclude=["short"])
    audit = sparsefx.audit(model)
    assert {layer.name for layer in audit.layers if layer.sparse} == {"first", "third"}
    (second,) = (layer for layer in audit.layers if layer.name == "second")
    assert "they go together with those of short.weight, which stays dense" in second.reason


def test_gradual_pruning_goes_on_with_what_it_has_emptied() -> None:
    model = _sparse(_model(), algorithm=sparsefx.algorithms.Gradual(rewire_every=3))
    before: set[int] = set(range(32))
    counts = []
    for _ in _train(model, 12):
        left = _left(model)
        assert set(left["short"]) <= before
        assert left["short"] == left["second"]
        before = set(left["short"])
        counts.append(len(before))
    assert counts[0] > 16
    assert counts[-1] == 16


def test_static_masks_by_a_look_at_data() -> None:
    batches = [(torch.randn(8, *IMAGE[1:]), torch.randint(0, 16, (8,)))]
    model = _sparse(
        _model(),
        algorithm="snip",
        calibration=batches,
        loss_fn=lambda net, batch: functional.cross_entropy(net(batch[0]), batch[1]),
    )
    assert _left(model)["short"] == _left(model)["second"]


@pytest.mark.parametrize("algorithm", ["rigl", "set", "sparse-momentum", "wanda"])
def test_methods_that_choose_layer_by_layer_are_refused(algorithm: str) -> None:
    model = _model()
    with pytest.raises(OptionError, match=r"chooses the channels of each layer for itself; use .*magnitude.*gradual"):
        _sparse(model, algorithm=algorithm)
    assert not sparsefx.masks(model)


def test_what_it_needs_is_asked_for() -> None:
    with pytest.raises(OptionError, match="pass inputs that the model accepts"):
        sparsefx.sparsify(_model(), pattern="channel:coupled")
    with pytest.raises(OptionError, match="where layers lose channels together"):
        _sparse(_model(), densities="erk")
    with pytest.raises(OptionError, match="need all layers at once"):
        sparsefx.mask_once(_model(), pattern="channel:coupled", example_inputs=torch.randn(IMAGE))


def test_one_optimizer_has_to_hold_what_goes_together() -> None:
    model = _sparse(_model())
    assert isinstance(model, Residual)
    parts: list[list[Tensor]] = [[model.short.weight], [one for one in model.parameters() if one is not model.short.weight]]
    optimizers = [torch.optim.SGD(part, 0.1) for part in parts]
    with pytest.raises(OptimizerError, match="is coupled"):
        sparsefx.attach(model, optimizers, total_steps=5)


def test_a_copy_trains_as_the_original_does() -> None:
    model = _sparse(_model())
    other = copy.deepcopy(model)
    for one in (model, other):
        for _ in _train(one, 4):
            pass
    assert _left(model) == _left(other)
    for (_, first), (_, second) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(first, second)


def test_masks_come_back_from_a_checkpoint_and_dense_weights_are_cut_together() -> None:
    model = _sparse(_model())
    for _ in _train(model, 5):
        pass
    fresh = _sparse(_model())
    fresh.load_state_dict(model.state_dict())
    assert _left(fresh) == _left(model)
    fresh = _sparse(_model())
    torch.manual_seed(7)
    dense = Residual()
    fresh.load_state_dict(dense.state_dict())
    left = _left(fresh)
    assert left["short"] == left["second"] == left["fourth"]
    assert len(left["short"]) == 16
    for name, parameter, record in sparse_parameters(fresh):
        assert torch.equal(parameter != 0, record.mask), name
        assert torch.equal(torch.where(record.mask, parameter, dense.get_parameter(name)), dense.get_parameter(name))


def test_what_was_cut_is_not_emptied_again_by_itself() -> None:
    model = _sparse(_model()).eval()
    small = sparsefx.prune_channels(model, torch.randn(IMAGE), multiple=1)
    with pytest.raises(StateError, match=r"channels were cut.*sparsefx\.finalize"):
        sparsefx.attach(small, torch.optim.SGD(small.parameters(), 0.1), total_steps=5)
    again = sparsefx.finalize(small)
    _sparse(again)
    assert len(_left(again)["first"]) in (12, 13)


def test_a_real_network() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    x = torch.randn(2, 3, 64, 64)
    sparsefx.sparsify(model, pattern="channel:coupled", density=0.25, example_inputs=x, algorithm="static")
    plan = sparsefx.channel_plan(model.eval(), x, multiple=1)
    assert all(row.outputs - row.outputs_after == row.empty for row in plan.report.layers)
    assert plan.report.parameters_after < 0.1 * plan.report.parameters
