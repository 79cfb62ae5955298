"""TensorRT's own word on an ONNX file: the trtexec command that asks for it, and what its log says of each weight.

No TensorRT was run here. The lines are those that its builder is known to write, of version 8 and of version 10:
``(Sparsity) Layers eligible for sparse math: a, b`` with ``(Sparsity) TRT inference plan picked sparse implementation for layers:
a``, and ``(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b`` with ``(Sparsity) Chose 1 layer(s) using sparse
tactics: a``, whose names may be left out.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from sparsefx.errors import ExportError, OptionError
from sparsefx.onnx_audit import OnnxWeight

# What a size that the file leaves open becomes: the batch, and any other.
_ASSUMED_BATCH, _ASSUMED_SIZE = 8, 128
_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Layers eligible for sparse math|Found (\d+) layer\(s\) eligible to use sparse tactics):?(.*)"
)
_PICKED = re.compile(
    r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers"
    r"|Chose (\d+) layer\(s\) using sparse tactics):?(.*)"
)
# Layers that were fused are written as "a + b", "a || b" or "PWN(a, b)".
_JOINTS = re.compile(r"\s+(?:\+|\|\|)\s+")
_SEPARATORS = re.compile(r"\s*(?:,|\+|\|\||\(|\)|\{|\}|\[|\])\s*")


@dataclass(frozen=True)
class SparsityLog:
    """What a log of trtexec says. Where a build chose tactics several times, the last lines count.

    Attributes:
        eligible: ONNX nodes inside eligible layers; None where the log gives a number only.
        picked: likewise, of the layers that run sparse.
        eligible_layers: how many layers were eligible; layers may hold several nodes.
        picked_layers: how many run sparse.
    """

    eligible: frozenset[str] | None
    picked: frozenset[str] | None
    eligible_layers: int
    picked_layers: int

    def verdict(self, weight: OnnxWeight) -> str:
        """``picked``, ``eligible``, ``not eligible``, or ``unknown`` where the log cannot tell for this node."""
        if weight.node and self.picked is not None and weight.node in self.picked:
            return "picked"
        if not weight.node or self.eligible is None:
            return "unknown" if self.eligible_layers or not weight.node else "not eligible"
        if weight.node in self.eligible:
            return "eligible" if self.picked is not None else "eligible, perhaps picked"
        return "not eligible"


def read_log(path: str | os.PathLike[str]) -> SparsityLog:
    """The sparsity lines of a log that ``trtexec --verbose`` wrote.

    Raises:
        OptionError: the file cannot be read, or has no such lines.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OptionError(
            f"{path}: the log could not be read: {error.strerror or error}; give the file that trtexec's output went to"
        ) from error
    eligible, picked = _ELIGIBLE.findall(text), _PICKED.findall(text)
    if not eligible or not picked:
        raise OptionError(
            f"{path}: there is no line of TensorRT on sparsity in it; run trtexec with --sparsity=enable --verbose and keep its "
            f"whole output"
        )
    found, chosen = _layers(*eligible[-1]), _layers(*picked[-1])
    return SparsityLog(found[0], chosen[0], found[1], chosen[1])


def _layers(count: str, names: str) -> tuple[frozenset[str] | None, int]:
    """The nodes inside the layers of one line, and how many layers there are."""
    layers = [layer for layer in re.split(r",\s+(?![^(\[]*[)\]])", names.strip()) if layer]
    number = int(count) if count else len(layers)
    if number and not layers:
        return None, number
    # A node's own name may hold brackets, so the parts of a layer count as they are, too.
    parts = [part for layer in layers for separators in (_JOINTS, _SEPARATORS) for part in separators.split(layer)]
    return frozenset(filter(None, parts)), number


def trtexec_command(path: str | os.PathLike[str], weights: Sequence[OnnxWeight]) -> str:
    """The command that builds the file with sparse kernels allowed and keeps the log for ``--trtexec-log``.

    A file with compact weights is densified first. Precisions follow from the weights' types. Sizes that the file leaves open
    are assumed, 8 for the first axis and 128 for others: put yours in their place.

    Raises:
        ExportError: the file cannot be read.
    """
    try:
        graph = onnx.load(path, format="protobuf", load_external_data=False).graph
    except Exception as error:  # protobuf's own errors share no base class that is public
        raise ExportError(f"{path}: the file could not be read ({type(error).__name__}); export it again") from error
    dtypes = {weight.dtype for weight in weights}
    flags = [flag for flag, wanted in (("--int8", "int8" in dtypes), ("--bf16", "bfloat16" in dtypes)) if wanted]
    if "bfloat16" not in dtypes:
        flags.append("--fp16")
    constants = {tensor.name for tensor in graph.initializer}
    smallest: list[str] = []
    best: list[str] = []
    for value in graph.input:
        sizes = value.type.tensor_type.shape.dim
        if value.name in constants or all(size.dim_value for size in sizes):
            continue
        for target, assumed in ((smallest, (1, 1)), (best, (_ASSUMED_BATCH, _ASSUMED_SIZE))):
            text = "x".join(str(size.dim_value or assumed[axis > 0]) for axis, size in enumerate(sizes))
            target.append(f"{value.name}:{text}")
    if best:
        flags += [f"--minShapes={','.join(smallest)}", f"--optShapes={','.join(best)}", f"--maxShapes={','.join(best)}"]
    file, first = Path(path), ""
    if any(weight.encoding == "compact" for weight in weights):
        plain = file.with_suffix(".plain.onnx")
        first = f"{shlex.join(['sparsefx', 'densify', str(file), '--out', str(plain)])} && "
        file = plain
    arguments = ["trtexec", f"--onnx={file}", "--sparsity=enable", *flags, "--verbose"]
    return f"{first}{shlex.join(arguments)} > {shlex.quote(file.stem + '.trtexec.log')} 2>&1"
