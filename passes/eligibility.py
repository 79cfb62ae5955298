"""Which weights may be sparse: the paper's rule, as a value that a user can change.

Source: "Advances in Sparse Neural Model Training", appendix B: convolutions and linear layers, except where the input channels
of a group are no multiple of 16; no embeddings, no vocabulary projections, no classification heads of language models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparsefx.errors import OptionError
from sparsefx.program import CallSite


@dataclass(frozen=True)
class Candidate:
    """One Linear/Conv weight, with all that a rule may look at.

    Attributes:
        name: of the layer, as in its report.
        kind: of the layer, as in its report.
        parameter: the weight itself.
        sites: every use that was seen.
        reduction_axis: 0 or 1; 2 for a stack of matrices.
        groups: of the convolutions that read it, else 1.
        embedded: whether an embedding reads the same parameter.
        vocabulary: whether it has as many outputs as an embedding of the model has rows, and is no repeated block's.
        head: whether it is the classification head of a language model.
        others_train: whether the model has parameters with ``requires_grad``.
    """

    name: str
    kind: str
    parameter: nn.Parameter
    sites: tuple[CallSite, ...]
    reduction_axis: int
    groups: int = 1
    embedded: bool = False
    vocabulary: bool = False
    head: bool = False
    others_train: bool = False

    @property
    def group_shape(self) -> tuple[int, ...]:
        """Shape of the part of the weight that belongs to one group of the convolution."""
        shape = tuple(self.parameter.shape)
        return (shape[0] // self.groups, *shape[1:])

    @property
    def pattern_shape(self) -> tuple[tuple[int, ...], int]:
        """The shape that a pattern is asked about, and its reduction axis: a stack of matrices counts as ``[n, out, in]``."""
        shape = self.group_shape
        if len(shape) != 3 or not self.sites or any(site.op.startswith("conv") for site in self.sites):
            return shape, self.reduction_axis
        stacked = [axis for axis in (0, 1, 2) if axis != self.reduction_axis] + [self.reduction_axis]
        return tuple(shape[axis] for axis in stacked), 2

    @property
    def reduction_size(self) -> int:
        """How many input channels one output channel sums over."""
        return self.group_shape[self.reduction_axis]


@dataclass(frozen=True)
class Eligibility:
    """The rule. Each field relaxes or tightens one part of it.

    Attributes:
        multiple: the reduction-side channels of a group must be a multiple of this; 1 allows every layer.
        vocabulary_projections: allow Linear layers with as many outputs as an embedding has rows.
        language_model_heads: allow classification heads of models that read integers.
        frozen: allow weights with ``requires_grad=False`` in a model that trains others. They cannot recover.
    """

    multiple: int = 16
    vocabulary_projections: bool = False
    language_model_heads: bool = False
    frozen: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.multiple, int) or isinstance(self.multiple, bool) or self.multiple < 1:
            raise OptionError(f"Eligibility was given multiple={self.multiple!r}; expected an integer of at least 1")

    def refusal(self, layer: Candidate) -> str:
        """Why the layer stays dense, with the remedy; empty where it may be sparse."""
        return _dtype_refusal(layer) or _use_refusal(layer) or self._rule_refusal(layer)

    def _rule_refusal(self, layer: Candidate) -> str:
        if layer.embedded:
            return "is tied to an embedding, whose rows are looked up, not summed; untie it to make it sparse"
        if layer.vocabulary and not self.vocabulary_projections:
            return (
                f"is a vocabulary projection ({layer.parameter.shape[1 - layer.reduction_axis]} outputs, as many as an embedding "
                "has rows); Eligibility(vocabulary_projections=True) allows it"
            )
        if layer.head and not self.language_model_heads:
            return "is the classification head of a language model; Eligibility(language_model_heads=True) allows it"
        if layer.reduction_size % self.multiple:
            per_group = " per group" if layer.groups > 1 else ""
            return (
                f"{layer.reduction_size} input channels{per_group} is not a multiple of {self.multiple}; it stays dense "
                "(exclude it to silence this, or pass an Eligibility with another multiple)"
            )
        if not layer.parameter.requires_grad and layer.others_train and not self.frozen:
            return (
                "is frozen (requires_grad=False) while other weights train, and could not recover; "
                "Eligibility(frozen=True) allows it"
            )
        return ""


def _dtype_refusal(layer: Candidate) -> str:
    parameter = layer.parameter
    if isinstance(parameter, nn.UninitializedParameter):
        return "is uninitialised (a lazy layer); run the model once, then sparsify"
    if parameter.dtype.is_complex:
        return f"is complex ({parameter.dtype}); masks rank real weights"
    if not parameter.dtype.is_floating_point:
        return f"is quantised or integer ({parameter.dtype}); sparsify before quantising"
    if parameter.dtype.itemsize < 2:
        return f"is {parameter.dtype}, a format for storage that cannot be ranked; sparsify before converting"
    if parameter.layout != torch.strided:
        return f"has layout {parameter.layout}; expected a dense (strided) parameter"
    if type(parameter) is not nn.Parameter:
        return f"is a {type(parameter).__name__}, a tensor subclass that sparsefx does not know; sparsify before wrapping it"
    if parameter.numel() == 0:
        return "has no elements"
    return ""


def _use_refusal(layer: Candidate) -> str:
    for site in layer.sites:
        if site.problem:
            return f"{site.problem} (at {site})"
    axes = {site.reduction_axis: site for site in layer.sites if site.reduction_axis is not None}
    if len(axes) > 1:
        told = ", ".join(f"{site} along axis {axis}" for axis, site in axes.items())
        return f"is summed along different axes by its uses ({told}); a mask can follow one axis only"
    groups = {site.groups for site in layer.sites if site.reduction_axis is not None}
    if len(groups) > 1:
        return f"is read by convolutions with different groups ({', '.join(map(str, sorted(groups)))})"
    return ""
