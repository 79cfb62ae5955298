"""Architectures of transformers, each from a small configuration with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.zoo.case import Call, Case

VOCABULARY = 96
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_DECODER: dict[str, Any] = {**_TOKENS, **_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}
_ENCODER: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, **_SMALL, "max_position_embeddings": 64}
_VISION: dict[str, Any] = {**_SMALL, "image_size": 32, "patch_size": 8, "num_labels": 10}
_SPEECH: dict[str, Any] = {
    "vocab_size": 32,
    **_SMALL,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}


def transformers_cases() -> list[Case]:
    """Encoders, decoders, encoder-decoders, mixtures of experts, state spaces, vision, speech, detection, segmentation."""
    return [
        # encoders
        _text("Bert", "ForMaskedLM", _ENCODER, heads=("cls.predictions.decoder",)),
        _text("Roberta", "ForSequenceClassification", _ENCODER, heads=("classifier.out_proj",)),
        _text(
            "DistilBert",
            "ForTokenClassification",
            {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
            heads=("classifier",),
        ),
        _text("Albert", "ForMaskedLM", {**_ENCODER, "embedding_size": 32}, heads=("predictions.decoder",)),
        _text("Electra", "ForSequenceClassification", {**_ENCODER, "embedding_size": 32}, heads=("classifier.out_proj",)),
        _text("DebertaV2", "ForSequenceClassification", {**_ENCODER, "relative_attention": True}, heads=("classifier",)),
        _text("ModernBert", "ForMaskedLM", {**_TOKENS, **_SMALL, "cls_token_id": 1, "sep_token_id": 2}, heads=("decoder",)),
        # decoders
        _text(
            "GPT2",
            "LMHeadModel",
            {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
            heads=("lm_head",),
            config="GPT2Config",
        ),
        _text("OPT", "ForCausalLM", {**_DECODER, "ffn_dim": 128, "word_embed_proj_dim": 64}, heads=("lm_head",)),
        _text("Bloom", "ForCausalLM", {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}, heads=("lm_head",)),
        _text("GPTNeoX", "ForCausalLM", _DECODER, heads=("lm_head",)),
        _text("Llama", "ForCausalLM", _DECODER, heads=("lm_head",)),
        _text("Mistral", "ForCausalLM", {**_DECODER, "sliding_window": 4}, heads=("lm_head",)),
        _text("Qwen2", "ForCausalLM", _DECODER, heads=("lm_head",)),
        _text("Gemma2", "ForCausalLM", {**_DECODER, "head_dim": 16}, heads=("lm_head",)),
        _text("Phi3", "ForCausalLM", _DECODER, heads=("lm_head",)),
        # encoder-decoders
        _pair("T5", {**_TOKENS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}),
        _pair(
            "Bart",
            {
                **_TOKENS,
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 128,
                "decoder_ffn_dim": 128,
                "max_position_embeddings": 64,
            },
        ),
        # mixtures of experts
        _text("Mixtral", "ForCausalLM", {**_DECODER, "num_local_experts": 4}, heads=("lm_head",)),
        _text(
            "Qwen2Moe",
            "ForCausalLM",
            {
                **_DECODER,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 64,
            },
            heads=("lm_head",),
        ),
        # state spaces
        _text(
            "Mamba", "ForCausalLM", {**_TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}, heads=("lm_head",)
        ),
        _text(
            "Mamba2",
            "ForCausalLM",
            {
                **_TOKENS,
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "state_size": 16,
                "num_heads": 8,
                "head_dim": 16,
                "n_groups": 2,
            },
            heads=("lm_head",),
        ),
        # vision
        _image("ViT", "ForImageClassification", _VISION),
        _image("Dinov2", "ForImageClassification", _VISION),
        _image(
            "Swin",
            "ForImageClassification",
            {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        ),
        _image("ConvNext", "ForImageClassification", {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]}, size=64),
        # segmentation and detection
        _image(
            "Segformer",
            "ForSemanticSegmentation",
            {
                "hidden_sizes": [32, 32, 64, 64],
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 2, 2, 4],
                "decoder_hidden_size": 64,
            },
            size=64,
        ),
        _image("Yolos", "ForObjectDetection", {**_VISION, "image_size": [32, 32], "num_detection_tokens": 8}),
        Case("transformers", "Detr", "detr", _detr, lambda: ((), {"pixel_values": torch.randn(2, 3, 64, 64)})),
        # speech
        _speech("Wav2Vec2", "ForCTC"),
        _speech("Hubert", "ForSequenceClassification"),
        Case("transformers", "Whisper", "whisper", _whisper, _whisper_call, heads=("proj_out",)),
        # images and text
        Case("transformers", "CLIP", "clip", _clip, _clip_call),
    ]


def _tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 12))


def _make(model: str, config: str, options: dict[str, Any]) -> nn.Module:
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    return made


def _text(name: str, task: str, options: dict[str, Any], *, heads: tuple[str, ...], config: str = "") -> Case:
    kind = config or f"{name}Config"
    return Case(
        "transformers",
        name,
        name.lower(),
        lambda: _make(name + task, kind, options),
        lambda: ((), {"input_ids": _tokens()}),
        heads=heads,
    )


def _pair(name: str, options: dict[str, Any]) -> Case:
    return Case(
        "transformers",
        name,
        name.lower(),
        lambda: _make(name + "ForConditionalGeneration", f"{name}Config", options),
        lambda: ((), {"input_ids": _tokens(), "decoder_input_ids": _tokens()}),
        heads=("lm_head",),
    )


def _image(name: str, task: str, options: dict[str, Any], *, size: int = 32) -> Case:
    return Case(
        "transformers",
        name,
        name.lower(),
        lambda: _make(name + task, f"{name}Config", options),
        lambda: ((), {"pixel_values": torch.randn(2, 3, size, size)}),
    )


def _speech(name: str, task: str) -> Case:
    return Case(
        "transformers",
        name,
        name.lower(),
        lambda: _make(name + task, f"{name}Config", _SPEECH),
        lambda: ((), {"input_values": torch.randn(2, 1600)}),
    )


def _detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=8,
    )
    return transformers.DetrForObjectDetection(config)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        **_TOKENS,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=80,
        max_source_positions=50,
        max_target_positions=32,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _whisper_call() -> Call:
    return (), {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": _tokens()}


def _clip() -> nn.Module:
    text = {**_SMALL, **_TOKENS, "max_position_embeddings": 32, "projection_dim": 32}
    vision = {**_SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 32}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return transformers.CLIPModel(config)


def _clip_call() -> Call:
    return (), {"input_ids": _tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}
