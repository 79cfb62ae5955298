"""Heads of attention that can go take the numbers along that their modules hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx
from tests.channel_pruning import pruned, widths

timm_layers = pytest.importorskip("timm.layers", reason="timm is not installed")


class Mixer(nn.Module):
    """Attention by hand over ``num_heads`` heads of 4 channels, all of which its code writes out."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.num_heads, self.head_dim, self.attn_dim = 4, 4, 16
        self.qkv, self.out = nn.Linear(8, 48), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, places, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, places, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if self.form == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        elif self.form == "masked":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=x.new_zeros(places, places))
        else:
            mixed = (q @ k.transpose(2, 3)).softmax(-1) @ v
        made: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, places, self.attn_dim))
        return made


def _emptied(model: nn.Module, path: str, *heads: int, biases: bool) -> nn.Module:
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.view(3, 4, 4, -1)[:, list(heads)] = 0
        linear.bias.normal_()
        if not biases:
            linear.bias.view(3, 4, 4)[:, list(heads)] = 0
    return model.eval()


@pytest.mark.parametrize("form", ["fused", "masked", "by hand"])
def test_whole_heads_and_the_numbers_that_the_module_holds(form: str) -> None:
    model = _emptied(Mixer(form), "qkv", 1, 2, biases=False)
    small, plan = pruned(model, torch.randn(2, 5, 8))
    assert widths(small)["qkv.weight"] == (24, 8)
    assert widths(small)["out.weight"] == (8, 8)
    assert [vars(small)[name] for name in ("num_heads", "head_dim", "attn_dim")] == [2, 4, 8]
    assert {one.name for one in plan.attributes if not one.module} == {"num_heads", "attn_dim"}


def test_values_that_are_the_same_everywhere_are_their_own_average() -> None:
    model = _emptied(Mixer("fused"), "qkv", 3, biases=True)
    small, _ = pruned(model, torch.randn(2, 5, 8))
    assert widths(small)["qkv.weight"] == (36, 8)


@pytest.mark.parametrize("form", ["masked", "by hand"])
def test_behind_a_mask_they_stay(form: str) -> None:
    model = _emptied(Mixer(form), "qkv", 3, biases=True)
    small, plan = pruned(model, torch.randn(2, 5, 8))
    assert widths(small) == widths(model)
    assert plan.report.layers[0].why == "they go with channels that out reads, where they are not constant"


def test_the_attention_of_timm() -> None:
    model = _emptied(
        nn.Sequential(timm_layers.Attention(16, num_heads=4, qkv_bias=True), nn.Linear(16, 3)), "0.qkv", 0, biases=True
    )
    small, _ = pruned(model, torch.randn(2, 5, 16))
    held = vars(small.get_submodule("0"))
    assert [held[name] for name in ("num_heads", "head_dim", "attn_dim")] == [3, 4, 12]


def test_a_plan_with_heads_is_saved_and_carried_out_again(tmp_path: object) -> None:
    model = _emptied(Mixer("fused"), "qkv", 0, biases=True)
    plan = sparsefx.channel_plan(model, torch.randn(2, 5, 8), multiple=1)
    path = f"{tmp_path}/plan.safetensors"
    plan.save(path)
    again = sparsefx.apply_channel_plan(model, sparsefx.ChannelPlan.load(path))
    x = torch.randn(3, 6, 8)
    torch.testing.assert_close(again(x), model(x))
    assert again.num_heads == 3
    assert model.num_heads == 4
