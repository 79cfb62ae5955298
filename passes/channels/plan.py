"""What is cut from a model, as plain data: it can be saved, loaded and carried out on another model of the same architecture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsefx.atomic_file import replace_file
from sparsefx.errors import OptionError
from sparsefx.passes.channels.report import PruningReport

_FORMAT = 1


@dataclass(frozen=True)
class Attribute:
    """A number of channels that a module holds: ``out_channels``, ``num_features``, ``groups``, ``num_heads``, ..."""

    module: str
    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class ChannelPlan:
    """Which channels of a model stay, and where the constants of the others go.

    Attributes:
        kept: by parameter or buffer (first name) and axis: indices that stay, int64, rising. Shape [n]; for the input axis of a
            grouped convolution [groups that stay, n], within each group.
        shapes: shape before, of everything in ``kept``.
        new_biases: biases that have to be added, with their length after the cut.
        moved: by parameter or buffer: flat positions in the tensor after the cut, and what is added there in float64.
        attributes: numbers that modules hold.
        report: widths, parameters and operations before and after.
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    new_biases: Mapping[str, int]
    moved: Mapping[str, tuple[Tensor, Tensor]]
    attributes: tuple[Attribute, ...]
    report: PruningReport = field(repr=False)

    @property
    def empty(self) -> bool:
        """Whether nothing is cut."""
        return not self.kept

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a safetensors file, through a temporary one beside it.

        Raises:
            OptionError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for name, axes in self.kept.items():
            for axis, indices in axes.items():
                tensors[f"kept/{axis}/{name}"] = indices.contiguous()
        for name, (positions, values) in self.moved.items():
            tensors[f"positions/{name}"] = positions.contiguous()
            tensors[f"values/{name}"] = values.contiguous()
        described = {
            "format": _FORMAT,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "new_biases": dict(self.new_biases),
            "attributes": [asdict(attribute) for attribute in self.attributes],
            "report": self.report.as_dict(),
        }
        metadata = {"sparsefx_channel_plan": json.dumps(described)}
        replace_file(path, lambda file: save_file(tensors or {"nothing": torch.zeros(1)}, file, metadata=metadata))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> ChannelPlan:
        """Read a plan that `save` wrote.

        Raises:
            OptionError: there is no such file, or it holds no plan.
        """
        name = os.fspath(path)
        try:
            with safe_open(name, framework="pt") as file:
                described = json.loads((file.metadata() or {})["sparsefx_channel_plan"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except FileNotFoundError:
            raise OptionError(f"there is no file {name}; expected a plan that ChannelPlan.save wrote") from None
        except Exception as error:
            # safetensors raises an error class of its own, derived from Exception alone.
            raise OptionError(f"{name} holds no channel plan ({error}); expected a file that ChannelPlan.save wrote") from error
        if described.get("format") != _FORMAT:
            raise OptionError(f"{name} holds a plan of format {described.get('format')}; this version reads {_FORMAT}")
        kept: dict[str, dict[int, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("kept/"):
                _, axis, parameter = key.split("/", 2)
                kept.setdefault(parameter, {})[int(axis)] = tensor
        moved = {
            key.removeprefix("positions/"): (tensor, tensors["values/" + key.removeprefix("positions/")])
            for key, tensor in tensors.items()
            if key.startswith("positions/")
        }
        return ChannelPlan(
            kept=kept,
            shapes={name: tuple(shape) for name, shape in described["shapes"].items()},
            new_biases=described["new_biases"],
            moved=moved,
            attributes=tuple(Attribute(**{**one, **_tuples(one)}) for one in described["attributes"]),
            report=PruningReport.from_dict(described["report"]),
        )


def _tuples(attribute: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) for key, value in attribute.items() if isinstance(value, list)}
