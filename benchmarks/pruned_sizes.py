"""Claim: with half of all filters empty, networks shrink at least as far as with OpenVINO's pruning, and also where biases stay.

Half of the filters of each layer are zero, the same ones where residuals tie layers together. OpenVINO (its offline pruning
transformation) and `prune_channels(multiple=1)` cut the same network; values in weights and biases are counted by OpenVINO in
both results, batch norms folded, relative to the uncut network. Once with the biases and batch norm shifts of empty filters at
zero, and once with all of them random. OpenVINO's result is run, since it is wrong on some networks.

    pip install openvino
    python benchmarks/pruned_sizes.py [--only resnet18] [--out pruned-sizes.json]

Bars: with biases at zero the sizes published for OpenVINO, and the one measured; with biases kept, no layer is wider than without
them by more than one channel for each group that it or a grouped convolution behind it has: a group reads its own channels only,
so that each needs a carrier of its own.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy
import openvino
import torch
import torch.fx
import torchvision
import typer
from openvino._offline_transformations import apply_pruning_transformation
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsefx
from benchmarks.emptied import empty_half, randomize

SEED = 0
BARS = {
    "resnet18": 0.261,
    "vgg11_bn": 0.258,
    "densenet121": 0.285,
    "mobilenet_v2": 0.348,
    "resnext50_32x4d": 0.501,
    "googlenet": 0.289,
    "efficientnet_b0": 0.321,
}
"""Size left where biases are zero, as measured with OpenVINO when it still worked best."""


def build(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    options: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model: nn.Module = torchvision.models.get_model(name, **options).eval()
    return model


def convert(model: nn.Module, image: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return openvino.convert_model(model, example_input=image, input=list(image.shape))


def values(graph: Any) -> int:
    """Floating-point values in the constants of an OpenVINO graph."""
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant" and node.get_element_type().is_real()]
    return sum(int(numpy.prod(node.get_output_shape(0))) for node in constants)


def difference(graph: Any, model: nn.Module, image: Tensor) -> float:
    """Largest difference of the graph's output from the model's, relative to its largest value."""
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    with torch.no_grad():
        expected = model(image)
    found = torch.from_numpy(compiled(image.numpy())[0])
    return float((found - expected).abs().max() / expected.abs().max())


def measure(name: str, *, biases: bool) -> dict[str, Any]:
    """Sizes of one network."""
    model, generator = build(name), torch.Generator().manual_seed(SEED)
    image = torch.randn(1, 3, 64, 64, generator=generator)
    randomize(model, generator)
    filters = empty_half(model, image, generator, biases=biases)
    graph = convert(model, image)
    whole = values(graph)
    try:
        apply_pruning_transformation(graph)
        theirs, their_difference = values(graph) / whole, difference(graph, model, image)
        told = "" if their_difference < 1e-3 else "wrong"
    except RuntimeError as error:
        theirs, their_difference, told = 1.0, float("nan"), "throws: " + str(error).strip().splitlines()[-1][:80]
    plan = sparsefx.channel_plan(model, image, multiple=1)
    pruned = sparsefx.apply_channel_plan(copy.deepcopy(model), plan)
    ours = convert(pruned, image)
    return {
        "name": name,
        "biases": biases,
        "filters": filters,
        "values": whole,
        "ours": values(ours) / whole,
        "our_difference": difference(ours, model, image),
        "float64": plan.report.difference,
        "theirs": theirs,
        "their_difference": their_difference,
        "told": told,
        "widths": {row.weight: row.outputs_after for row in plan.report.layers},
        "refused": list(plan.report.refused),
    }


def carriers(model: nn.Module) -> dict[str, int]:
    """By convolution, the groups that it or one that reads it has."""
    convolutions = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    found = {path: module.groups for path, module in convolutions.items()}
    for node in torch.fx.symbolic_trace(model).graph.nodes:
        pending = list(node.all_input_nodes) if node.target in convolutions else []
        while pending:
            producer = pending.pop()
            if producer.target in convolutions:
                found[producer.target] = max(found[producer.target], convolutions[node.target].groups)
            else:
                pending += producer.all_input_nodes
    return found


def verdict(name: str, zeroed: dict[str, Any], kept: dict[str, Any]) -> str:
    """What holds of the bars, in words."""
    worse = []
    if round(zeroed["ours"], 3) > BARS[name]:
        worse.append(f"{zeroed['ours']:.3f} is above {BARS[name]}")
    if not zeroed["told"] and zeroed["ours"] > zeroed["theirs"]:
        worse.append("larger than OpenVINO's")
    groups = carriers(build(name))
    for weight, width in kept["widths"].items():
        if width > zeroed["widths"][weight] + groups.get(weight.removesuffix(".weight"), 1):
            worse.append(f"{weight} keeps {width} of {zeroed['widths'][weight]} with biases")
    return "; ".join(worse) or "holds"


def main(
    only: Annotated[list[str] | None, typer.Option(help="Networks to measure.")] = None,
    out: Annotated[Path, typer.Option(help="Where results go; networks in it are not measured again.")] = Path(
        "pruned-sizes.json"
    ),
) -> None:
    """Measure and compare."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"CPU {platform.processor() or platform.machine()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
          f"openvino {openvino.__version__}, sparsefx {sparsefx.__version__}, seed {SEED}")  # fmt: skip
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for name in only or BARS:
        for biases in (False, True):
            key = f"{name}/{'kept' if biases else 'zero'}"
            if key not in results:
                start = time.perf_counter()
                results[key] = measure(name, biases=biases)
                temporary = out.with_suffix(".tmp")
                temporary.write_text(json.dumps(results, indent=1))
                os.replace(temporary, out)
                print(f"{key}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        zeroed, kept = results[f"{name}/zero"], results[f"{name}/kept"]
        for row in (zeroed, kept):
            print(
                f"{name:16} biases {'kept' if row['biases'] else 'zero'}: ours {row['ours']:.4f} (difference "
                f"{row['our_difference']:.1e}, in float64 {row['float64']:.1e}), OpenVINO {row['theirs']:.4f} "
                f"(difference {row['their_difference']:.1e}) {row['told']}"
            )
        print(f"{name:16} published {BARS[name]}: {verdict(name, zeroed, kept)}", flush=True)


if __name__ == "__main__":
    typer.run(main)
