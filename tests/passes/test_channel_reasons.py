"""Every empty channel that stays has its reason."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx
from sparsefx.passes.channels.report import PruningReport
from sparsefx.pruning_page import pruning_page
from tests.channel_pruning import IMAGE, Around, empty, filled, pruned, widths


def _why(plan: sparsefx.ChannelPlan) -> dict[str, str]:
    return {row.weight: row.why for row in plan.report.layers}


def test_a_residual_names_the_layer_that_reads_what_is_added() -> None:
    model = Around(
        lambda m, x: m.last(m.first(x) + m.skip(x)), first=nn.Conv2d(3, 6, 1), skip=nn.Conv2d(3, 6, 1), last=nn.Conv2d(6, 2, 1)
    )
    empty(model.get_parameter("first.weight"), 1, 2)
    small, plan = pruned(filled(model), torch.randn(IMAGE))
    assert widths(small) == widths(model)
    assert _why(plan) == {
        "first.weight": "they go with channels that last reads, where they are not constant",
        "skip.weight": "",
        "last.weight": "",
    }


def test_channels_that_fill_up_a_width_and_channels_that_make_groups_equal_are_told_apart() -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)))
    empty(model.get_parameter("0.weight"), 1, 2, 5)
    _, plan = pruned(model, torch.randn(IMAGE), multiple=4)
    assert _why(plan)["0.weight"] == "they fill up the width"

    model = filled(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1, groups=2)))
    empty(model.get_parameter("0.weight"), 1, 2, 5)
    small, plan = pruned(model, torch.randn(IMAGE))
    assert small.get_submodule("0").out_channels == 6
    assert _why(plan)["0.weight"] == "heads, groups, halves or what is broadcast over them keep their sizes"


def test_what_is_added_to_the_result_of_an_op_without_a_rule_stays_for_that_reason() -> None:
    model = Around(lambda m, x: m.last(m.first(x) + torch.special.i0e(x)), first=nn.Linear(8, 8), last=nn.Linear(8, 2))
    empty(model.get_parameter("first.weight"), 1, 2)
    small, plan = pruned(model.eval(), torch.randn(4, 8))
    assert widths(small) == widths(model)
    assert _why(plan)["first.weight"] == "special_i0e has no rule"


def test_what_is_added_to_an_input_stays_for_that_reason() -> None:
    model = Around(lambda m, x: m.last(m.first(x) + x), first=nn.Linear(8, 8), last=nn.Linear(8, 2))
    empty(model.get_parameter("first.weight"), 1, 2)
    _, plan = pruned(model.eval(), torch.randn(4, 8))
    assert _why(plan)["first.weight"] == "it meets an input of the model"


def test_heads_go_where_a_table_along_their_channels_is_multiplied_with_them() -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 16, bias=False)
            self.last = nn.Linear(16, 3)
            self.register_buffer("angles", torch.linspace(0.1, 1.0, 4))
            self.angles: Tensor

        def forward(self, x: Tensor) -> Tensor:
            heads = self.first(x).view(x.shape[0], 5, -1, 4).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(heads, heads, heads, scale=0.5)
            turned = mixed * self.angles.cos()
            joined: Tensor = self.last(turned.transpose(1, 2).flatten(2))
            return joined

    model = Rotated().eval()
    empty(model.first.weight, 4, 5, 6, 7)
    small, _ = pruned(model, torch.randn(2, 5, 8))
    assert widths(small)["first.weight"] == (12, 8)
    assert small.get_buffer("angles").shape == (4,)


def test_inputs_that_make_one_batch_do_not_keep_the_layer_that_reads_them() -> None:
    def forward(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        one, other = m.last(torch.relu(m.first(torch.cat([x, y])))).chunk(2)  # type: ignore[operator]
        made: Tensor = one * other
        return made

    model = Around(forward, first=nn.Conv2d(3, 6, 3, padding=1), last=nn.Conv2d(6, 2, 1))
    empty(model.get_parameter("first.weight"), 1, 2)
    images = (torch.randn(IMAGE), torch.randn(IMAGE))
    plan = sparsefx.channel_plan(filled(model), images, multiple=1)
    small = sparsefx.apply_channel_plan(model, plan)
    assert plan.report.refused == ()
    assert small.get_submodule("first").out_channels == 4
    torch.testing.assert_close(small(*images), model(*images), rtol=1e-5, atol=1e-6)


class Tasks(nn.Module):
    """One head for each task, and one that is for training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
        self.auxiliary = nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        x = torch.relu(self.stem(x))
        made: Tensor = self.heads[task](x)
        return made + self.auxiliary(x).sum() if self.training else made


def test_layers_that_no_run_reads_are_named() -> None:
    model = Tasks().eval()
    empty(model.stem.weight, 1, 2)
    report = sparsefx.channel_plan(model, (torch.randn(4, 8), 1), multiple=1).report
    assert report.layers[0].outputs_after == 4
    assert report.unread == ("scale", "heads.0", "heads.2")
    assert report.refused == ()
    assert "not run by the example inputs, and not cut along: scale, heads.0, heads.2" in str(report)
    assert "not cut along: scale, heads.0, heads.2" in pruning_page(report, "tasks")
    assert PruningReport.from_dict(json.loads(report.to_json())) == report


def test_a_model_that_is_read_throughout_has_no_such_layers() -> None:
    report = sparsefx.channel_plan(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)).eval(), torch.randn(4, 8), multiple=1).report
    assert report.unread == ()
    assert report.notes() == []
