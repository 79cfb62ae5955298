"""The Program: what capture found out about a model, and the graphs that passes read and rewrite.

A Program stands beside the model and holds the model's very own Parameter objects. It is immutable: a pass that changes a
graph works on a copy of it and returns a new Program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum

from torch import fx, nn

from sparsefx.errors import CaptureError


class Stage(Enum):
    """What has been done to a Program; `sparsefx.verify` states what holds at each stage."""

    CAPTURED = "CAPTURED"
    MASKED = "MASKED"
    FINALIZED = "FINALIZED"


class Rung(IntEnum):
    """The step of the capture ladder that saw a use of a parameter."""

    EXPORT = 1
    """torch.export of the whole model: every use is known, and all shapes."""
    OBSERVED = 2
    """One observed run: every use of that run is known, and its shapes."""
    TRACED = 3
    """torch.fx without inputs: uses in the traced parts are known, no shapes."""
    MODULE = 4
    """The layer module alone, taken by its type."""


@dataclass(frozen=True)
class CallSite:
    """One use of a parameter.

    Attributes:
        parameter: full name of the parameter (the first one, where it has several).
        op: what reads it: ``linear``, ``conv2d``, ``conv_transpose2d``, ``matmul``, ``lstm``, ``embedding``, ``add``, ...
        where: path of the module that calls the op, or that owns the parameter where the caller is unknown.
        rung: how the use was seen.
        reduction_axis: axis of the *parameter* along which the op sums; None where it does not multiply by the
            parameter, or sums over something that is not one whole axis of it.
        groups: of a convolution, else 1.
        flops: floating point operations of this call (two per multiply-add); None without shapes.
        problem: why a mask on the parameter would not make this use sparse; empty where it would.
    """

    parameter: str
    op: str
    where: str
    rung: Rung
    reduction_axis: int | None = None
    groups: int = 1
    flops: int | None = None
    problem: str = ""

    @property
    def multiplies(self) -> bool:
        """Whether this is a linear, convolution or matrix product that reads the parameter as its weight."""
        return self.reduction_axis is not None

    def __str__(self) -> str:
        return f"{self.where or '<root>'}: {self.op}"


@dataclass(frozen=True)
class Program:
    """A captured model.

    Attributes:
        model: the user's module, untouched.
        stage: what passes have done so far.
        graphs: fx GraphModules over the model's own Parameters by module path; ``""`` is the whole model. Where
            the whole could not be captured, the largest parts that could.
        call_sites: every use that was seen, by full parameter name, in order of execution.
        aliases: every full name of each parameter, by its first name.
        resisted: why higher rungs of the ladder were not reached, in words.
        complete: whether every use of every parameter in a forward pass is in ``call_sites``.
        reads_tokens: whether an integer input reaches an embedding; None where there is no graph with dtypes.
        heads: where it does, parameters whose products reach the model's output through no further layer.
        vocabularies: parameters of the embeddings that an integer input indexes; None where there is no graph with dtypes.
        finals: parameters behind whose products no further layer stands, whatever else does; None where there is no graph.
        history: names of the passes that made this Program, first to last.
    """

    model: nn.Module
    stage: Stage
    graphs: Mapping[str, fx.GraphModule]
    call_sites: Mapping[str, tuple[CallSite, ...]]
    aliases: Mapping[str, tuple[str, ...]]
    resisted: tuple[str, ...] = ()
    complete: bool = False
    reads_tokens: bool | None = None
    heads: frozenset[str] = frozenset()
    finals: frozenset[str] | None = None
    vocabularies: frozenset[str] | None = None
    history: tuple[str, ...] = ("capture",)

    @property
    def whole(self) -> fx.GraphModule:
        """The graph of the whole model. Raises CaptureError, with the reasons, where there is none."""
        if "" in self.graphs:
            return self.graphs[""]
        reasons = "; ".join(self.resisted) or "no rung of the ladder reached it"
        raise CaptureError(
            f"{type(self.model).__name__} cannot be captured as one graph: {reasons}. "
            "Pass example_inputs that the model runs on, or take the graph of a submodule"
        )


def parameter_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every full name of each parameter, by the first one; parameters shared between modules have several."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return {name: tuple(all_names) for name, all_names in names.items()}
