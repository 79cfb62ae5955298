"""Claim: an order of channels across the whole network lets one-shot 2:4 keep more, and changes no output by more than 1e-5.

ResNet-50, DenseNet-121, ViT-B and a Llama-style decoder with random weights, biases and batch norms: the largest difference of an
output in float32, relative to the largest output, and the share of |weight| that 2:4 keeps before and after. With --data also
the pretrained ResNet-56 on CIFAR-10: accuracy of one-shot 2:4 by magnitude without training, in the given and in the found order.

    python benchmarks/channel_order.py [--seconds 60] [--models resnet50 ...] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsefx
from benchmarks.deployed_models import llama, resnet50, vit_b

BAR, SEED = 1e-5, 0


def densenet121() -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.densenet121(), torch.randn(1, 3, 64, 64)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet50": resnet50,
    "densenet121": densenet121,
    "vit_b": vit_b,
    "llama": llama,
}


def randomise(model: nn.Module) -> nn.Module:
    """Give batch norms, biases and heads of zeros random values, so that no place is like another and none is hidden."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() or parameter.dim() == 1:
                parameter.normal_(float("bias" not in name), 0.2)
    return model.eval()


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        made = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return made if isinstance(made, Tensor) else made.logits


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(torch.cat([model(part).argmax(1) for part in images.split(250)]).eq(labels).float().mean())


def one_shot_resnet56(data: Path, seconds: float) -> None:
    """Accuracy of the pretrained net, made 2:4 by magnitude, in both orders."""
    sys.path.insert(0, str(data))
    load, models = __import__("load"), __import__("models")
    net = models.CifarResNet(56)
    net.load_state_dict(torch.load(data / "cifar10_resnet56.pt", weights_only=True))
    net.eval()
    from cifar10_finetune import normalise

    images, labels = load.cifar_lossless("cifar10_test1000_lossless")
    images, labels = normalise(np.asarray(images)), torch.from_numpy(np.asarray(labels)).long()
    order = sparsefx.channel_order(net, images[:2], seconds=seconds, seed=SEED)
    ordered = sparsefx.apply_channel_plan(net, order.plan)
    print(f"ResNet-56, CIFAR-10, 1 000 test images: dense {accuracy(net, images, labels):.2%}, in the found order "
          f"{accuracy(ordered, images, labels):.2%}; 2:4 keeps {order.before:.4f} -> {order.after:.4f} of |weight|")  # fmt: skip
    for title, model in (("given order", net), ("found order", ordered)):
        sparse = sparsefx.finalize(sparsefx.sparsify(model, pattern="2:4", algorithm="static", example_inputs=images[:2]))
        print(f"  one-shot 2:4 by magnitude, {title}: {accuracy(sparse, images, labels):.2%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--models", nargs="*", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--data", type=Path, help="folder with the CIFAR-10 files, load.py, models.py and pretrained weights")
    arguments = parser.parse_args()
    print(f"device cpu ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}, sparsefx "
          f"{sparsefx.__version__}, seed {SEED}, {arguments.seconds:.0f} s of search a model")  # fmt: skip
    failed = False
    for name in arguments.models:
        torch.manual_seed(SEED)
        model, inputs = MODELS[name]()
        randomise(model)
        started = time.perf_counter()
        order = sparsefx.channel_order(model, inputs, seconds=arguments.seconds, seed=SEED)
        took = time.perf_counter() - started
        expected = outputs(model, inputs)
        made = outputs(sparsefx.apply_channel_plan(model, order.plan), inputs)
        difference = float((made - expected).abs().max() / expected.abs().max())
        failed |= difference > BAR or order.after <= order.before or bool(order.refused)
        print(f"{name:12} float32 difference {difference:.1e} (float64 {order.difference:.1e}), 2:4 keeps {order.before:.4f} -> "
              f"{order.after:.4f} of |weight| in {len(order.layers)} weights, {took:.0f} s; left out: "
              f"{'; '.join(order.refused) or 'nothing'}", flush=True)  # fmt: skip
    if arguments.data is not None:
        one_shot_resnet56(arguments.data, arguments.seconds)
    print("the claim " + ("does not hold" if failed else "holds"))
    sys.exit(failed)


if __name__ == "__main__":
    main()
