"""LoRA (Hugging Face PEFT) on a sparse base: the base stays sparse, whether adapters train, are saved or are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx

transformers = pytest.importorskip("transformers", reason="the model zoo is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::DeprecationWarning", "ignore::FutureWarning")
IDS = torch.tensor([[1, 5, 7, 2, 9, 4]])


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def with_adapters(model: nn.Module) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))


def train(model: Any, steps: int = 3) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def in_base(model: nn.Module) -> dict[str, Tensor]:
    """Masks under the names that the parameters have without adapters."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): mask for name, mask in sparsefx.masks(model).items()
    }


def test_adapters_train_on_a_sparse_base_that_stays_as_it_is(tmp_path: Path) -> None:
    model = sparsefx.sparsify(base(), exclude=["lm_head"])
    masks, weights = sparsefx.masks(model), {name: value.clone() for name, value in model.state_dict().items()}
    adapted = with_adapters(model)
    train(adapted)
    found = in_base(adapted)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    for name, value in adapted.base_model.model.state_dict().items():
        plain = name.replace(".base_layer", "")
        assert "lora_" in name or torch.equal(value, weights[plain]), name
    assert any(bool(value.any()) for name, value in adapted.state_dict().items() if "lora_B" in name)
    adapted.save_pretrained(tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(sparsefx.sparsify(base(), exclude=["lm_head"]), tmp_path / "adapter").eval()
    assert torch.equal(other(IDS).logits, adapted.eval()(IDS).logits)
    words = adapted.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(words, other.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_merged_adapters_are_cut_to_the_masks_by_finalize() -> None:
    model = sparsefx.sparsify(base(), exclude=["lm_head"])
    masks = sparsefx.masks(model)
    adapted = with_adapters(model)
    train(adapted)
    merged = adapted.merge_and_unload()
    assert merged is model
    name = "model.layers.0.self_attn.q_proj.weight"
    dense = merged.get_parameter(name).detach().clone()
    assert bool(dense[~masks[name]].any())  # a low-rank product knows nothing of masks
    sparsefx.finalize(merged)
    assert torch.equal(merged.get_parameter(name), dense * masks[name])
    assert all(not merged.get_parameter(key)[~mask].any() for key, mask in masks.items())


def test_sparsifying_below_adapters_takes_the_base_alone() -> None:
    adapted = with_adapters(base())
    rule = sparsefx.Eligibility(frozen=True)
    sparsefx.sparsify(adapted, eligibility=rule, exclude=["*lora_*", "*lm_head"])
    assert in_base(adapted).keys() == sparsefx.masks(sparsefx.sparsify(base(), exclude=["lm_head"])).keys()
    before = sparsefx.masks(adapted)
    train(adapted)
    assert all(torch.equal(mask, before[name]) for name, mask in sparsefx.masks(adapted).items())
    assert all(not adapted.get_parameter(name)[~mask].any() for name, mask in before.items())
    # Left to itself the rule leaves frozen weights dense, since they could not recover.
    reasons = {row.name: row.reason for row in sparsefx.audit(with_adapters(base())).layers}
    assert "is frozen" in reasons["base_model.model.model.layers.0.self_attn.q_proj.base_layer"]
