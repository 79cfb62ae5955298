"""The Recorder against histories of weights and masks that the test keeps itself."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.analysis import Recorder, decorrelation_lags, recorded_sections
from sparsefx.errors import OptionError, StateError
from tests.training import batches, loss_of, small_net

STEPS = 60


def trained(algorithm: str, *, every: int = 1, capacity: int = 512) -> tuple[nn.Module, Recorder, list[dict[str, Any]]]:
    """A small net after `STEPS` steps, its recorder, and all weights and masks after each of these steps."""
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.3, algorithm=algorithm)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    sparsefx.attach(model, optimizer, total_steps=STEPS, **({} if algorithm == "magnitude" else {"rewire_every": 5}))
    recorder = Recorder(model, optimizer, every=every, sample=40, capacity=capacity)
    history = []
    for batch in batches(STEPS):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        found = list(sparsefx.sparse_parameter.sparse_parameters(model))
        history.append(
            {
                "masks": sparsefx.masks(model),
                "weights": {
                    name: weight.detach() + (0 if record.dormant is None else record.dormant) for name, weight, record in found
                },
                "rest": {name: weight.detach().clone() for name, weight, _ in found},
            }
        )
    return model, recorder, history


@pytest.mark.parametrize("algorithm", ["magnitude", "set"])
def test_times_are_those_of_the_whole_history(algorithm: str) -> None:
    _, recorder, history = trained(algorithm)
    for layer in recorder.decorrelation():
        positions = recorder._traces[layer.name].positions
        series = torch.stack([step["weights"][layer.name].flatten()[positions] for step in history])
        lags = decorrelation_lags(series)
        assert torch.equal(layer.times.nan_to_num(-1), (lags / STEPS).nan_to_num(-1))
        assert torch.equal(layer.magnitudes, series[-1].abs())
        assert layer.resolution == 1 / STEPS
        kept = series[-1].abs() >= layer.threshold
        assert torch.equal(kept, history[-1]["masks"][layer.name].flatten()[positions])


@pytest.mark.parametrize(("every", "capacity"), [(1, 64), (1, 8), (3, 4)])
def test_mask_histories_are_those_of_all_masks(every: int, capacity: int) -> None:
    _, recorder, history = trained("set", every=every, capacity=capacity)
    start = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.3, algorithm="set")
    for name, points in recorder.mask_history().items():
        looks = [sparsefx.masks(start)[name], *(step["masks"][name] for step in history[every - 1 :: every])]
        flips = [float((now != before).float().mean()) for before, now in pairwise(looks)]
        span = points[0].step // every
        assert len(points) <= capacity
        for number, point in enumerate(points):
            last = (number + 1) * span
            assert point.step == last * every
            assert point.flip_rate == pytest.approx(sum(flips[last - span : last]) / span)
            assert point.density == pytest.approx(float(looks[last].float().mean()))
            ever = torch.stack(looks[: last + 1]).any(0)
            assert point.ever_used == pytest.approx(float(ever.float().mean()))
            rest = history[last * every - 1]["rest"][name]
            assert point.empty_channels == int((rest.flatten(1) == 0).all(1).sum())


def test_memory_does_not_grow_with_the_run() -> None:
    _, recorder, _ = trained("set", capacity=8)
    assert all(len(points) <= 8 for points in recorder.mask_history().values())
    assert all(len(trace.values) <= 8 for trace in recorder._traces.values())


def test_recording_changes_no_run() -> None:
    with_recorder, _, _ = trained("set")
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.3, algorithm="set")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    sparsefx.attach(model, optimizer, total_steps=STEPS, rewire_every=5)
    for batch in batches(STEPS):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, with_recorder.state_dict()[name]), name


def test_dense_models_have_times_and_no_masks() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with Recorder(model, optimizer) as recorder:
        for batch in batches(10):
            loss_of(model, batch).backward()
            optimizer.step()
    optimizer.step()
    assert recorder.step == 10
    assert recorder.mask_history() == {}
    layers = recorder.decorrelation()
    assert {layer.name for layer in layers} == {name for name, value in model.named_parameters() if value.dim() > 1}
    assert all(layer.threshold is None for layer in layers)
    small, large = recorder.decorrelation(density=0.5)[0].medians()
    assert 0 < small <= 1
    assert 0 < large <= 1


class Nested(torch.optim.SGD):
    """Steps by ``super().step()``, which torch wraps in hooks of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_step_inside_a_step_is_one() -> None:
    model = small_net()
    optimizer = Nested(model.parameters(), 0.05)
    recorder = Recorder(model, optimizer)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert recorder.step == 1


def test_a_recorder_before_the_runtime_is_refused() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    Recorder(model, optimizer)
    sparsefx.attach(model, optimizer, total_steps=5)
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(StateError, match=r"after sparsefx\.attach"):
        optimizer.step()


def test_models_without_weights_and_short_runs_are_refused() -> None:
    scale = nn.LayerNorm(4)
    with pytest.raises(StateError, match="nothing to follow"):
        Recorder(scale, torch.optim.SGD(scale.parameters(), 0.1))
    model = small_net()
    recorder = Recorder(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(StateError, match="three or more"):
        recorder.decorrelation()
    with pytest.raises(OptionError, match="every"):
        Recorder(model, torch.optim.SGD(model.parameters(), 0.1), every=0)


def test_a_model_of_another_shape_wants_a_new_recorder() -> None:
    model = small_net()
    recorder = Recorder(model, torch.optim.SGD(model.parameters(), 0.1))
    first = next(module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    first.weight = nn.Parameter(first.weight.detach()[:1].clone())
    with pytest.raises(StateError, match="make a new one"):
        recorder.look()


def test_the_report_takes_what_was_recorded(tmp_path: Path) -> None:
    model, recorder, _ = trained("set")
    page = tmp_path / "report.html"
    sparsefx.audit(model).to_html(page, more=recorded_sections(recorder))
    text = page.read_text()
    assert text.count("data:image/svg+xml;base64,") == 5
    assert "<h2>Decorrelation</h2>" in text
    assert "<h2>Masks over time</h2>" in text
    assert "http://" not in text.split("base64,")[0]
    again = recorded_sections(recorder)
    assert again == recorded_sections(recorder)


def test_a_plain_text_section_is_escaped(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    model: Tensor | nn.Module = small_net()
    assert isinstance(model, nn.Module)
    sparsefx.audit(model, pattern="unstructured").to_html(page, more=["<script>"])
    assert "&lt;script&gt;" in page.read_text()


def test_a_model_that_was_finalized_since_is_refused() -> None:
    model, recorder, _ = trained("set")
    sparsefx.finalize(model)
    with pytest.raises(StateError, match="before finalize"):
        recorder.decorrelation()
