"""Claim: `sparsefx.accelerate` makes 2:4 ViT-L, BERT-large and ResNet-50 faster end to end, by 1.4 where matrix products bound
them.

Random weights, masked 2:4 by magnitude; float outputs are compared, accuracy is not what this measures. Dense and accelerated
model in the same run, in turns: as CUDA graphs (the GPU's work alone), and with ``--compile`` both compiled by inductor too.
ResNet-50 is in channels_last in both; its 3 x 3 convolutions stay dense, so the bar is not set for it.

    python -m benchmarks.cuda.inference_models [--model vit_l|bert_large|resnet50|all] [--batch 64] [--int8] [--compile] [--dry]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sparsefx
from benchmarks.cuda.common import Setting, start, verdict
from benchmarks.cuda.vision_transformer import vit_large
from sparsefx.acceleration import accelerate_with

BARS = {"vit_l": 1.4, "bert_large": 1.4, "resnet50": None}


def vit_l(batch: int, dry: bool) -> tuple[nn.Module, Tensor]:
    """ViT-L/16."""
    return vit_large(dry=dry), torch.randn(1, 3, 32, 32) if dry else torch.randn(batch, 3, 224, 224)


class Hidden(nn.Module):
    """BERT that gives one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=tokens).last_hidden_state
        return hidden


def bert_large(batch: int, dry: bool) -> tuple[nn.Module, Tensor]:
    """BERT-large on 384 tokens, the length of question answering."""
    import transformers

    if dry:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100}
        return Hidden(transformers.BertModel(transformers.BertConfig(**sizes))), torch.randint(0, 100, (1, 16))
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return Hidden(transformers.BertModel(transformers.BertConfig(**sizes))), torch.randint(0, 30000, (batch, 384))


def resnet50(batch: int, dry: bool) -> tuple[nn.Module, Tensor]:
    """ResNet-50."""
    import torchvision

    if dry:
        return torchvision.models.resnet50(), torch.randn(1, 3, 32, 32)
    return torchvision.models.resnet50(), torch.randn(batch, 3, 224, 224)


MODELS: dict[str, Callable[[int, bool], tuple[nn.Module, Tensor]]] = {
    "vit_l": vit_l,
    "bert_large": bert_large,
    "resnet50": resnet50,
}


@torch.no_grad()
def compare(name: str, dtype: torch.dtype, setting: Setting) -> None:
    """Print the report's summary and the ratios of one model."""
    torch.manual_seed(setting.seed)
    model, data = MODELS[name](setting.options.batch, setting.dry)
    model = sparsefx.finalize(sparsefx.sparsify(model.eval(), pattern="2:4")).to(setting.device, dtype)
    data = data.to(setting.device)
    if data.is_floating_point():
        data = data.to(dtype)
    if name == "resnet50":
        model, data = model.to(memory_format=torch.channels_last), data.to(memory_format=torch.channels_last)
    lowered: dict[str, Any] = {"2:4": None, **({"2:4 int8": torch.int8} if setting.options.int8 else {})}
    for kind, quantized in lowered.items():
        report = accelerate_with(model, data, kernels=setting.kernels, timer=setting.chooser, dtype=quantized)
        told = f"{len(report.accelerated)} of {len(report.layers)} layers sparse, outputs off by {report.largest_difference:.1e}"
        ways: dict[str, tuple[nn.Module, nn.Module]] = {"graphs": (model, report.model)}
        if setting.options.compile:
            ways["inductor"] = (torch.compile(copy.deepcopy(model)), torch.compile(report.model))
        for way, pair in ways.items():
            dense, sparse = setting.timer([lambda one=one: one(data) for one in pair])
            shown = BARS[name] if kind == "2:4" else None
            print(
                f"{str(dtype).removeprefix('torch.'):9s}{name:11s} batch {len(data):4d} {kind:9s}{way:9s}{1e3 * sparse:9.2f} ms "
                f"(dense {1e3 * dense:9.2f}) {verdict(dense / sparse, shown, setting)}   {told}",
                flush=True,
            )
        if setting.options.layers:
            print(report)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=(*MODELS, "all"), default="all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--layers", action="store_true", help="print the report on every layer")
    setting = start(__doc__, parser)
    for dtype in setting.dtypes:
        for name in MODELS if setting.options.model == "all" else (setting.options.model,):
            compare(name, dtype, setting)


if __name__ == "__main__":
    main()
