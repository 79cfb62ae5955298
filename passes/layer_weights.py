"""Every Linear/Conv weight of a captured model: of known layers, and of parameters that a product was seen to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sparsefx.capture.uses import is_known_product
from sparsefx.layers import is_computed, known_weights
from sparsefx.program import CallSite, Program


@dataclass(frozen=True)
class LayerWeight:
    """One weight.

    Attributes:
        name: path of the layer, or the full name of the parameter where the layer has several weights or is none.
        kind: type of the layer, with the parameter where it has several.
        full_name: of the parameter, as the layer has it; tied parameters have others too.
        parameter: None where a parametrization computes the weight.
        sites: every use that was seen.
        reduction_axis, groups: as the layer, or the first product, reads it.
    """

    name: str
    kind: str
    full_name: str
    parameter: nn.Parameter | None
    sites: tuple[CallSite, ...]
    reduction_axis: int
    groups: int


def layer_weights(program: Program) -> list[LayerWeight]:
    """All of them, one for each parameter, in the order of the model's parameters."""
    first_names = {alias: name for name, aliases in program.aliases.items() for alias in aliases}
    order: dict[str, int] = {name: index for index, name in enumerate(first_names)}
    found: dict[str, LayerWeight] = {}
    computed: list[str] = []
    first_of_module: dict[str, int] = {}
    for index, name in enumerate(first_names):
        parts = name.split(".")
        for depth in range(len(parts)):
            first_of_module.setdefault(".".join(parts[:depth]), index)
    for path, module in program.model.named_modules():
        for known in known_weights(module):
            full_name = f"{path}.{known.local_name}" if path else known.local_name
            name = path if path and known.local_name == "weight" else full_name
            parameter = module._parameters.get(known.local_name)
            if parameter is not None:
                first = first_names[full_name]
                sites = program.call_sites.get(first, ())
            elif not is_computed(module, known.local_name):
                continue
            else:
                first, sites = full_name, ()
                computed.append(f"{path}." if path else "")
                order[full_name] = first_of_module.get(path, len(order))
            if first not in found:
                found[first] = LayerWeight(
                    name, known.kind, full_name, parameter, sites, *_reading(sites, known.reduction_axis, known.groups)
                )
    parameters = dict(program.model.named_parameters())
    for name, sites in program.call_sites.items():
        products = [site for site in sites if site.multiplies or (site.problem and is_known_product(site.op))]
        if name in found or not products or parameters[name].ndim < 2:
            continue
        # What a parametrization computes a weight from is told of with the weight.
        if not (computed and name.startswith(tuple(computed))):
            found[name] = _bare(program.model, name, parameters, products, sites)
    return [found[first] for first in sorted(found, key=lambda first: order[first])]


def _reading(sites: tuple[CallSite, ...], axis: int, groups: int) -> tuple[int, int]:
    """Reduction axis and groups as the uses have them; what the layer's type says where none was seen."""
    for site in sites:
        if site.reduction_axis is not None:
            return site.reduction_axis, site.groups
    return axis, groups


def _bare(
    model: nn.Module, name: str, parameters: Mapping[str, nn.Parameter], products: list[CallSite], sites: tuple[CallSite, ...]
) -> LayerWeight:
    path, _, local_name = name.rpartition(".")
    axis, groups = _reading(tuple(products), 1, 1)
    kind = f"{type(model.get_submodule(path)).__name__}.{local_name}"
    return LayerWeight(name, kind, name, parameters[name], sites, axis, groups)
