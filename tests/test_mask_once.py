"""Masking for good, layer by layer; and models on the meta device, which need no memory at all."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.errors import EligibilityError, NonFiniteError, OptionError, StateError
from tests.training import small_net

transformers = pytest.importorskip("transformers", reason="the model zoo is not installed")


@pytest.mark.parametrize(("pattern", "density"), [("2:4", None), ("unstructured", 0.3), ("2:4-transposable", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_sparsify_and_finalize(pattern: str, density: float | None, dtype: torch.dtype) -> None:
    net = small_net().to(dtype, memory_format=torch.channels_last)
    expected = sparsefx.finalize(
        sparsefx.sparsify(small_net().to(dtype, memory_format=torch.channels_last), pattern=pattern, density=density)
    )
    assert sparsefx.mask_once(net, pattern=pattern, density=density) is net
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert sparsefx.masks(net) == {}
    twice = {name: value.clone() for name, value in net.state_dict().items()}
    sparsefx.mask_once(net, pattern=pattern, density=density)
    assert all(torch.equal(value, twice[name]) for name, value in net.state_dict().items())


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    net = small_net()
    with torch.no_grad():
        net[5].weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(NonFiniteError, match="5: the weight holds NaN"):
        sparsefx.mask_once(net)
    with pytest.raises(OptionError, match="needs all layers at once"):
        sparsefx.mask_once(net, pattern="unstructured:global")
    with pytest.raises(EligibilityError, match="no layer of this model can be sparse: it has no Linear or Conv layer"):
        sparsefx.mask_once(nn.ReLU())
    with pytest.raises(StateError, match="on the meta device; give the model memory"):
        sparsefx.mask_once(small_net().to("meta"))
    with pytest.raises(StateError, match=r"call sparsefx\.finalize"):
        sparsefx.mask_once(sparsefx.sparsify(small_net()))
    with pytest.raises(TypeError, match=r"mask_once\(\) got an unexpected keyword argument 'patern'"):
        sparsefx.mask_once(net, patern="2:4")  # type: ignore[call-arg]
    assert all(torch.equal(value.nan_to_num(9), before[name].nan_to_num(9)) for name, value in net.state_dict().items())


def test_seven_billion_parameters_on_the_meta_device_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) > 6.7e9
    sparsefx.sparsify(model, exclude=["lm_head"])
    found = sparsefx.audit(model)
    assert sum(layer.sparse for layer in found.layers) == 7 * 32
    assert next(layer.reason for layer in found.layers if layer.name == "lm_head") == "is excluded"
    assert all(mask.is_meta for mask in sparsefx.masks(model).values())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20  # GiB, of the 13 that weights in bf16 take
    assert grown < 1


def llama(seed: int | None) -> nn.Module:
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    if seed is None:
        with torch.device("meta"):
            made: nn.Module = transformers.LlamaForCausalLM(config)
            return made
    torch.manual_seed(seed)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_from_the_meta_device_becomes_the_model_sparsified_with_memory(assign: bool) -> None:
    expected = sparsefx.sparsify(llama(3), exclude=["lm_head"])
    model = sparsefx.sparsify(llama(None), exclude=["lm_head"])
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(llama(3).state_dict(), assign=assign)
    masks = sparsefx.masks(model)
    assert len(masks) == 14
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsefx.masks(expected).items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    audits = [sparsefx.audit(one) for one in (model, expected)]
    assert audits[0].layers == audits[1].layers
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=2)
    model.model.rotary_emb = expected.model.rotary_emb  # its buffers are in no state_dict
    ids = torch.tensor([[1, 5, 7, 2]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in sparsefx.masks(model).items())
