"""Which hidden units of recurrent layers go; outputs are compared in float64 each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from tests.channel_pruning import Around, filled, pruned

KINDS = {"lstm": (nn.LSTM, 4, 2), "gru": (nn.GRU, 3, 2), "rnn": (nn.RNN, 1, 0)}
UNITS = 8


@torch.no_grad()
def silence(layer: nn.Module, gates: int, entrance: int, units: list[int], suffix: str = "_l0") -> None:
    """Nothing enters the states of these units; their other gates stay as they are."""
    rows = [entrance * UNITS + unit for unit in units]
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(layer, name + suffix)[rows] = 0


@torch.no_grad()
def unread(layer: nn.Module, units: list[int], suffix: str = "_l0") -> None:
    """No unit but they themselves reads these units."""
    weight = getattr(layer, "weight_hh" + suffix)
    gates = weight.shape[0] // UNITS
    others = [gate * UNITS + unit for gate in range(gates) for unit in range(UNITS) if unit not in units]
    for unit in units:
        weight[others, unit] = 0


def tagger(kind: str, **options: Any) -> nn.Module:
    directions = 2 if options.get("bidirectional") else 1
    layer = KINDS[kind][0](5, UNITS, batch_first=True, **options)
    model = Around(lambda m, x: m.head(m.cells(x)[0]), cells=layer, head=nn.Linear(directions * UNITS, 3))
    return filled(model).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_nothing_enters_go(kind: str) -> None:
    model = tagger(kind)
    silence(model.cells, *KINDS[kind][1:], [1, 4, 6])  # type: ignore[arg-type]
    small, plan = pruned(model, torch.randn(2, 6, 5))
    gates = KINDS[kind][1]
    assert small.cells.hidden_size == UNITS - 3  # type: ignore[union-attr]
    assert small.cells.weight_ih_l0.shape == (gates * 5, 5)  # type: ignore[union-attr]
    assert small.cells.weight_hh_l0.shape == (gates * 5, 5)  # type: ignore[union-attr]
    assert small.head.weight.shape == (3, 5)  # type: ignore[union-attr]
    assert not plan.moved


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_nobody_reads_go_whatever_they_compute(kind: str) -> None:
    model = tagger(kind)
    unread(model.cells, [0, 5])  # type: ignore[arg-type]
    with torch.no_grad():
        model.head.weight[:, [0, 5]] = 0  # type: ignore[union-attr, operator, index]
    small, _ = pruned(model, torch.randn(2, 6, 5))
    assert small.cells.hidden_size == UNITS - 2  # type: ignore[union-attr]


@pytest.mark.parametrize("what", ["bias", "hidden", "input"])
def test_a_unit_that_something_enters_stays(what: str) -> None:
    model = tagger("lstm")
    silence(model.cells, 4, 2, [1, 4])  # type: ignore[arg-type]
    with torch.no_grad():
        name = {"bias": "bias_hh_l0", "hidden": "weight_hh_l0", "input": "weight_ih_l0"}[what]
        row = getattr(model.cells, name)[2 * UNITS + 4]
        (row if what == "bias" else row[2]).fill_(0.5)
    small, _ = pruned(model, torch.randn(2, 6, 5))
    assert small.cells.hidden_size == UNITS - 1  # type: ignore[union-attr]


def test_silent_units_may_feed_each_other() -> None:
    model = tagger("gru")
    silence(model.cells, 3, 2, [1, 4])  # type: ignore[arg-type]
    with torch.no_grad():
        model.cells.weight_hh_l0[2 * UNITS + 1, 4] = 0.7  # type: ignore[union-attr, operator, index]
        model.cells.weight_hh_l0[2 * UNITS + 4, 1] = 0.7  # type: ignore[union-attr, operator, index]
    small, _ = pruned(model, torch.randn(2, 6, 5))
    assert small.cells.hidden_size == UNITS - 2  # type: ignore[union-attr]


def test_as_many_units_go_in_each_layer_and_direction_as_in_the_fullest() -> None:
    model = tagger("lstm", num_layers=2, bidirectional=True)
    for suffix, units in {"_l0": [1, 4, 6], "_l0_reverse": [0, 2, 3, 7], "_l1": [2, 3], "_l1_reverse": [5, 6, 7]}.items():
        silence(model.cells, 4, 2, units, suffix)  # type: ignore[arg-type]
    small, _ = pruned(model, torch.randn(2, 6, 5))
    assert small.cells.hidden_size == UNITS - 2  # type: ignore[union-attr]
    assert small.cells.weight_ih_l1.shape == (4 * 6, 2 * 6)  # type: ignore[union-attr]
    assert small.head.weight.shape == (3, 12)  # type: ignore[union-attr]


def test_constants_of_an_input_go_into_the_bias() -> None:
    model = filled(
        Around(
            lambda m, x: m.head(m.cells(torch.sigmoid(m.stem(x)))[0]),
            stem=nn.Linear(5, 6),
            cells=nn.LSTM(6, UNITS, batch_first=True),
            head=nn.Linear(UNITS, 3),
        )
    ).eval()
    silence(model.cells, 4, 2, [3])  # type: ignore[arg-type]
    with torch.no_grad():
        model.stem.weight[[0, 2]] = 0  # type: ignore[union-attr, operator, index]
    small, plan = pruned(model, torch.randn(2, 4, 5))
    assert list(plan.report.moved) == ["cells.bias_ih_l0"]
    assert (small.cells.input_size, small.cells.hidden_size) == (4, UNITS - 1)  # type: ignore[union-attr]


def last_state(model: nn.Module, x: Tensor) -> Tensor:
    return model.head(model.cells(x)[1][0][-1])  # type: ignore[operator, no-any-return]


needs_batch_first_states = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14),
    reason="torch.export of torch 2.11 takes the states of an LSTM with batch_first for another shape (2.14 does not)",
)


def all_states(model: nn.Module, x: Tensor) -> Tensor:
    _, (hidden, _) = model.cells(x)  # type: ignore[operator]
    return model.head(hidden.transpose(0, 1).flatten(1))  # type: ignore[operator, no-any-return]


def sum_of_states(model: nn.Module, x: Tensor) -> Tensor:
    _, (hidden, memory) = model.cells(x)  # type: ignore[operator]
    return model.head((hidden + memory).sum(0))  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    ("code", "width", "left"),
    [
        (last_state, UNITS, 5),
        pytest.param(all_states, 2 * UNITS, 5, marks=needs_batch_first_states),
        (sum_of_states, UNITS, 6),
    ],
)
def test_what_code_does_with_last_states(code: Callable[[nn.Module, Tensor], Tensor], width: int, left: int) -> None:
    model = filled(Around(code, cells=nn.LSTM(5, UNITS, bidirectional=True, batch_first=True), head=nn.Linear(width, 3))).eval()
    silence(model.cells, 4, 2, [1, 4, 6])  # type: ignore[arg-type]
    silence(model.cells, 4, 2, [1, 2, 4], "_l0_reverse")  # type: ignore[arg-type]
    small, _ = pruned(model, torch.randn(2, 4, 5))
    assert small.cells.hidden_size == left  # type: ignore[union-attr]


def baked(model: nn.Module, x: Tensor) -> Tensor:
    state = torch.zeros(1, x.shape[0], UNITS, dtype=x.dtype)
    return model.head(model.cells(x, state)[0])  # type: ignore[operator, no-any-return]


def follows(model: nn.Module, x: Tensor) -> Tensor:
    state = x.new_zeros(1, x.shape[0], model.cells.hidden_size)  # type: ignore[arg-type, union-attr]
    return model.head(model.cells(x, state)[0])  # type: ignore[operator, no-any-return]


def started(model: nn.Module, x: Tensor) -> Tensor:
    return model.head(model.cells(x, model.start(x[:, 0])[None])[0])  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(("code", "left"), [(baked, UNITS), (follows, 6), (started, 7)])
def test_first_states(code: Callable[[nn.Module, Tensor], Tensor], left: int) -> None:
    parts = {"cells": nn.GRU(5, UNITS, batch_first=True), "head": nn.Linear(UNITS, 3)}
    if code is started:
        parts["start"] = nn.Linear(5, UNITS)
    model = filled(Around(code, **parts)).eval()
    silence(model.cells, 3, 2, [1, 4])  # type: ignore[arg-type]
    if code is started:
        with torch.no_grad():
            model.start.weight[1], model.start.bias[1] = 0, 0  # type: ignore[union-attr, operator, index]
    small, plan = pruned(model, torch.randn(2, 4, 5))
    assert small.cells.hidden_size == left  # type: ignore[union-attr]
    assert bool(plan.report.refused) == (code is baked)


def test_a_first_state_that_the_model_is_given_keeps_all_units() -> None:
    model = filled(Around(lambda m, x, h: m.head(m.cells(x, h)[0]), cells=nn.GRU(5, UNITS), head=nn.Linear(UNITS, 3))).eval()
    silence(model.cells, 3, 2, [1, 4])  # type: ignore[arg-type]
    plan = sparsefx.channel_plan(model, (torch.randn(4, 2, 5), torch.randn(1, 2, UNITS)), multiple=1)
    assert plan.empty
    assert any("first state" in row.pinned for row in plan.report.layers)


@pytest.mark.parametrize(("kind", "gates", "entrance"), [(nn.LSTMCell, 4, 2), (nn.GRUCell, 3, 2), (nn.RNNCell, 1, 0)])
def test_cells_in_a_loop(kind: type[nn.RNNCellBase], gates: int, entrance: int) -> None:
    def unrolled(model: nn.Module, x: Tensor) -> Tensor:
        state = None
        for step in range(x.shape[1]):
            state = model.cell(x[:, step], state)  # type: ignore[operator]
        return model.head(state[0] if isinstance(state, tuple) else state)  # type: ignore[operator, no-any-return]

    model = filled(Around(unrolled, cell=kind(5, UNITS), head=nn.Linear(UNITS, 3))).eval()
    silence(model.cell, gates, entrance, [1, 4], "")  # type: ignore[arg-type]
    small, _ = pruned(model, torch.randn(2, 4, 5))
    assert small.cell.hidden_size == UNITS - 2  # type: ignore[union-attr]
    assert small.cell.weight_hh.shape == (gates * 6, 6)  # type: ignore[union-attr]


def test_projected_states_stay_whole() -> None:
    model = filled(Around(lambda m, x: m.head(m.cells(x)[0]), cells=nn.LSTM(5, UNITS, proj_size=4), head=nn.Linear(4, 3))).eval()
    silence(model.cells, 4, 2, [1, 4])  # type: ignore[arg-type]
    plan = sparsefx.channel_plan(model, torch.randn(4, 2, 5), multiple=1)
    assert plan.empty


def test_the_optimizer_follows_and_training_goes_on() -> None:
    model = tagger("lstm").train()
    silence(model.cells, 4, 2, [1, 4, 6])  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    x = torch.randn(2, 6, 5)
    model(x).square().mean().backward()
    optimizer.step()
    before = model(x).square().mean()
    sparsefx.prune_channels_(model, x, optimizer, multiple=1)
    after = model(x).square().mean()
    torch.testing.assert_close(after, before)
    optimizer.zero_grad()
    after.backward()
    optimizer.step()
    assert model.cells.hidden_size == UNITS - 3  # type: ignore[union-attr]
    assert optimizer.state[model.cells.weight_hh_l0]["momentum_buffer"].shape == (4 * 5, 5)  # type: ignore[union-attr, index]


@pytest.mark.parametrize("kind", KINDS)
def test_units_change_places_for_the_sake_of_2_4(kind: str) -> None:
    torch.manual_seed(0)
    layers = KINDS[kind][0](16, 32, num_layers=2, batch_first=True)
    model = Around(lambda m, x: m.head(m.cells(x)[0]), cells=layers, head=nn.Linear(32, 16)).eval()
    x = torch.randn(2, 6, 16)
    order = sparsefx.channel_order(model, x, seconds=1)
    ordered = sparsefx.apply_channel_plan(model, order.plan)
    assert order.after > order.before
    torch.testing.assert_close(ordered(x), model(x))
    assert not torch.equal(ordered.cells.weight_hh_l0, layers.weight_hh_l0)  # type: ignore[union-attr]
