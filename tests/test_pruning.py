"""The public functions of channel pruning: plans, copies, training that goes on, patterns, widths, errors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import CaptureError, NonFiniteError, OptimizerError, OptionError, StateError
from sparsefx.passes.channels.widths import holds
from sparsefx.sparse_parameter import sparse_parameters


class Small(nn.Module):
    """A residual net whose stem has empty filters in channels 0 to 9 of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.body = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 5)
        with torch.no_grad():
            self.stem.weight[:10] = 0
            self.norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.norm(self.stem(x)))
        x = torch.relu(self.body(x))
        made: Tensor = self.head(x.mean((2, 3)))
        return made


def _image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def test_inputs_that_the_model_does_not_take_are_told_from_a_model_that_cannot_be_followed() -> None:
    class Branching(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.mean() > 0 else -x)

    model = Branching()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError, match=r"Branching cannot be followed: .* prune the largest of its submodules"):
        sparsefx.prune_channels(model, _image())
    with pytest.raises(
        CaptureError, match=r"does not run on the example inputs \(float32\[2, 4, 8, 8\]\): .*4 channels.*give inputs"
    ):
        sparsefx.prune_channels(model, torch.randn(2, 4, 8, 8))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_pruned_model_is_of_its_class_and_the_given_one_is_untouched() -> None:
    model, x = Small().eval(), _image()
    before = copy.deepcopy(model.state_dict())
    small = sparsefx.prune_channels(model, x, multiple=1)
    assert type(small) is Small
    assert not small.training
    assert small.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert small.stem.out_channels == small.norm.num_features == small.body.in_channels == 22
    torch.testing.assert_close(small(x), model(x))


def test_a_plan_is_saved_loaded_and_carried_out_on_a_fresh_model(tmp_path: Path) -> None:
    model, x = Small().eval(), _image()
    small = sparsefx.prune_channels(model, x, multiple=1)
    plan = sparsefx.channel_plan_of(small)
    plan.save(tmp_path / "plan.safetensors")
    loaded = sparsefx.ChannelPlan.load(tmp_path / "plan.safetensors")
    assert loaded.report == plan.report
    assert loaded.attributes == plan.attributes
    fresh = sparsefx.apply_channel_plan(Small().eval(), loaded)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x))
    assert torch.equal(sparsefx.apply_channel_plan(model, loaded)(x), small(x))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.safetensors"]


def test_a_pruned_model_trains() -> None:
    small = sparsefx.prune_channels(Small().eval(), _image(), multiple=1).train()
    small(_image()).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in small.parameters())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_goes_on_with_the_loss_of_the_unpruned_model(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = Small().double()
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **extra)  # type: ignore[call-arg]

    def step(net: nn.Module, by: torch.optim.Optimizer, x: Tensor) -> float:
        by.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        with torch.no_grad():
            for layer in ("stem", "body"):
                weight = net.get_submodule(layer).weight
                weight.grad[(weight == 0).flatten(1).all(1)] = 0  # type: ignore[union-attr, index, operator]
        by.step()
        return float(loss.detach())

    for _ in range(3):
        step(model, optimizer, _image().double())
    with torch.no_grad():
        model.body.weight[:7] = 0
    wide, x = copy.deepcopy(model), _image().double()
    plan = sparsefx.prune_channels_(model, x, optimizer, multiple=1)
    assert model.body.out_channels == 25, "in both modes a constant of its bias"
    assert plan.report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    for parameter, state in optimizer.state.items():
        assert all(value.shape == parameter.shape for value in state.values() if isinstance(value, Tensor) and value.dim())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    expected = wide.train()(x).square().mean()
    torch.testing.assert_close(torch.tensor(step(model.train(), optimizer, x), dtype=torch.float64), expected.detach())
    step(model, optimizer, x)


def test_constants_on_which_the_modes_differ_stay_with_an_optimizer() -> None:
    model, x = Small().eval(), _image()
    with torch.no_grad():
        assert model.norm.running_mean is not None
        model.norm.running_mean.fill_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert sparsefx.channel_plan(model, x, multiple=1).report.layers[0].outputs_after == 22
    sparsefx.prune_channels_(model, x, optimizer, multiple=1)
    assert model.stem.out_channels == 32


def test_an_optimizer_whose_state_cannot_be_cut_is_refused_and_nothing_changes() -> None:
    model, x = Small(), _image()
    optimizer = torch.optim.Adafactor(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.body.weight[:7] = 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptimizerError, match="cannot be cut along"):
        sparsefx.prune_channels_(model, x, optimizer, multiple=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.body.out_channels == 32


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_parameter_with_hooks_is_not_replaced(register: str) -> None:
    calls: list[Tensor] = []
    model, x = Small(), _image()
    handle = getattr(model.body.weight, register)(calls.append)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=r"body\.weight would be replaced .* has hooks"):
        sparsefx.prune_channels_(model, x, torch.optim.SGD(model.parameters(), lr=0.1), multiple=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.stem.out_channels == 32
    assert sparsefx.prune_channels(model, x, multiple=1).stem.out_channels == 22, "a copy has no hooks"
    model(x).sum().backward()
    assert len(calls) == 1
    handle.remove()
    model.head.bias.register_hook(lambda given: None)  # stays as it is
    sparsefx.prune_channels_(model, x, multiple=1)
    assert model.stem.out_channels == 22


def test_widths_are_rounded_up_and_both_are_reported() -> None:
    plan = sparsefx.channel_plan(Small().eval(), _image(), multiple=8)
    stem = plan.report.layers[0]
    assert (stem.outputs, stem.outputs_after, stem.outputs_needed) == (32, 24, 22)
    assert plan.report.multiple == 8
    assert "-> 24" in str(plan.report)
    assert sparsefx.channel_plan(Small().eval(), _image()).report.multiple in (8, 16)


def test_masks_and_dormant_values_are_cut_with_their_weights() -> None:
    model, x = Small(), _image()
    sparsefx.sparsify(model, pattern="channel", density=0.5, example_inputs=x, include="body")
    small = sparsefx.prune_channels(model.eval(), x, multiple=1)
    assert small.body.weight.shape == (16, 22, 1, 1)
    ((name, parameter, record),) = sparse_parameters(small)
    assert name == "body.weight"
    assert record.mask.shape == parameter.shape
    assert record.dormant is not None
    assert record.dormant.shape == parameter.shape
    assert sparsefx.audit(small).layers[1].shape == (16, 22, 1, 1)
    sparsefx.finalize(small)
    torch.testing.assert_close(small(x), model(x))


def test_two_of_four_stays_two_of_four() -> None:
    model, x = Small(), _image()
    sparsefx.sparsify(model, pattern="2:4", example_inputs=x, include="body", algorithm="static")
    small = sparsefx.prune_channels(model.eval(), x, multiple=1)
    assert holds(small.body.weight.detach(), 1, 2, 4)
    assert small.body.in_channels == 24, "two whole groups of four went, and half of the third had to stay"
    torch.testing.assert_close(small(x), model(x))


def test_a_runtime_has_to_let_go_first() -> None:
    model, x = Small(), _image()
    sparsefx.sparsify(model, pattern="channel", example_inputs=x, include="body")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runtime = sparsefx.attach(model, optimizer, total_steps=10)
    with pytest.raises(StateError, match="detach"):
        sparsefx.prune_channels_(model, x, optimizer)
    runtime.detach()
    sparsefx.prune_channels_(model, x, optimizer, multiple=1)
    sparsefx.attach(model, optimizer, total_steps=10)
    model.train()(x).sum().backward()
    optimizer.step()
    assert model.body.out_channels == 16


def test_bad_arguments_are_refused_in_words() -> None:
    model, x = Small().eval(), _image()
    with pytest.raises(OptionError, match="expected 'auto' or a positive number"):
        sparsefx.prune_channels(model, x, multiple=0)
    with pytest.raises(OptionError, match=r"expected a torch\.nn\.Module"):
        sparsefx.prune_channels("model", x)  # type: ignore[type-var]
    with pytest.raises(StateError, match="was not pruned"):
        sparsefx.channel_plan_of(model)
    plan = sparsefx.channel_plan(model, x, multiple=1)
    with pytest.raises(StateError, match="does not have"):
        sparsefx.apply_channel_plan(nn.Linear(3, 3), plan)
    with pytest.raises(StateError, match="here it has"):
        sparsefx.apply_channel_plan(sparsefx.apply_channel_plan(model, plan), plan)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"head\.bias"):
        sparsefx.channel_plan(model, x)


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no file"):
        sparsefx.ChannelPlan.load(tmp_path / "missing.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(OptionError, match="holds no channel plan"):
        sparsefx.ChannelPlan.load(tmp_path / "other.safetensors")
    with pytest.raises(OptionError, match="does not exist; create it first"):
        sparsefx.channel_plan(Small().eval(), _image(), multiple=1).save(tmp_path / "no" / "such" / "folder")


@pytest.mark.parametrize(
    ("kind", "size", "layout"),
    [(nn.Conv2d, (1, 3, 5, 5), torch.channels_last), (nn.Conv3d, (1, 3, 5, 5, 5), torch.channels_last_3d)],
)
def test_weights_keep_their_memory_format(kind: type[nn.Module], size: tuple[int, ...], layout: torch.memory_format) -> None:
    model = nn.Sequential(kind(3, 8, 3, padding=1), nn.ReLU(), kind(8, 2, 3)).eval()  # type: ignore[call-arg]
    with torch.no_grad():
        model.get_parameter("0.weight")[1:4] = 0
        model.get_parameter("0.bias")[1:4] = 0
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    small = sparsefx.prune_channels(model, torch.randn(size), multiple=1)
    assert small.get_parameter("0.weight").shape[0] == small.get_parameter("2.weight").shape[1] == 5
    assert small.get_parameter("0.weight").is_contiguous(memory_format=layout)
    assert small.get_parameter("2.weight").is_contiguous(memory_format=layout)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_channels_stay_and_keep_nothing_else_from_going() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none, self.first, self.last = nn.Linear(4, 0), nn.Linear(4, 8), nn.Linear(8, 3)
            self.behind, self.table = nn.Linear(0, 3), nn.Embedding(3, 0)
            with torch.no_grad():
                self.first.weight[1:4] = 0

        def forward(self, x: Tensor) -> Tensor:
            found = self.table(torch.zeros(len(x), dtype=torch.long))
            made: Tensor = self.last(torch.relu(self.first(x))) + self.behind(torch.relu(self.none(x)) + found)
            return made

    model, x = Beside().eval(), torch.randn(2, 4)
    small = sparsefx.prune_channels(model, x, multiple=1)
    assert small.first.out_features == 5
    torch.testing.assert_close(small(x), model(x))
