"""What channel pruning removes, keeps and folds, rule by rule; outputs are compared in float64 each time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx
from tests.channel_pruning import IMAGE, Around, empty, filled, pruned, widths


@pytest.mark.parametrize(
    "function", [F.relu, torch.sigmoid, F.softplus, F.hardsigmoid, F.gelu, torch.cos, lambda x: x + 3, lambda x: 1 - x * 2]
)
def test_constants_go_through_functions_into_the_next_bias(function: Callable[[Tensor], Tensor]) -> None:
    model = filled(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            Around(lambda _, x: function(x)),
            nn.Conv2d(6, 4, 1),
            nn.Conv2d(4, 2, 3),
        )
    )
    empty(model[0].weight, 1, 4)  # type: ignore[arg-type]
    small, plan = pruned(model, torch.randn(IMAGE))
    assert widths(small)["0.weight"] == (4, 3, 3, 3)
    assert widths(small)["3.weight"] == (4, 4, 1, 1)
    assert list(plan.report.moved) == ["3.bias"]
    assert small[0].out_channels == 4  # type: ignore[index]
    assert small[1].num_features == 4  # type: ignore[index]


def test_behind_padding_constants_ride_on_one_channel() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.Conv2d(4, 2, 1)))
    empty(model[0].weight, 0, 2, 5, 7)  # type: ignore[arg-type]
    small, plan = pruned(model, torch.randn(IMAGE))
    assert widths(small)["0.weight"] == (5, 3, 3, 3), "four live filters and one carrier"
    assert list(plan.report.moved) == ["2.weight"]
    assert not plan.new_biases


def test_behind_padding_zeros_just_go() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 1)))
    empty(model[0].weight, 0, 2, 5, 7)  # type: ignore[arg-type]
    small, plan = pruned(model, torch.randn(IMAGE))
    assert widths(small)["0.weight"] == (4, 3, 3, 3)
    assert not plan.moved


def test_a_missing_bias_is_added_or_the_running_mean_takes_it() -> None:
    plain = filled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    empty(plain[0].weight, 1)  # type: ignore[arg-type]
    small, plan = pruned(plain, torch.randn(IMAGE))
    assert dict(plan.new_biases) == {"1.bias": 4}
    assert small[1].bias is not None  # type: ignore[index]
    normed = filled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    empty(normed[0].weight, 1)  # type: ignore[arg-type]
    small, plan = pruned(normed, torch.randn(IMAGE))
    assert not plan.new_biases
    assert list(plan.report.moved) == ["2.running_mean"]


def test_a_channel_that_nobody_reads_goes_whatever_it_is() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 2, 1)))
    empty(model[2].weight, 0, 3, axis=1)  # type: ignore[arg-type]
    empty(model[3].weight, 2, axis=1)  # type: ignore[arg-type]
    small, _ = pruned(model, torch.randn(IMAGE))
    assert widths(small)["0.weight"][0] == 4
    assert widths(small)["2.weight"][:2] == (3, 4)


def test_a_chain_of_dead_layers_goes_from_its_end() -> None:
    model = filled(nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(6))))
    empty(model[5].weight, 1, axis=1)  # type: ignore[arg-type]
    for number in range(1, 5):
        weight = model[number].weight
        with torch.no_grad():
            weight.copy_(torch.eye(4)[:, :, None, None])  # type: ignore[operator]
    small, _ = pruned(model, torch.randn(2, 4, 5, 5))
    assert [small[number].weight.shape[0] for number in range(6)] == [3, 3, 3, 3, 3, 4]  # type: ignore[index]


def test_residual_channels_go_together_or_not_at_all() -> None:
    model = Around(
        lambda m, x: m.head(F.relu(m.stem(x) + m.branch(F.relu(m.stem(x))))),
        stem=nn.Conv2d(3, 6, 1),
        branch=nn.Conv2d(6, 6, 1),
        head=nn.Conv2d(6, 2, 1),
    )
    filled(model)
    empty(model.stem.weight, 0, 1, 2)  # type: ignore[arg-type, union-attr]
    empty(model.branch.weight, 1, 2, 3)  # type: ignore[arg-type, union-attr]
    small, _ = pruned(model, torch.randn(IMAGE))
    assert widths(small)["stem.weight"] == (4, 3, 1, 1), "channels 1 and 2 are constant in both, and only they"


def test_zero_annihilates_in_products() -> None:
    model = Around(
        lambda m, x: m.head(m.left(x) * torch.sigmoid(m.right(x))),
        left=nn.Conv2d(3, 6, 1, bias=False),
        right=nn.Conv2d(3, 6, 1),
        head=nn.Conv2d(6, 2, 3, padding=1),
    )
    filled(model)
    empty(model.left.weight, 0, 5)  # type: ignore[arg-type, union-attr]
    small, _ = pruned(model, torch.randn(IMAGE))
    assert widths(small)["right.weight"][0] == 4


def test_concatenation_and_split_follow_indices() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        joined = torch.cat((m.a(x), x, m.b(x)), 1)  # type: ignore[operator]
        first, second = joined[:, :5], joined[:, 5:]
        return m.head(torch.cat((second, first), 1))  # type: ignore[operator, no-any-return]

    model = Around(run, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 5, 1), head=nn.Conv2d(12, 2, 1))
    filled(model)
    empty(model.b.weight, 0, 4)  # type: ignore[arg-type, union-attr]
    small, _ = pruned(model, torch.randn(IMAGE))
    assert widths(small)["b.weight"][0] == 3
    assert widths(small)["head.weight"][1] == 10


def test_flatten_removes_every_place_of_a_channel() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4), nn.Linear(4, 2)))
    empty(model[0].weight, 2, 3)  # type: ignore[arg-type]
    small, plan = pruned(model, torch.randn(IMAGE))
    assert small[3].in_features == 4 * 36  # type: ignore[index]
    assert plan.kept["3.weight"][1][36 * 2].item() == 36 * 4


def test_depthwise_and_grouped_convolutions() -> None:
    model = filled(
        nn.Sequential(
            nn.Conv2d(3, 8, 1, bias=False),
            nn.Conv2d(8, 8, 3, groups=8, bias=False),
            nn.Conv2d(8, 12, 3, groups=4),
            nn.Conv2d(12, 4, 1),
        )
    )
    empty(model[0].weight, 2, 3)  # type: ignore[arg-type]
    empty(model[2].weight, 3, 4, 5)  # type: ignore[arg-type]
    empty(model[2].weight, 0, 7, 11)  # type: ignore[arg-type]
    small, _ = pruned(model, torch.randn(IMAGE))
    assert small[1].groups == small[1].in_channels == small[1].out_channels == 6  # type: ignore[index]
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (3, 6, 6)  # type: ignore[index]


def test_group_norm_loses_whole_groups_only() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    empty(model[0].weight, 0, 2, 3)  # type: ignore[arg-type]
    small, _ = pruned(model, torch.randn(IMAGE))
    assert (small[1].num_groups, small[1].num_channels) == (3, 6)  # type: ignore[index]


def test_normalizations_without_parameters_know_their_new_width() -> None:
    model = filled(
        nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.InstanceNorm2d(8),
            nn.GroupNorm(4, 8, affine=False),
            nn.BatchNorm2d(8, affine=False),
            nn.Conv2d(8, 2, 1),
        )
    )
    empty(model[0].weight, 0, 2, 3)  # type: ignore[arg-type]
    small, _ = pruned(model, torch.randn(IMAGE))
    assert small[1].num_features == small[2].num_channels == small[3].num_features == 6  # type: ignore[index]
    assert small[2].num_groups == 3  # type: ignore[index]


def test_layer_norm_pins_what_it_takes_statistics_over_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    empty(model[0].weight, 1, 2)  # type: ignore[arg-type]
    small, plan = pruned(model.eval(), torch.randn(2, 8))
    assert widths(small) == widths(model)
    assert "layer_norm takes statistics over it" in plan.report.layers[0].pinned


def test_an_op_without_a_rule_pins_what_it_touches_and_says_so() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 6, 1), Around(lambda _, x: torch.special.i0e(x)), nn.Conv2d(6, 2, 1)))
    empty(model[0].weight, 1, 2)  # type: ignore[arg-type]
    small, plan = pruned(model, torch.randn(IMAGE))
    assert widths(small) == widths(model)
    assert "special_i0e has no rule" in plan.report.layers[0].pinned


def test_code_that_holds_a_number_keeps_its_channels_and_no_others() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        features = m.first(x).view(2, 6, 64)  # type: ignore[operator]
        return m.head(m.second(features.flatten(1)))  # type: ignore[operator, no-any-return]

    model = Around(run, first=nn.Conv2d(3, 6, 1), second=nn.Linear(6 * 64, 5), head=nn.Linear(5, 2))
    empty(model.first.weight, 1)  # type: ignore[arg-type, union-attr]
    empty(model.second.weight, 0, 3)  # type: ignore[arg-type, union-attr]
    small, plan = pruned(model.eval(), torch.randn(IMAGE))
    assert widths(small)["first.weight"][0] == 6
    assert widths(small)["second.weight"][0] == 3
    assert len(plan.report.refused) == 1
    assert "shape '[2, 6, 64]' is invalid" in plan.report.refused[0]


def test_a_layer_that_is_called_twice_is_cut_for_both_calls() -> None:
    model = Around(
        lambda m, x: m.head(F.relu(m.twice(F.relu(m.twice(m.stem(x)))))),
        stem=nn.Conv2d(3, 6, 1, bias=False),
        twice=nn.Conv2d(6, 6, 1, bias=False),
        head=nn.Conv2d(6, 2, 1),
    )
    empty(model.stem.weight, 0, 1, 2)  # type: ignore[arg-type, union-attr]
    empty(model.twice.weight, 0, 1, 4)  # type: ignore[arg-type, union-attr]
    small, _ = pruned(model.eval(), torch.randn(IMAGE))
    assert widths(small)["twice.weight"] == (4, 4, 1, 1)


def test_a_bare_parameter_and_tied_weights_are_followed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 8)
            self.inner = nn.Parameter(torch.randn(6, 8))
            self.back = nn.Parameter(torch.randn(6, 8))
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = F.relu(F.linear(self.table(tokens), self.inner))
            logits: Tensor = self.head(hidden @ self.back)
            return logits

    model = Tied().eval()
    empty(model.table.weight, 2, 5, axis=1)
    empty(model.inner, 0)
    tokens = torch.randint(0, 20, (2, 5))
    small = sparsefx.prune_channels(model, tokens, multiple=1)
    torch.testing.assert_close(small(tokens), model(tokens))
    assert small.inner.shape == (5, 6)
    assert small.back.shape == (5, 6)
    assert small.head.weight is small.table.weight
    assert small.table.embedding_dim == 6


def _heads(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))  # type: ignore[operator]
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("by", ["values", "output"])
def test_whole_heads_go(by: str) -> None:
    model = Around(_heads, q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 12, bias=False), out=nn.Linear(12, 6))
    if by == "values":
        empty(model.v.weight, 4, 5, 6, 7)  # type: ignore[arg-type, union-attr]
    else:
        empty(model.out.weight, 4, 5, 6, 7, axis=1)  # type: ignore[arg-type, union-attr]
    empty(model.q.weight, 0, 1)  # type: ignore[arg-type, union-attr]
    small, _ = pruned(model.eval(), torch.randn(2, 5, 6))
    assert {name: shape[0] for name, shape in widths(small).items() if name.endswith("weight")} == {
        "q.weight": 8,
        "k.weight": 8,
        "v.weight": 8,
        "out.weight": 6,
    }


def test_auxiliary_heads_of_training_are_cut_too() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.side, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            features = self.stem(x)
            if self.training:
                return self.head(features) + self.side(features)  # type: ignore[no-any-return]
            return self.head(features)  # type: ignore[no-any-return]

    model = Auxiliary().eval()
    empty(model.stem.weight, 1, 2)
    x = torch.randn(IMAGE)
    small, _ = pruned(model, x)
    assert small.side.in_channels == 4  # type: ignore[union-attr]
    torch.testing.assert_close(small.train()(x), model.train()(x))


class _HeadThatLooks(nn.Module):
    """In train mode an auxiliary head runs where values say so, which cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.auxiliary = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        read = self.first(x).relu()
        made: Tensor = self.last(self.second(read).relu())
        if self.training and bool((read >= 0).all()):
            made = made + self.auxiliary(read)
        return made


def test_heads_of_training_that_cannot_be_captured_stay_whole_and_are_told() -> None:
    model = _HeadThatLooks().eval()
    empty(model.first.weight, 0, 1, 2)
    empty(model.second.weight, 0, 1, 2)
    small, plan = pruned(model, torch.randn(IMAGE))
    assert widths(small)["second.weight"] == (5, 8, 1, 1)
    assert len(plan.report.refused) == 2
    assert "auxiliary: eval mode does not run it, and the model cannot be captured in train mode" in plan.report.refused[0]
    assert "outputs of first.weight" in plan.report.refused[1]
    x = torch.randn(IMAGE)
    torch.testing.assert_close(small.train()(x), model.train()(x))


def test_nothing_is_left_without_channels() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)))
    empty(model[0].weight, *range(6))  # type: ignore[arg-type]
    empty(model[2].weight, *range(4))  # type: ignore[arg-type]
    small, _ = pruned(model, torch.randn(IMAGE))
    assert [small[number].weight.shape[0] for number in (0, 2, 3)] == [1, 1, 2]  # type: ignore[index]


def test_a_model_without_empty_channels_stays_as_it_is() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    small, plan = pruned(model, torch.randn(IMAGE))
    assert plan.empty
    assert widths(small) == widths(model)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_read_their_input_like_linear_ones(kind: type[nn.RNNBase]) -> None:
    model = Around(
        lambda m, x: m.head(m.cells(torch.sigmoid(m.stem(x)))[0]),
        stem=nn.Linear(5, 8),
        cells=kind(8, 6, num_layers=2, bidirectional=True, batch_first=True),
        head=nn.Linear(12, 3),
    )
    empty(model.stem.weight, 1, 3, 6)  # type: ignore[arg-type, union-attr]
    small, _ = pruned(model.eval(), torch.randn(2, 4, 5))
    assert small.cells.input_size == 5  # type: ignore[union-attr]
    assert small.cells.weight_ih_l0_reverse.shape == (24 if kind is nn.LSTM else 18, 5)  # type: ignore[union-attr]


def test_softmax_over_paths_keeps_them_and_lets_channels_go() -> None:
    model = Around(
        lambda m, x: m.head((torch.stack((m.a(x), m.b(x)), 1) * torch.softmax(torch.stack((m.a(x), m.b(x)), 1), 1)).sum(1)),
        a=nn.Conv2d(3, 6, 1, bias=False),
        b=nn.Conv2d(3, 6, 1, bias=False),
        head=nn.Conv2d(6, 2, 1),
    )
    empty(model.a.weight, 0, 1)  # type: ignore[arg-type, union-attr]
    empty(model.b.weight, 1, 2)  # type: ignore[arg-type, union-attr]
    small, _ = pruned(model.eval(), torch.randn(IMAGE))
    assert widths(small)["a.weight"][0] == 5


def test_a_bias_of_positions_goes_with_its_head() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 6)
            self.table = nn.Parameter(torch.randn(5, 5, 3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table.permute(2, 0, 1)[None])
            made: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
            return made

    model = Biased().eval()
    empty(model.out.weight, 4, 5, 6, 7, axis=1)
    small, _ = pruned(model, torch.randn(2, 5, 6))
    assert small.table.shape == (5, 5, 2)
    assert small.qkv.weight.shape == (24, 6)  # type: ignore[union-attr]


def test_a_sum_over_channels_that_meet_places_of_others_keeps_them() -> None:
    model = filled(
        Around(
            lambda m, x: m.head(m.a(x) @ m.b(x).transpose(1, 2)),
            a=nn.Conv1d(3, 6, 1, bias=False),
            b=nn.Linear(5, 5, bias=False),
            head=nn.Conv1d(6, 2, 1),
        )
    )
    empty(model.a.weight, 1, 4)  # type: ignore[arg-type, union-attr]
    empty(model.b.weight, 0, 2)  # type: ignore[arg-type, union-attr]
    small, _ = pruned(model, torch.randn(2, 3, 5))
    assert widths(small)["a.weight"][0] == 4
    assert widths(small)["b.weight"] == (5, 5)


def test_positions_and_masks_are_not_cut_to_the_length_of_the_example() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 3)
            self.places = nn.Parameter(torch.randn(1, 16, 8))
            self.slopes = nn.Parameter(torch.rand(1, 16, 1))
            self.register_buffer("seen", torch.ones(1, 16, 16).tril().bool())

        def forward(self, x: Tensor) -> Tensor:
            length = x.shape[1]
            hidden = self.stem(x) * self.slopes[:, :length] + self.places.squeeze(0)[:length].unsqueeze(0)
            scores = (hidden @ hidden.transpose(1, 2)).masked_fill(~self.seen[:, :length, :length], -1e9)
            made: Tensor = self.second(torch.relu(self.first(torch.softmax(scores, -1) @ hidden)))
            return made

    model = Positions().eval()
    empty(model.first.weight, 1, 4)
    empty(model.first.bias, 1, 4)
    small, _ = pruned(model, torch.randn(2, 8, 4))
    assert small.first.out_features == 10  # type: ignore[union-attr]
    longer = torch.randn(2, 16, 4)
    torch.testing.assert_close(small(longer), model(longer))


@pytest.mark.parametrize(("low", "high"), [(-math.inf, math.inf), (-math.inf, 0.25), (-0.5, math.inf)])
def test_constants_go_through_bounds_that_are_buffers(low: float, high: float) -> None:
    model = Around(
        lambda m, x: m.last(torch.clamp(m.first(x), m.low, m.high) * torch.maximum(m.gate(x), m.low)),
        first=nn.Linear(8, 6),
        gate=nn.Linear(8, 6),
        last=nn.Linear(6, 2),
    )
    model.register_buffer("low", torch.tensor(low))
    model.register_buffer("high", torch.tensor(high))
    empty(model.get_parameter("first.weight"), 1, 4)
    with torch.no_grad():
        model.get_parameter("first.bias")[[1, 4]] = 0
    small, _ = pruned(model.eval(), torch.randn(5, 8))
    assert small.get_submodule("gate").out_features == 4


def test_constants_that_overflow_are_not_known() -> None:
    # Infinity times zero is no zero, so nothing goes on the word of what became infinite, though sigmoid makes it a one.
    model = Around(lambda m, x: m.last(torch.sigmoid(torch.exp(m.first(x)))), first=nn.Linear(8, 6), last=nn.Linear(6, 2))
    empty(model.get_parameter("first.weight"), 1, 4)
    with torch.no_grad():
        model.get_parameter("first.bias")[4] = 1000
    small, _ = pruned(model.eval(), torch.randn(5, 8))
    assert small.get_submodule("first").out_features == 5
