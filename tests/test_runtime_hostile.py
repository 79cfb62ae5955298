"""Training loops, optimizers and models that do not do what one expects: nothing is lost, nothing leaks."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sparsefx
from sparsefx.errors import NonFiniteError, OptimizerError, OptionError, PatternError, StateError
from sparsefx.sparse_parameter import sparse_parameters


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def backward(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 32, generator=generator)).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 1) -> None:
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def leaks(model: nn.Module) -> int:
    return sum(int((p.detach()[~r.mask] != 0).sum()) for _, p, r in sparse_parameters(model))


def dormant_norm(model: nn.Module) -> float:
    return sum(float(r.dormant.norm()) for _, _, r in sparse_parameters(model) if r.dormant is not None)


class NestedAdam(torch.optim.Adam):
    """Its step() calls super().step(): torch runs the hooks of both."""

    seen: list[bool]

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.seen = [bool((p == 0).any()) for group in self.param_groups for p in group["params"] if p.dim() > 1]
        return loss


@pytest.mark.parametrize("with_closure", [False, True])
def test_an_optimizer_whose_step_calls_super_acts_once(with_closure: bool) -> None:
    torch.optim.Adam(net().parameters())  # patches the step of the base class too
    runs = []
    for kind in (torch.optim.Adam, NestedAdam):
        model = sparsefx.sparsify(net())
        optimizer = kind(model.parameters(), 0.01)
        runtime = sparsefx.attach(model, optimizer, total_steps=10, scale=0.5, exploit="none")
        for seed in range(3):
            optimizer.zero_grad()
            if with_closure:

                def closure(model: nn.Module = model, optimizer: Any = optimizer, seed: int = seed) -> Tensor:
                    optimizer.zero_grad()
                    backward(model, seed)
                    return torch.zeros(())

                optimizer.step(closure)
            else:
                backward(model, seed)
                optimizer.step()
        assert runtime.step == 3
        assert leaks(model) == 0
        runs.append((model, dormant_norm(model)))
    assert runs[0][1] == runs[1][1] > 0
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True))
    # What the subclass does after super().step() still finds dense weights.
    assert optimizer.seen == [False, False]


class Fails(torch.optim.SGD):
    broken = False

    def step(self, closure: Any = None) -> Any:
        if self.broken:
            raise RuntimeError("out of memory")
        return super().step(closure)


def failed() -> tuple[nn.Module, Fails, Any]:
    model = sparsefx.sparsify(net())
    optimizer = Fails(model.parameters(), 0.1)
    runtime = sparsefx.attach(model, optimizer, total_steps=100, scale=0.5, exploit="none")
    train(model, optimizer, 2)
    optimizer.broken = True
    return model, optimizer, runtime


def test_a_checkpoint_loaded_after_a_failed_step_keeps_dormant_values() -> None:
    model, optimizer, runtime = failed()
    saved = copy.deepcopy((model.state_dict(), runtime.state_dict()))
    norm = dormant_norm(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, optimizer, 1)
    model.load_state_dict(saved[0])
    runtime.load_state_dict(saved[1])
    assert leaks(model) == 0
    optimizer.broken = False
    optimizer.zero_grad()
    optimizer.step()
    assert dormant_norm(model) == norm
    assert all(torch.equal(a, b) for a, b in zip(saved[0].values(), model.state_dict().values(), strict=True))


def test_detaching_after_a_failed_step_leaves_a_sparse_model() -> None:
    model, optimizer, runtime = failed()
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, optimizer, 1)
    assert leaks(model) > 0
    runtime.detach()
    assert leaks(model) == 0


def test_a_step_that_is_tried_again_scales_gradients_once() -> None:
    model, optimizer, _ = failed()
    optimizer.zero_grad()
    backward(model)
    gradients = [p.grad.clone() for _, p, _ in sparse_parameters(model)]
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    for before, (_, parameter, record) in zip(gradients, sparse_parameters(model), strict=True):
        assert torch.equal(parameter.grad, torch.where(record.mask, before, 0.5 * before))


def test_the_gradient_scale_is_as_precise_as_the_weights() -> None:
    model = sparsefx.sparsify(net().double())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    sparsefx.attach(model, optimizer, total_steps=5, scale=0.1)
    model(torch.ones(2, 32, dtype=torch.float64)).sum().backward()
    before = model[0].weight.grad.clone()
    mask = sparsefx.masks(model)["0.weight"]
    optimizer.step()
    assert torch.equal(model[0].weight.grad, torch.where(mask, before, before * 0.1))


def test_a_density_schedule_resumes_in_either_order() -> None:
    schedule = sparsefx.schedules.cubic(1.0, 0.25, first_step=1, last_step=8)
    results = []
    for order in ("uninterrupted", "model first", "runtime first"):
        model = sparsefx.sparsify(net(), pattern="unstructured", density=0.25)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        runtime = sparsefx.attach(model, optimizer, total_steps=8, density_schedule=schedule)
        train(model, optimizer, 3)
        if order != "uninterrupted":
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), runtime.state_dict()))
            model = sparsefx.sparsify(net(seed=5), pattern="unstructured", density=0.25)
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            runtime = sparsefx.attach(model, optimizer, total_steps=8, density_schedule=schedule)
            if order == "runtime first":
                runtime.load_state_dict(saved[2])
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            if order == "model first":
                runtime.load_state_dict(saved[2])
            assert all(torch.equal(a, b) for a, b in zip(saved[0].values(), model.state_dict().values(), strict=True))
        train(model, optimizer, 3, first=4)
        results.append(model.state_dict())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0].values(), other.values(), strict=True))


def test_a_schedule_that_leaves_its_range_is_refused_before_weights_change() -> None:
    model = sparsefx.sparsify(net(), pattern="unstructured")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(PatternError):
        sparsefx.attach(model, optimizer, total_steps=4, density_schedule=lambda step: 1 - step / 4)
    with pytest.raises(OptionError, match="function of the step"):
        sparsefx.attach(model, optimizer, total_steps=4, density_schedule=0.5)  # type: ignore[arg-type]
    sparsefx.attach(model, optimizer, total_steps=4, density_schedule=lambda step: 0.0 if step == 2 else 0.5)
    train(model, optimizer, 1)
    with pytest.raises(PatternError):
        train(model, optimizer, 1)
    assert leaks(model) == 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


def test_a_dense_checkpoint_loaded_into_tied_weights_is_masked() -> None:
    model = sparsefx.sparsify(Tied())
    torch.manual_seed(3)
    model.load_state_dict(Tied().state_dict())
    assert leaks(model) == 0
    assert int(sparsefx.masks(model)["first.weight"].sum()) == 512


def test_one_parameter_with_two_masks_is_refused() -> None:
    model = Tied()
    sparsefx.sparsify(model.first)
    sparsefx.sparsify(model.second)
    with pytest.raises(StateError, match="one parameter with two masks"):
        sparsefx.attach(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=4)


def test_parameters_added_to_the_optimizer_later_are_followed() -> None:
    model = sparsefx.sparsify(net())
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    runtime = sparsefx.attach(model, optimizer, total_steps=100)
    assert runtime.unfollowed == ("2.weight",)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    before = sparsefx.masks(model)["2.weight"]
    train(model, optimizer, 5)
    assert leaks(model) == 0
    assert runtime.unfollowed == ()
    assert not torch.equal(before, sparsefx.masks(model)["2.weight"])


def test_a_masked_parameter_that_only_another_optimizer_holds_is_warned_of() -> None:
    model = sparsefx.sparsify(net())
    followed = torch.optim.SGD(model[0].parameters(), 0.1)
    sparsefx.attach(model, followed, total_steps=10)
    with pytest.warns(UserWarning, match="no MaskRuntime is attached"):
        train(model, followed, 2)


def test_one_threshold_over_all_layers_wants_one_optimizer() -> None:
    model = sparsefx.sparsify(net(), pattern="unstructured:global")
    optimizers = [torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.SGD(model[2].parameters(), 0.1)]
    with pytest.raises(OptimizerError, match="shares one threshold"):
        sparsefx.attach(model, optimizers, total_steps=10)


def test_the_graph_keeps_the_models_masks_when_the_model_is_moved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3))
    x = torch.randn(2, 16, 8, 8)
    sparsefx.sparsify(model, example_inputs=x)
    program = sparsefx.graph(model)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    sparsefx.attach(model, optimizer, total_steps=100)
    before = sparsefx.masks(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert any(not torch.equal(before[name], mask) for name, mask in sparsefx.masks(model).items())
    assert torch.equal(program(x), model(x))


def test_a_weight_that_is_a_view_with_gaps_keeps_its_mask_tensor() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    model[0].weight = nn.Parameter(torch.randn(16, 64)[:, :32])
    sparsefx.sparsify(model)
    ((_, _, record),) = sparse_parameters(model)
    mask = record.mask
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=10)
    train(model, optimizer, 3)
    assert record.mask is mask
    assert leaks(model) == 0


@pytest.mark.parametrize("place", ["add_record", "watch_loading", "set_model_record"])
@pytest.mark.parametrize("algorithm", ["magnitude", "static"])
def test_a_failure_late_in_sparsify_is_undone(place: str, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before, keys = copy.deepcopy(model.state_dict()), {name: set(m.__dict__) for name, m in model.named_modules()}
    owner: Any = sparsefx.api.checkpoint if place == "watch_loading" else sparsefx.api
    original, calls = getattr(owner, place), 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (2 if place == "add_record" else 1):
            raise MemoryError("late")
        return original(*arguments)

    monkeypatch.setattr(owner, place, failing)
    with pytest.raises(MemoryError, match="late"):
        sparsefx.sparsify(model, algorithm=algorithm)
    monkeypatch.undo()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == keys
    assert all(not m._load_state_dict_post_hooks for m in model.modules())
    sparsefx.sparsify(model, algorithm=algorithm)


def test_part_of_a_sparsified_model_can_be_attached_alone() -> None:
    model = nn.ModuleDict({"generator": net(), "discriminator": net(1)})
    sparsefx.sparsify(model)
    for part in model.values():
        optimizer = torch.optim.SGD(part.parameters(), 0.1)
        runtime = sparsefx.attach(part, optimizer, total_steps=5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(part, optimizer, 2)
        assert runtime.step == 2
    assert leaks(model) == 0


def test_sparsify_in_inference_mode_trains_afterwards() -> None:
    model = net()
    with torch.inference_mode():
        sparsefx.sparsify(model, pattern="block:1x8")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=5)
    train(model, optimizer, 2)
    model.load_state_dict(net(3).state_dict())
    assert leaks(model) == 0


def test_a_parametrization_on_a_sparse_weight_is_named() -> None:
    model = sparsefx.sparsify(net())
    parametrizations.weight_norm(model[0])
    for call in (sparsefx.masks, sparsefx.finalize, sparsefx.audit):
        with pytest.raises(StateError, match=r"0\.weight is sparse, but no longer a parameter"):
            call(model)


def test_weights_that_are_not_finite_can_be_loaded_and_are_found_later() -> None:
    model = sparsefx.sparsify(net())
    bad = net(2).state_dict()
    bad["0.weight"][0, 0] = float("nan")
    model.load_state_dict(bad)
    assert int((model[0].weight.detach()[~sparsefx.masks(model)["0.weight"]] != 0).sum()) == 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=100)
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        train(model, optimizer, 1)


@pytest.mark.parametrize(
    "damage", ["no parameters", "no fields", "steps", "steps type", "all ones", "dormant shape", "mask type"]
)
def test_a_damaged_runtime_state_is_refused_whole(damage: str) -> None:
    model = sparsefx.sparsify(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runtime = sparsefx.attach(model, optimizer, total_steps=5)
    train(model, optimizer, 2)
    state = runtime.state_dict()
    entry = state["parameters"]["2.weight"]
    if damage == "no parameters":
        state = {"version": 1}
    elif damage == "no fields":
        state["parameters"]["2.weight"] = {}
    elif damage == "steps":
        state["steps"] = None
    elif damage == "steps type":
        state["steps"] = ["2"]
    elif damage == "all ones":
        entry["mask"] = torch.ones_like(entry["mask"])
    elif damage == "dormant shape":
        entry["dormant"] = entry["dormant"][:4]
    else:
        entry["mask"] = entry["mask"].float()
    before = copy.deepcopy((model.state_dict(), runtime.state_dict()))
    with pytest.raises(StateError, match="cannot be loaded"):
        runtime.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    for name, saved in runtime.state_dict()["parameters"].items():
        assert torch.equal(saved["mask"], before[1]["parameters"][name]["mask"])
        assert torch.equal(saved["dormant"], before[1]["parameters"][name]["dormant"])


class Wrapper(torch.optim.Optimizer):
    """Wraps an optimizer as training libraries do, without calling Optimizer.__init__."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_a_wrapper_or_a_class_in_place_of_an_optimizer_is_refused() -> None:
    model = sparsefx.sparsify(net())
    inner = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(OptimizerError, match="give the optimizer inside"):
        sparsefx.attach(model, Wrapper(inner), total_steps=5)
    with pytest.raises(OptimizerError, match="the class SGD"):
        sparsefx.attach(model, torch.optim.SGD, total_steps=5)  # type: ignore[arg-type]
    sparsefx.attach(model, inner, total_steps=5)


def test_an_audit_of_a_wrapper_tells_new_layers_from_masked_ones() -> None:
    whole = nn.Sequential(sparsefx.sparsify(net()), nn.Linear(32, 16))
    rows = {layer.name: layer for layer in sparsefx.audit(whole).layers}
    assert rows["0.0"].sparse
    assert not rows["1"].sparse
    assert "no part of the model" in rows["1"].reason


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pattern": None}, "pattern=None"),
        ({"pattern": 24}, "pattern=24"),
        ({"algorithm": []}, "algorithm"),
        ({"eligibility": 3}, "3"),
    ],
)
def test_arguments_of_the_wrong_type(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        sparsefx.sparsify(net(), **options)


def test_tiny_weights_of_a_sparse_checkpoint_stay() -> None:
    model = sparsefx.sparsify(net(), pattern="2:4-transposable")
    with torch.no_grad():
        for name, mask in sparsefx.masks(model).items():
            values = torch.where(torch.arange(mask.numel()).view(mask.shape) % 3 == 0, 1.0, 1e-20)
            model.get_parameter(name).copy_(values * mask)
    other = sparsefx.sparsify(net(7), pattern="2:4-transposable")
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_state_saved_under_torch_compile_loads_without_it() -> None:
    model = sparsefx.sparsify(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runtime = sparsefx.attach(torch.compile(model, backend="eager"), optimizer, total_steps=5)
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    second = sparsefx.attach(twin, torch.optim.SGD(twin.parameters(), 0.1), total_steps=5)
    second.load_state_dict(runtime.state_dict())
    assert second.step == 2


def test_loading_by_assignment_leaves_the_callers_tensors_alone() -> None:
    model, state = sparsefx.sparsify(net()), net(4).state_dict()
    before = copy.deepcopy(state)
    model.load_state_dict(state, assign=True)
    assert leaks(model) == 0
    assert all(torch.equal(before[name], value) for name, value in state.items())


def test_attach_masks_what_was_changed_since_sparsify() -> None:
    model = sparsefx.sparsify(net())
    model[0].reset_parameters()
    sparsefx.attach(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=5)
    assert leaks(model) == 0


@pytest.mark.parametrize("way", ["deepcopy of a dense start", "deepcopy while attached", "detach"])
def test_training_without_a_runtime_is_warned_of_in_copies_and_after_detach(way: str) -> None:
    model = sparsefx.sparsify(net())
    if way != "deepcopy of a dense start":
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        runtime = sparsefx.attach(model, optimizer, total_steps=100)
        train(model, optimizer, 1)
        if way == "detach":
            runtime.detach()
    other = model if way == "detach" else copy.deepcopy(model)
    with pytest.warns(UserWarning, match="no MaskRuntime is attached"):
        backward(other)
    sparsefx.attach(other, torch.optim.SGD(other.parameters(), 0.1), total_steps=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(other)
