"""MaskRuntime against the algorithm as the paper writes it, and in the situations that training loops bring."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import sparsefx
from sparsefx.errors import NonFiniteError, OptimizerError, StateError
from sparsefx.sparse_parameter import sparse_parameters
from tests.training import batches, loss_of, small_net, train

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001),
}


class AsWritten:
    """Algorithm 1, step by step: dense w beside the model, p = w * mask in forward and backward, dense updates of w."""

    def __init__(self, model: nn.Module, pattern: str, density: float | None, optimizer: str, **settings: Any) -> None:
        self.model, self.pattern, self.density = model, sparsefx.patterns.parse(pattern), density
        self.masked = [name for name, p in model.named_parameters() if name in ("0.weight", "5.weight")]
        self.parameters = dict(model.named_parameters())
        self.optimizer = OPTIMIZERS[optimizer](model.parameters())
        self.settings = settings
        self.step_number = 0
        self.masks = {name: self.choose(name) for name in self.masked}

    def choose(self, name: str) -> Tensor:
        return self.pattern.mask(self.parameters[name].detach(), self.density)

    def participating(self) -> dict[str, Tensor]:
        return {name: (self.parameters[name] * self.masks[name]).detach() for name in self.masked}

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        p = {name: value.requires_grad_() for name, value in self.participating().items()}
        self.optimizer.zero_grad()
        output = functional_call(self.model, p, (batch[0],))
        nn.functional.cross_entropy(output, batch[1]).backward()
        for name, value in p.items():
            assert value.grad is not None
            self.parameters[name].grad = value.grad * torch.where(self.masks[name], 1.0, self.settings["scale"])
        self.optimizer.step()
        self.step_number += 1
        t, exploit = self.step_number, self.settings["exploit"]
        fixed = exploit == "fix" and t >= self.settings["fix_after"] * self.settings["total_steps"]
        with torch.no_grad():
            for name in self.masked:
                factor = 1.0
                if fixed or (exploit == "reset" and t % self.settings["reset_every"] == 0):
                    factor = 0.0
                elif exploit == "regularize":
                    factor = 1.0 - self.settings["decay"]
                w = self.parameters[name]
                w.copy_(torch.where(self.masks[name], w, w * factor))
                if t % self.settings["rewire_every"] == 0 and not fixed:
                    self.masks[name] = self.choose(name)


CASES = [
    ("2:4", None, "momentum", {"exploit": "reset", "reset_every": 3}),
    ("2:4", None, "adamw", {"exploit": "fix", "fix_after": 0.5}),
    ("2:4", None, "adamw-fused", {"exploit": "regularize", "decay": 0.05}),
    ("2:4", None, "adam", {"exploit": "none", "scale": 0.25, "rewire_every": 2}),
    ("2:4", None, "sgd", {"exploit": "none", "scale": 0.0}),
    ("2:4-transposable", None, "momentum", {"exploit": "reset", "reset_every": 4}),
    ("4:8", None, "rmsprop", {"exploit": "reset", "reset_every": 4, "rewire_every": 3}),
    ("unstructured", 0.3, "momentum", {"exploit": "reset", "reset_every": 4}),
    ("unstructured", 0.05, "adamw", {"exploit": "regularize", "decay": 0.1}),
    ("block:1x8", 0.5, "momentum", {"exploit": "none"}),
    ("channel", 0.5, "momentum", {"exploit": "none"}),
]


@pytest.mark.parametrize(("pattern", "density", "optimizer", "options"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_it_is_algorithm_1_bit_for_bit(pattern: str, density: float | None, optimizer: str, options: dict[str, Any]) -> None:
    steps = 12
    model = sparsefx.sparsify(small_net(), pattern=pattern, density=density)
    rewritten = OPTIMIZERS[optimizer](model.parameters())
    runtime = sparsefx.attach(model, rewritten, total_steps=steps, **options)
    values = runtime.report()
    reference = AsWritten(small_net(), pattern, density, optimizer, **values)
    moved = 0
    for batch in batches(steps):
        before = sparsefx.masks(model)
        train(model, rewritten, [batch])
        reference.step(batch)
        after = sparsefx.masks(model)
        for name, p in reference.participating().items():
            assert torch.equal(after[name], reference.masks[name])
            assert torch.equal(model.get_parameter(name), p)
            moved += int((before[name] != after[name]).sum())
    assert moved > 0
    records = {name: record for name, _, record in sparse_parameters(model)}
    for name in reference.masked:
        dormant = records[name].dormant
        assert dormant is not None
        assert torch.equal(dormant, reference.parameters[name].detach() * ~reference.masks[name])


def test_parameters_are_sparse_whenever_user_code_can_look() -> None:
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    sparsefx.attach(model, optimizer, total_steps=20)
    for batch in batches(5):
        train(model, optimizer, [batch])
        for name, mask in sparsefx.masks(model).items():
            weight = model.get_parameter(name)
            assert not weight[~mask].any()
            assert int(mask.sum()) * 2 == mask.numel()
            assert weight.grad is not None
            assert bool(weight.grad[~mask].any()), "the gradient is dense"


@pytest.mark.parametrize("how", ["argument", "keyword"])
def test_a_closure_sees_sparse_weights_and_gives_the_same_run(how: str) -> None:
    data = batches(6)
    plain = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    sparsefx.attach(plain, optimizer, total_steps=6, scale=0.5)
    train(plain, optimizer, data)

    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    sparsefx.attach(model, optimizer, total_steps=6, scale=0.5)
    for batch in data:

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            for name, mask in sparsefx.masks(model).items():
                assert not model.get_parameter(name)[~mask].any()
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure) if how == "argument" else optimizer.step(closure=closure)
        assert loss is not None
        assert loss.requires_grad
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_lbfgs_evaluates_the_sparse_model_every_time() -> None:
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)
    sparsefx.attach(model, optimizer, total_steps=3)
    evaluations: list[float] = []
    batch = batches(1)[0]

    def closure() -> Tensor:
        for name, mask in sparsefx.masks(model).items():
            assert not model.get_parameter(name)[~mask].any()
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        evaluations.append(float(loss.detach()))
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert len(evaluations) > 6
    assert evaluations[-1] < evaluations[0]


def test_several_optimizers_and_parameter_groups() -> None:
    def build() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model = sparsefx.sparsify(small_net())
        conv, head = model[0], model[5]
        groups = [{"params": [conv.weight], "lr": 0.1}, {"params": [conv.bias, *model[1].parameters()], "weight_decay": 0.0}]
        return model, [torch.optim.SGD(groups, 0.05, momentum=0.9), torch.optim.AdamW(head.parameters(), 0.01)]

    model, optimizers = build()
    runtime = sparsefx.attach(model, optimizers, total_steps=8)
    apart, others = build()
    sparsefx.attach(apart, others[0], total_steps=8)
    sparsefx.attach(apart, others[1], total_steps=8)
    for batch in batches(8):
        for net, opts in ((model, optimizers), (apart, others)):
            for optimizer in opts:
                optimizer.zero_grad()
            loss_of(net, batch).backward()
            for optimizer in opts:
                optimizer.step()
    assert runtime.step == 8
    assert runtime.report()["optimizers"] == ["SGD", "AdamW"]
    for a, b in zip(model.state_dict().values(), apart.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_changes_nothing(fused: bool) -> None:
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=fused)
    runtime = sparsefx.attach(model, optimizer, total_steps=10, reset_every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number, batch in enumerate(batches(4)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        overflow = number == 2
        if overflow:
            model[0].weight.grad[0, 0, 0, 0] = float("inf")
        state = copy.deepcopy(runtime.state_dict())
        weights = copy.deepcopy([model[0].weight, model[5].weight])
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            now = runtime.state_dict()
            assert now["steps"] == state["steps"] == [2]
            for name, saved in state["parameters"].items():
                assert torch.equal(saved["mask"], now["parameters"][name]["mask"])
                assert torch.equal(saved["dormant"], now["parameters"][name]["dormant"])
            assert torch.equal(weights[0], model[0].weight)
            assert torch.equal(weights[1], model[5].weight)
    assert runtime.step == 3


def test_training_without_a_runtime_warns_once() -> None:
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="no MaskRuntime is attached") as caught:
        train(model, optimizer, batches(3))
    assert len([w for w in caught if "no MaskRuntime" in str(w.message)]) == 1


def test_training_with_a_runtime_does_not_warn_and_inference_never_does() -> None:
    model = sparsefx.sparsify(small_net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(batches(1)[0][0])
        optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
        sparsefx.attach(model, optimizer, total_steps=3)
        train(model, optimizer, batches(3))


def test_divergence_is_an_error_that_names_the_layer() -> None:
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=5)
    loss_of(model, batches(1)[0]).backward()
    model[5].weight.grad[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"5\.weight after optimizer step 1"):
        optimizer.step()


def test_a_step_that_raises_is_mended_by_the_next() -> None:
    class Fails(torch.optim.SGD):
        broken = True

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                raise RuntimeError("out of memory")
            return super().step(closure)

    data = batches(2)
    model, same = sparsefx.sparsify(small_net()), sparsefx.sparsify(small_net())
    optimizer = Fails(model.parameters(), 0.1)
    runtime = sparsefx.attach(model, optimizer, total_steps=5)
    loss_of(model, data[0]).backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.broken = False
    optimizer.step()
    other = torch.optim.SGD(same.parameters(), 0.1)
    sparsefx.attach(same, other, total_steps=5)
    train(same, other, data[:1])
    assert runtime.step == 1
    assert torch.equal(model[0].weight, same[0].weight)
    assert torch.equal(model[5].weight, same[5].weight)


def test_detach_leaves_the_optimizer_alone() -> None:
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runtime = sparsefx.attach(model, optimizer, total_steps=5)
    train(model, optimizer, batches(2))
    before = sparsefx.masks(model)
    runtime.detach()
    with pytest.warns(UserWarning, match="no MaskRuntime is attached"):
        train(model, optimizer, batches(1))
    assert runtime.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before.values(), sparsefx.masks(model).values(), strict=True))
    sparsefx.attach(model, optimizer, total_steps=5)


def test_following_twice_is_refused_unless_replaced() -> None:
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = sparsefx.attach(model, optimizer, total_steps=5)
    with pytest.raises(StateError, match="already followed"):
        sparsefx.attach(model, optimizer, total_steps=5)
    second = sparsefx.attach(model, optimizer, total_steps=5, replace=True)
    train(model, optimizer, batches(2))
    assert (first.step, second.step) == (0, 2)


def test_a_forgotten_runtime_does_not_block_a_new_one() -> None:
    model = sparsefx.sparsify(small_net())
    sparsefx.attach(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=5)
    runtime = sparsefx.attach(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=5)
    assert runtime.step == 0


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = sparsefx.sparsify(small_net())
    with pytest.raises(OptimizerError, match="holds none of the model's 2 masked parameters"):
        sparsefx.attach(model, torch.optim.SGD(small_net().parameters(), 0.1), total_steps=5)


def test_an_optimizer_fused_into_backward_is_refused() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = sparsefx.sparsify(small_net())
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(OptimizerError, match="fused into backward"):
        sparsefx.attach(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=5)


def test_an_object_without_step_hooks_is_refused() -> None:
    model = sparsefx.sparsify(small_net())
    with pytest.raises(OptimizerError, match="cannot be hooked"):
        sparsefx.attach(model, object(), total_steps=5)  # type: ignore[arg-type]


def test_finalizing_under_a_runtime_is_told_at_the_next_step() -> None:
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runtime = sparsefx.attach(model, optimizer, total_steps=5)
    train(model, optimizer, batches(1))
    sparsefx.finalize(model)
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(StateError, match="finalized"):
        optimizer.step()
    runtime.detach()
    assert runtime.report()["step"] == 1
    optimizer.step()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_train_on_their_own(way: str) -> None:
    data = batches(6)
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=10)
    train(model, optimizer, data[:3])
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    untouched = copy.deepcopy(model.state_dict())
    other = torch.optim.SGD(twin.parameters(), 0.1)
    sparsefx.attach(twin, other, total_steps=10)
    train(twin, other, data[3:])
    for name, value in untouched.items():
        assert torch.equal(value, model.state_dict()[name])
    train(model, optimizer, data[3:])
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_a_density_schedule_is_followed_exactly() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = sparsefx.schedules.cubic(1.0, 0.1, first_step=1, last_step=6)
    sparsefx.attach(model, optimizer, total_steps=8, density_schedule=schedule)
    for step, batch in enumerate(batches(8), start=1):
        train(model, optimizer, [batch])
        for mask in sparsefx.masks(model).values():
            assert int(mask.sum()) == round(schedule(step) * mask.numel())


def test_static_masks_stay() -> None:
    model = sparsefx.sparsify(small_net(), algorithm="static")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    runtime = sparsefx.attach(model, optimizer, total_steps=5)
    before = sparsefx.masks(model)
    weights = copy.deepcopy(model[0].weight)
    train(model, optimizer, batches(5))
    after = sparsefx.masks(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not model[0].weight[~after["0.weight"]].any()
    assert not torch.equal(weights, model[0].weight)
    assert runtime.state_dict()["parameters"]["0.weight"]["dormant"] is None


def test_moving_a_model_after_sparsify_moves_its_masks() -> None:
    model = sparsefx.sparsify(small_net())
    model.to(memory_format=torch.channels_last).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=5)
    for batch, labels in batches(3):
        train(model, optimizer, [(batch.double(), labels)])
    for name, _, record in sparse_parameters(model):
        assert record.dormant is not None
        assert record.dormant.dtype == torch.float64
        assert not model.get_parameter(name)[~record.mask].any()
        assert record.mask.stride() == model.get_parameter(name).stride()


def test_a_compiled_model_trains_the_same_way() -> None:
    data = batches(4)
    plain = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    sparsefx.attach(plain, optimizer, total_steps=5)
    train(plain, optimizer, data)

    model = sparsefx.sparsify(small_net())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(compiled, optimizer, total_steps=5)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(compiled, optimizer, data)
    for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
