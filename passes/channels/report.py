"""What pruning did to a model: widths, parameters and operations, and why channels had to stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

_SHOWN = 8


@dataclass(frozen=True)
class LayerWidths:
    """One weight of a linear layer or convolution.

    Attributes:
        weight: full name of the parameter; of a weight that is computed, the name of what its layer computes.
        inputs, outputs: channels before.
        inputs_after, outputs_after: channels that stay.
        outputs_needed: channels that would stay with ``multiple=1``.
        empty: outputs whose weights were all zero before.
        folded: constant inputs that went into a bias, a running mean or another channel.
        operations, operations_after: multiply-adds of all calls in one forward pass of the example inputs in eval mode; in train
            mode, of weights that eval mode does not read.
        pinned: why some of its outputs have to stay whoever reads them; empty where nothing but readers keeps them.
        coupled: why empty outputs stay that nothing pins: who reads what they go with, or what has to be equally large.
    """

    weight: str
    inputs: int
    outputs: int
    inputs_after: int
    outputs_after: int
    outputs_needed: int
    empty: int
    folded: int
    operations: int
    operations_after: int
    pinned: str = ""
    coupled: str = ""

    @property
    def why(self) -> str:
        """Why empty outputs stay; no text where all of them go."""
        return "; ".join(filter(None, (self.pinned, self.coupled))) if self.empty else ""


@dataclass(frozen=True)
class PruningReport:
    """The result of `sparsefx.prune_channels` in numbers.

    Attributes:
        layers: one row for each weight, in order of execution.
        parameters, parameters_after: values in all parameters of the model.
        operations, operations_after: multiply-adds of linear layers and convolutions in one forward pass of the example inputs,
            as in the rows.
        new_biases: biases that were added, with their length.
        moved: parameters and buffers that constants were folded into.
        refused: groups of channels that the model's own code holds the number of, with what happened without them.
        multiple: the step that widths were rounded up to.
        difference: largest difference of an output in float64 between the model before and after, relative to that output's
            largest value; None where it was not compared yet.
        operations_nonzero: of the multiply-adds before, those by weights other than zero.
        unread: layers with parameters that no run of the example inputs reads, in eval mode or in train mode: they were not cut
            along, and may not fit any more what they read.
    """

    layers: tuple[LayerWidths, ...]
    parameters: int
    parameters_after: int
    operations: int
    operations_after: int
    new_biases: Mapping[str, int]
    moved: tuple[str, ...]
    refused: tuple[str, ...]
    multiple: int
    difference: float | None = None
    operations_nonzero: int = 0
    unread: tuple[str, ...] = ()

    @property
    def density_bound(self) -> float:
        """The speed-up if multiplying by zero cost nothing: multiply-adds over those by weights other than zero.

        The estimate of Dettmers and Zettlemoyer ("Sparse Networks from Scratch", 2019) for sparse convolutions.
        """
        return _ratio(self.operations, self.operations_nonzero)

    @property
    def empty_bound(self) -> float:
        """The speed-up if each layer took time in proportion to its outputs that are not empty; their estimate for dense
        convolutions."""
        return _ratio(self.operations, sum(row.operations * (1 - row.empty / row.outputs) for row in self.layers if row.outputs))

    @property
    def operations_bound(self) -> float:
        """Multiply-adds before over those after."""
        return _ratio(self.operations, self.operations_after)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PruningReport:
        """The report that `as_dict` described."""
        rows = tuple(LayerWidths(**row) for row in data["layers"])
        lists = {name: tuple(data.get(name, ())) for name in ("moved", "refused", "unread")}
        return PruningReport(**{**data, **lists, "layers": rows})

    def __rich__(self) -> Table:
        """A table for the terminal."""
        table = Table(title=self.summary(), title_justify="left", caption="\n".join(self.notes()) or None, caption_justify="left")
        for name, justify in (
            ("weight", "left"),
            ("inputs", "right"),
            ("outputs", "right"),
            ("needed", "right"),
            ("empty", "right"),
        ):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        table.add_column("multiply-adds", justify="right")
        table.add_column("why channels stay")
        for row in self.layers:
            table.add_row(
                row.weight,
                _change(row.inputs, row.inputs_after),
                _change(row.outputs, row.outputs_after),
                str(row.outputs_needed),
                str(row.empty) if row.empty else "",
                _change(row.operations, row.operations_after),
                row.why,
            )
        return table

    def summary(self) -> str:
        """One line: parameters and multiply-adds before and after."""
        compared = (
            "" if self.difference is None else f"; outputs differ by {self.difference:.1e} of their largest value in float64"
        )
        return (
            f"parameters {_change(self.parameters, self.parameters_after)} ({_share(self.parameters, self.parameters_after)}), "
            f"multiply-adds {_change(self.operations, self.operations_after)} "
            f"({_share(self.operations, self.operations_after)}), widths in steps of {self.multiple}{compared}"
        )

    def notes(self) -> list[str]:
        """What stands in no row, a line each: biases that were added, what stays whole, and what was not run."""
        notes = [f"bias added: {name} [{length}]" for name, length in self.new_biases.items()]
        notes += [f"stays whole: {told}" for told in self.refused]
        if self.unread:
            more = f" and {len(self.unread) - _SHOWN} more" if len(self.unread) > _SHOWN else ""
            notes.append(f"not run by the example inputs, and not cut along: {', '.join(self.unread[:_SHOWN])}{more}")
        return notes

    def __str__(self) -> str:
        console = Console(width=160, no_color=True, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


def _ratio(before: float, after: float) -> float:
    return before / after if after else 1.0


def _share(before: int, after: int) -> str:
    return f"{after / before:.3f}" if before else "1.000"
