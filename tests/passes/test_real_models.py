"""Real architectures at a small size: every use of a masked parameter is sparse, and Program and module agree bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sparsefx
from sparsefx import patterns
from sparsefx.capture import capture
from sparsefx.passes.analyze_eligibility import analyze
from sparsefx.passes.insert_masks import masked_graph
from sparsefx.sparse_parameter import sparse_parameters
from sparsefx.verify import is_masked_op
from tests.equality import assert_same_computation

pytestmark = [
    pytest.mark.filterwarnings("ignore:this model was sparsified"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def _resnet() -> Case:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(num_classes=16), (torch.randn(2, 3, 64, 64),), {}


def _swin() -> Case:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.SwinTransformer([4, 4], 32, [1, 2], [1, 2], [4, 4], num_classes=16)
    return model, (torch.randn(2, 3, 32, 32),), {}


def _vit() -> Case:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=16), (torch.randn(2, 3, 32, 32),), {}


def _beit() -> Case:
    timm = pytest.importorskip("timm")
    model = timm.models.beit.Beit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=16)
    return model, (torch.randn(2, 3, 32, 32),), {}


def _encoder() -> Case:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 32),), {}


def _bert() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=16
    )
    return transformers.BertForSequenceClassification(config), (), {"input_ids": torch.randint(0, 96, (2, 8))}


def _gpt2() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config), (), {"input_ids": torch.randint(0, 96, (2, 8))}


CASES: dict[str, tuple[Callable[[], Case], set[str]]] = {
    "resnet18": (_resnet, {"conv1"}),
    "swin": (_swin, {"features.0.0"}),
    "vit": (_vit, {"conv_proj"}),
    "beit": (_beit, {"patch_embed.proj"}),
    "encoder": (_encoder, set()),
    "bert": (_bert, {"classifier"}),
    "gpt2": (_gpt2, {"lm_head"}),
}


@pytest.mark.parametrize("name", CASES)
def test_only_what_the_rule_leaves_out_is_dense(name: str) -> None:
    make, dense = CASES[name]
    model, args, kwargs = make()
    analysis = analyze(model, example_inputs=(args, kwargs), pattern=patterns.parse("2:4"))
    assert {layer.name for layer in analysis.layers if not layer.sparse} == dense
    assert {layer.rung for layer in analysis.layers} == {1}
    assert all(layer.flops for layer in analysis.layers)
    assert analysis.unseen == ()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_program_and_module_agree_bit_for_bit(name: str, training: bool) -> None:
    model, args, kwargs = CASES[name][0]()
    keys = list(model.state_dict())
    sparsefx.sparsify(model, example_inputs=(args, kwargs))
    model.train(training)
    graph_module = masked_graph(model, (args, kwargs))
    masked = [node for node in graph_module.graph.nodes if is_masked_op(node)]
    assert len(masked) >= len(sparsefx.masks(model)) > 0
    assert_same_computation(model, graph_module, args, kwargs)
    assert list(model.state_dict()) == keys


def _outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", CASES)
def test_the_program_ignores_whatever_stands_where_a_mask_is_false(name: str) -> None:
    """Were one use of a parameter not masked in the graph, the noise would show."""
    model, args, kwargs = CASES[name][0]()
    sparsefx.sparsify(model, example_inputs=(args, kwargs))
    graph_module = masked_graph(model.eval(), (args, kwargs))
    with torch.no_grad():
        expected = _outputs(graph_module, args, kwargs)
        for _, parameter, record in sparse_parameters(model):
            parameter.add_(torch.randn_like(parameter).masked_fill(record.mask, 0))
        assert all(torch.equal(a, b) for a, b in zip(_outputs(graph_module, args, kwargs), expected, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(_outputs(model, args, kwargs), expected, strict=True))


def test_a_detection_model_is_observed_and_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=64, rpn_post_nms_top_n_test=20
    ).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    images = [torch.rand(3, 64, 64)]
    random_state = torch.get_rng_state()
    analysis = analyze(model, example_inputs=(images,), pattern=patterns.parse("2:4"))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert analysis.program.complete
    assert {layer.rung for layer in analysis.layers} == {2}
    assert {layer.name for layer in analysis.layers if not layer.sparse} == {"backbone.body.conv1"}
    assert {layer.kind for layer in analysis.layers} == {"Conv2d", "Linear", "ConvTranspose2d"}
    assert all(layer.flops for layer in analysis.layers)
    assert {"backbone", "roi_heads.box_head", "roi_heads.mask_head"} <= set(analysis.program.graphs)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""  # what torch.export prints of its refusal is nobody's business


@pytest.mark.parametrize("name", ["vit", "beit", "bert", "gpt2", "encoder"])
def test_without_inputs_the_same_layers_are_chosen(name: str) -> None:
    make, dense = CASES[name]
    model, _, _ = make()
    analysis = analyze(model, pattern=patterns.parse("2:4"))
    assert {layer.name for layer in analysis.layers if not layer.sparse} == dense


def test_a_fused_function_that_torchvision_keeps_whole_needs_inputs() -> None:
    model, _, _ = _swin()
    rows = {layer.name: layer for layer in analyze(model, pattern=patterns.parse("2:4")).layers}
    assert "'shifted_window_attention'" in rows["features.1.0.attn.qkv"].reason
    assert "pass example_inputs" in rows["features.1.0.attn.qkv"].reason
    assert rows["features.1.0.mlp.0"].sparse


def test_a_cache_among_the_outputs_does_not_stop_the_capture() -> None:
    transformers = pytest.importorskip("transformers")
    model, args, kwargs = _gpt2()
    model.config.use_cache = True
    program = capture(model, (args, kwargs))
    assert "" in program.graphs
    assert program.resisted == ()
    assert model.config.use_cache is True
    assert isinstance(model(**kwargs).past_key_values, transformers.Cache)
