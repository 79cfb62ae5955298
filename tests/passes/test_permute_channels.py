"""Channel permutation across a network: outputs stay, 2:4 keeps more, and what may not change places does not."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsefx
from sparsefx.errors import OptionError, StateError
from sparsefx.passes import permute_channels


def _in_runs(weight: Tensor) -> None:
    """Large and small input channels in runs of eight, so that 2:4 as they stand keeps little."""
    with torch.no_grad():
        scale = torch.where(torch.arange(weight.shape[1]) // 8 % 2 == 0, 4.0, 0.1)
        weight.mul_(scale.view(1, -1, *(1,) * (weight.dim() - 2)))


class Residual(nn.Module):
    """Convolutions with batch norms, a residual, groups and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.second, self.back = nn.Conv2d(32, 48, 1), nn.Conv2d(48, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.mixed = nn.Conv2d(64, 16, 1)

    def forward(self, image: Tensor) -> Tensor:
        stem = functional.gelu(self.norm(self.first(image)))
        stem = stem + self.back(torch.relu(self.second(stem)))
        both = torch.cat((self.grouped(stem), self.depthwise(stem)), 1)
        return self.mixed(torch.sigmoid(both)).mean((2, 3))


class Decoder(nn.Module):
    """Grouped-query attention, a gated block and root-mean-square norms, over an embedding with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Parameter(torch.randn(6, 32))
        self.norm = nn.RMSNorm(32)
        self.query, self.key, self.value = (nn.Linear(32, width) for width in (64, 32, 32))
        self.out = nn.Linear(64, 32)
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 50)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places
        y = self.norm(x)
        batch, length = words.shape
        query, key, value = (layer(y).view(batch, length, -1, 16).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, 64))
        y = functional.layer_norm(x, (32,))
        return self.head(x + self.down(functional.silu(self.gate(y)) * self.up(y)))


class Flat(nn.Module):
    """A flatten, in which each channel stands several times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16 * 9, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(image)))).flatten(1))


def _inputs(kind: type[nn.Module]) -> Any:
    return torch.randint(0, 50, (2, 6)) if kind is Decoder else torch.randn(2, 3, 7, 7)


@pytest.mark.parametrize("kind", [Residual, Decoder, Flat])
def test_outputs_stay_and_two_of_four_keeps_more(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, inputs = kind().eval(), _inputs(kind)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[1] % 16 == 0:
            _in_runs(module.weight)
    before = copy.deepcopy(model.state_dict())
    order = sparsefx.channel_order(model, inputs, moves=20_000)
    permuted = sparsefx.apply_channel_plan(model, order.plan)
    assert type(permuted) is kind
    assert order.refused == ()
    assert order.difference <= 1e-12
    assert order.after > order.before + 0.03
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        expected = model(inputs)
        torch.testing.assert_close(permuted(inputs), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_each_kind_of_place_is_ordered() -> None:
    torch.manual_seed(0)
    found: set[str] = set()
    for kind in (Residual, Decoder, Flat):
        model = kind().eval()
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[1] % 16 == 0:
                _in_runs(module.weight)
        found |= {layer.weight for layer in sparsefx.channel_order(model, _inputs(kind), moves=20_000).layers}
    assert {"second.weight", "back.weight", "grouped.weight", "mixed.weight"} <= found
    assert {"query.weight", "key.weight", "value.weight", "out.weight", "gate.weight", "up.weight", "down.weight"} <= found


def test_the_figures_are_those_of_the_permuted_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    _in_runs(model[2].weight)
    order = sparsefx.channel_order(model, torch.randn(2, 16), moves=20_000)
    permuted = sparsefx.apply_channel_plan(model, order.plan)
    assert [layer.weight for layer in order.layers] == ["2.weight"]
    for layer, weight in ((order.layers[0].before, model[2].weight), (order.layers[0].after, permuted[2].weight)):
        assert layer == pytest.approx(sparsefx.kept_magnitude(weight) / float(weight.detach().abs().sum()), rel=1e-6)


def test_the_same_seed_gives_the_same_order() -> None:
    torch.manual_seed(0)
    model, image = Residual().eval(), torch.randn(2, 3, 7, 7)
    orders = [sparsefx.channel_order(model, image, moves=5_000, seed=seed).plan.kept for seed in (1, 1, 2)]
    flat = [{(name, axis): indices.tolist() for name, axes in kept.items() for axis, indices in axes.items()} for kept in orders]
    assert flat[0] == flat[1]
    assert flat[0] != flat[2]


class Narrow(nn.Module):
    """A norm that computes in float32 whatever it is given, as those of language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(16, 64), nn.Linear(64, 16), nn.Parameter(torch.rand(64))

    def forward(self, data: Tensor) -> Tensor:
        hidden = self.first(data)
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.last(self.scale * wide.to(hidden.dtype))


def test_sums_that_the_model_itself_rounds_to_float32_may_change_their_order() -> None:
    torch.manual_seed(0)
    model = Narrow().eval()
    _in_runs(model.last.weight)
    order = sparsefx.channel_order(model, torch.randn(8, 16), moves=20_000)
    assert order.refused == ()
    assert [layer.weight for layer in order.layers] == ["last.weight"]
    assert order.difference <= 1e-5


class Fixed(nn.Module):
    """Hidden channels whose order a cumulative sum, a slice or an output tells."""

    def __init__(self, told: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.told = nn.Linear(16, 32), nn.Linear(32, 16), told

    def forward(self, data: Tensor) -> Any:
        hidden = torch.relu(self.first(data))
        return self.last(hidden), self.told(hidden)


@pytest.mark.parametrize(
    "told",
    [
        lambda hidden: hidden,
        lambda hidden: hidden.cumsum(1).mean(1),
        lambda hidden: hidden.argmax(1),
        lambda hidden: hidden * torch.arange(32),
        lambda hidden: hidden.unfold(1, 4, 2).amax(2),
    ],
)
def test_channels_at_fixed_places_keep_their_order(told: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Fixed(told).eval()
    _in_runs(model.last.weight)
    assert sparsefx.channel_order(model, torch.randn(4, 16), moves=5_000).plan.empty


def test_a_half_of_the_channels_that_something_else_reads_stays_among_itself() -> None:
    torch.manual_seed(0)
    model = Fixed(lambda hidden: hidden[:, :16].sum(1)).eval()
    _in_runs(model.last.weight)
    order = sparsefx.channel_order(model, torch.randn(4, 16), moves=20_000)
    permuted = sparsefx.apply_channel_plan(model, order.plan)
    data = torch.randn(4, 16)
    for made, expected in zip(permuted(data), model(data), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_a_head_of_zeros_does_not_hide_a_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Sigmoid(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    _in_runs(model[2].weight)
    nn.init.zeros_(model[4].weight)
    data = torch.randn(4, 16)
    assert not sparsefx.channel_order(model, data, moves=20_000).plan.empty
    real, calls = permute_channels._order, itertools.count()

    def wrong(classes: Any, sources: Any) -> Any:
        # Every second axis the other way round, so that no two that belong together agree.
        return real(classes, sources)[:: 1 - 2 * (next(calls) % 2)].copy()

    monkeypatch.setattr(permute_channels, "_order", wrong)
    order = sparsefx.channel_order(model, data, moves=20_000)
    assert order.plan.empty
    assert len(order.refused) == 1


class Auxiliary(nn.Module):
    """A head that runs in train mode only, on channels that others read in eval mode."""

    def __init__(self, broken: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 16, 3)
        self.dropout = nn.Dropout(dropout)
        self.head, self.auxiliary = nn.Linear(16, 10), nn.Linear(32, 10)
        self.register_buffer("centre", torch.randn(32))
        self.broken = broken

    def forward(self, image: Tensor) -> Any:
        features = self.norm(self.first(image)).relu()
        outputs = self.head(self.dropout(self.second(features).relu()).mean((2, 3)))
        if not self.training:
            return outputs
        if self.broken and float(outputs.sum()) > 1e9:
            return outputs
        return outputs, self.auxiliary(features.mean((2, 3)) - self.centre)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_heads_of_train_mode_are_given_the_order_too(dropout: float) -> None:
    torch.manual_seed(0)
    model, image = Auxiliary(dropout=dropout), torch.randn(2, 3, 7, 7)
    _in_runs(model.second.weight)
    order = sparsefx.channel_order(model, image, moves=5_000)
    assert {layer.weight for layer in order.layers} == {"second.weight", "auxiliary.weight", "head.weight"}
    assert order.refused == ()
    permuted = sparsefx.apply_channel_plan(model, order.plan)
    assert not torch.equal(permuted.centre, model.centre)
    for net in (model, permuted):
        net.train().dropout.eval()
    for made, expected in zip(permuted(image), model(image), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_nothing_changes_places_where_a_head_of_train_mode_cannot_be_followed() -> None:
    torch.manual_seed(0)
    model, image = Auxiliary(broken=True), torch.randn(2, 3, 7, 7)
    _in_runs(model.second.weight)
    order = sparsefx.channel_order(model, image, moves=5_000)
    assert (order.plan.empty, order.layers) == (True, ())
    assert [text.partition(",")[0] for text in order.refused] == ["eval mode does not read auxiliary.weight"]


def test_sparse_models_and_wrong_options_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with pytest.raises(OptionError, match="seconds"):
        sparsefx.channel_order(model, torch.randn(2, 16), seconds=0)
    with pytest.raises(OptionError, match=r"torch\.nn\.Module"):
        sparsefx.channel_order("model", torch.randn(2, 16))  # type: ignore[arg-type]
    sparsefx.sparsify(model)
    with pytest.raises(StateError, match=r"before sparsefx\.sparsify"):
        sparsefx.permute_channels(model, torch.randn(2, 16))


def test_columns_of_grouped_queries_are_counted_as_often_as_they_are_read() -> None:
    class Grouped(nn.Module):
        """Two heads of values of 16 channels, each for two heads of queries."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.back = nn.Linear(32, 64), nn.Linear(64, 32)
            self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = (part(x).unflatten(-1, (-1, 16)).transpose(1, 2) for part in (self.query, self.key, self.value))
            mixed = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
            return self.back(mixed.transpose(1, 2).flatten(2))

    model = Grouped()
    _in_runs(model.back.weight)
    order = sparsefx.channel_order(model, torch.randn(2, 5, 32), moves=20_000)
    assert {layer.weight: layer.channels for layer in order.layers}["back.weight"] == 64
