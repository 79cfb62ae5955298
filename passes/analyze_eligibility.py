"""Decides which Linear/Conv weights can be sparse, and says why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.capture import capture
from sparsefx.capture.arguments import split_arguments
from sparsefx.capture.state import unchanged
from sparsefx.capture.uses import VIEWS
from sparsefx.errors import OptionError
from sparsefx.passes.couple_channels import couple_channels
from sparsefx.passes.eligibility import Candidate, Eligibility
from sparsefx.passes.language_models import embedding_parameters, final_layers, heads, outside_blocks, vocabulary_sizes
from sparsefx.passes.layer_weights import LayerWeight, layer_weights
from sparsefx.passes.select_layers import Selection, Selector, select
from sparsefx.passes.tensor_cores import tensor_core_refusal
from sparsefx.patterns.base import Pattern
from sparsefx.patterns.coupled_channel import Coupled, CoupledChannel
from sparsefx.program import Program, Rung
from sparsefx.report import LayerReport
from sparsefx.sparse_parameter import empty_channels, sparse_parameters

__all__ = ["Analysis", "Candidate", "Eligibility", "Selection", "Selector", "analyze", "analyze_program"]


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found.

    Attributes:
        layers: a row for every Linear/Conv weight, in the order of the model's parameters.
        unseen: parameters that look like weights, belong to no known layer and were read by no call that was seen;
            ``example_inputs`` would show what reads them.
        program: the captured model.
        coupled: for pattern ``channel:coupled``, the channels of each weight that is to be sparse, by full name.
    """

    layers: tuple[LayerReport, ...]
    unseen: tuple[str, ...]
    program: Program
    coupled: Mapping[str, Coupled] = field(default_factory=dict)


def analyze(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    pattern: Pattern,
    density: float | None = None,
    eligibility: Eligibility | None = None,
    include: Selection = None,
    exclude: Selection = None,
) -> Analysis:
    """Capture ``model`` and decide on each of its Linear/Conv weights; nothing is changed.

    Of a weight that is sparse already, the live mask is reported, whatever the other arguments say.

    Args:
        model: any module, sparsified or not.
        example_inputs: see `sparsefx.capture.capture`.
        pattern: the masks that are asked for.
        density: share of weights that participate; None means the pattern's own.
        eligibility: the rule; None means the paper's.
        include: the layers to consider; None means all.
        exclude: the layers to leave dense.

    Raises:
        PatternError: a density that the pattern cannot have.
        EligibilityError: a name or glob in ``include`` or ``exclude`` matches no layer.
        CaptureError: the model does not run on the example inputs.
    """
    if not isinstance(pattern, Pattern):
        raise OptionError(f"analyze was given pattern {pattern!r}; expected a Pattern, from sparsefx.patterns.parse")
    density = pattern.resolve_density(density)
    program = capture(model, example_inputs)
    found = analyze_program(program, pattern=pattern, density=density, eligibility=eligibility, include=include, exclude=exclude)
    return _coupled(found, example_inputs, density) if isinstance(pattern, CoupledChannel) else found


def analyze_program(
    program: Program,
    *,
    pattern: Pattern,
    density: float,
    eligibility: Eligibility | None = None,
    include: Selection = None,
    exclude: Selection = None,
) -> Analysis:
    """As `analyze`, of a model that is captured already."""
    rule = eligibility or Eligibility()
    weights = layer_weights(program)
    modules = dict(program.model.named_modules(remove_duplicate=False))
    parameters_by_layer = _all_names(program, weights)
    included = select(include, parameters_by_layer, modules, "include")
    excluded = select(exclude, parameters_by_layer, modules, "exclude")
    records = {id(parameter): record for _, parameter, record in sparse_parameters(program.model)}
    candidate_of = _candidates(program)
    overlaps = _overlaps(program.model)
    layers: list[LayerReport] = []
    for weight in weights:
        record = records.get(id(weight.parameter))
        if record is not None:
            layers.append(_row(program, weight, "", record.pattern.name, float(record.mask.float().mean())))
            continue
        if weight.parameter is None:
            reason = "its weight is computed (a parametrization such as weight_norm, spectral_norm or prune); remove that first"
        elif excluded is not None and weight.name in excluded:
            reason = "is excluded"
        elif included is not None and weight.name not in included:
            reason = "is not among the included layers"
        else:
            candidate = candidate_of(weight)
            reason = rule.refusal(candidate) or overlaps.get(id(weight.parameter), "")
            if any(site.problem for site in weight.sites) and not program.complete and "example_inputs" not in reason:
                reason += "; pass example_inputs to look inside"
            if not reason:
                shape, axis = candidate.pattern_shape
                refused = pattern.refusal(shape, reduction_axis=axis)
                reason = "" if refused is None else f"pattern {pattern.name!r} cannot be had: {refused}"
        layers.append(_row(program, weight, reason, "" if reason else pattern.name, 1.0 if reason else density))
    return Analysis(layers=tuple(layers), unseen=_unseen(program, weights), program=program)


def _coupled(found: Analysis, example_inputs: Any, density: float) -> Analysis:
    """What of it stays sparse where channels have to go together; a model that has masks already keeps its rows."""
    model = found.program.model
    axes = {row.parameter: row.reduction_axis for row in found.layers if row.sparse}
    if not axes or any(True for _ in sparse_parameters(model)):
        return found
    if example_inputs is None:
        raise OptionError(
            "pattern 'channel:coupled' was given without example_inputs; which filters go together is read off the model's "
            "graph: pass inputs that the model accepts, or use pattern 'channel'"
        )
    coupling = couple_channels(model, *split_arguments(example_inputs), axes, density)
    rows = tuple(
        replace(row, sparse=False, reason=coupling.reasons[row.parameter], pattern="", density=1.0)
        if row.sparse and row.parameter in coupling.reasons
        else row
        for row in found.layers
    )
    return replace(found, layers=rows, coupled=coupling.members)


def _all_names(program: Program, weights: list[LayerWeight]) -> dict[str, tuple[str, ...]]:
    """Every name of each layer's parameter, the layer's own first: a tied one can be meant by any of them."""
    tied = {alias: aliases for aliases in program.aliases.values() if len(aliases) > 1 for alias in aliases}
    return {
        weight.name: (weight.full_name, *(alias for alias in tied.get(weight.full_name, ()) if alias != weight.full_name))
        for weight in weights
    }


def _candidates(program: Program) -> Callable[[LayerWeight], Candidate]:
    """The function that gathers what the rule looks at; what concerns the whole model is looked up once."""
    embedded = embedding_parameters(program)
    sizes = vocabulary_sizes(program)
    outside = outside_blocks(program)
    finals = final_layers(program)
    head_ids = heads(program, outside)
    others_train = any(parameter.requires_grad for parameter in program.model.parameters())

    def candidate_of(weight: LayerWeight) -> Candidate:
        parameter = weight.parameter
        assert parameter is not None
        vocabulary = False
        if not isinstance(parameter, nn.UninitializedParameter) and parameter.ndim == 2:
            outputs, inputs = parameter.shape[1 - weight.reduction_axis], parameter.shape[weight.reduction_axis]
            final = id(parameter) in finals if finals is not None else id(parameter) in outside
            vocabulary = outputs in sizes and outputs != inputs and final
        return Candidate(
            name=weight.name,
            kind=weight.kind,
            parameter=parameter,
            sites=weight.sites,
            reduction_axis=weight.reduction_axis,
            groups=weight.groups,
            embedded=id(parameter) in embedded,
            vocabulary=vocabulary,
            head=id(parameter) in head_ids,
            others_train=others_train,
        )

    return candidate_of


def _row(program: Program, weight: LayerWeight, reason: str, pattern: str, density: float) -> LayerReport:
    value = weight.parameter if weight.parameter is not None else _computed(program.model, weight.full_name)
    uninitialized = value is None or isinstance(value, nn.UninitializedParameter)
    shape = () if value is None or uninitialized else tuple(value.shape)
    measurable = value is not None and len(shape) >= 2 and value.device.type != "meta" and value.layout == torch.strided
    op = next((site.op for site in weight.sites), "")
    return LayerReport(
        name=weight.name,
        parameter=weight.full_name,
        kind=weight.kind,
        shape=shape,
        sparse=not reason,
        reason=reason,
        pattern=pattern,
        density=density,
        empty_channels=empty_channels(value.detach(), weight.reduction_axis) if value is not None and measurable else 0,
        flops=_flops(program, weight),
        rung=int(weight.sites[0].rung) if weight.sites else int(Rung.MODULE),
        call_sites=tuple(str(site) for site in weight.sites),
        reduction_axis=weight.reduction_axis,
        tensor_core_reason=tensor_core_refusal(shape, weight.reduction_axis, weight.groups, op, pattern),
    )


def _computed(model: nn.Module, full_name: str) -> Tensor | None:
    """The current value of a computed weight; None where computing it fails, which is for its own forward to tell."""
    path, _, local_name = full_name.rpartition(".")
    with torch.no_grad(), unchanged(model):
        try:
            value = getattr(model.get_submodule(path), local_name)
        except Exception:  # a user's parametrization may raise anything
            return None
    return value if isinstance(value, Tensor) else None


def _flops(program: Program, weight: LayerWeight) -> int | None:
    if program.complete and all(site.rung is Rung.MODULE for site in weight.sites):
        return 0 if weight.parameter is not None else None  # the run did not reach it
    products = [site.flops for site in weight.sites if site.multiplies]
    if not products or None in products:
        return None
    return sum(flops for flops in products if flops is not None)


def _overlaps(model: nn.Module) -> dict[int, str]:
    """Reasons by ``id`` of parameters whose memory another parameter, or the parameter itself, uses as well.

    Sharing a Parameter is tying, and fine; two Parameters over one memory would have two masks that fight.
    """
    reasons: dict[int, str] = {}
    by_storage: dict[int, list[tuple[int, int, str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.layout != torch.strided:
            continue  # these are refused, or not asked about
        if parameter.device.type == "meta" or parameter.numel() == 0:
            continue
        extent = 1 + sum((size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True))
        if extent < parameter.numel():
            reasons[id(parameter)] = "several of its elements share one place in memory (an expanded tensor); clone it first"
        start = int(parameter.storage_offset())
        address = parameter.untyped_storage().data_ptr()
        by_storage.setdefault(address, []).append((start, start + extent, name, parameter))
    for entries in by_storage.values():
        entries.sort(key=lambda entry: entry[:2])
        farthest = entries[0]
        for entry in entries[1:]:
            if entry[0] < farthest[1]:
                text = "shares memory with {}, another Parameter; tie them by assigning one Parameter to both"
                reasons.setdefault(id(farthest[3]), text.format(entry[2]))
                reasons.setdefault(id(entry[3]), text.format(farthest[2]))
            farthest = max(farthest, entry, key=lambda one: one[1])
    return reasons


def _unseen(program: Program, weights: list[LayerWeight]) -> tuple[str, ...]:
    """Parameters that look like weights, of layers that are in no table, and that no call was seen to read, or only as a copy in
    another order, of which it is lost which axis is which."""
    lost = {name for name, sites in program.call_sites.items() if all(site.op in VIEWS for site in sites)}
    known = set(program.call_sites) - lost | {weight.full_name for weight in weights}
    computed = tuple(weight.full_name.rpartition(".")[0] + "." for weight in weights if weight.parameter is None)
    modules = dict(program.model.named_modules(remove_duplicate=False))
    parameters = dict(program.model.named_parameters())
    found = []
    for name, parameter in parameters.items():
        if name in known or any(alias in known for alias in program.aliases[name]):
            continue
        owner = modules[name.rpartition(".")[0]]
        norm = type(owner).__module__.startswith("torch.nn") and "Norm" in type(owner).__name__
        if norm or isinstance(parameter, nn.UninitializedParameter) or (computed and name.startswith(computed)):
            continue
        if parameter.ndim >= 2 and min(parameter.shape[:2]) > 1:
            found.append(name)
    return tuple(found)
