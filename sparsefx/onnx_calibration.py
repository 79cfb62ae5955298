"""Calibration batches for an ONNX file, read from numpy files as the command line names them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparsefx.errors import OptionError
from sparsefx.passes.onnx_read import read_onnx

Arrays = dict[str, np.ndarray[Any, Any]]
_ENDINGS = (".npy", ".npz")


def read_calibration(path: Path, model: Path, *, batch: int = 32) -> list[Arrays]:
    """The batches that a file or folder holds, by the names of the model's inputs.

    Args:
        path: an .npz file with an array for each input by its name, or an .npy file where the model has one input; or a folder of
            such files, in the order of their names. The first axis of every array counts the samples.
        model: the ONNX file to calibrate.
        batch: samples at a time; a model with a batch of its own gets that many, and samples that do not fill one are left out.

    Raises:
        OptionError: a file cannot be read, arrays are missing or do not fit the inputs, or there are too few samples.
        ExportError: the model cannot be read.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise OptionError(f"batch={batch!r} was given; expected a whole number of at least 1")
    graph = read_onnx(model)[0].graph
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    own = {size for value in inputs if (size := _fixed_batch(value)) is not None}
    if len(own) > 1:
        raise OptionError(f"the inputs of {model} have first axes of {', '.join(map(str, sorted(own)))}; calibrate from Python")
    fixed = own.pop() if own else None
    size = batch if fixed is None else fixed
    batches: list[Arrays] = []
    count = 0
    for file in _files(path):
        arrays = _arrays(file, inputs)
        samples = min(len(array) for array in arrays.values())
        count += samples
        for start in range(0, samples, size):
            part = {name: np.ascontiguousarray(array[start : start + size]) for name, array in arrays.items()}
            if fixed is None or start + size <= samples:
                batches.append(part)
    if not batches:
        raise OptionError(f"{path} holds {count} samples, and the batch of {model} is {size}; give more")
    return batches


def _fixed_batch(value: ir.Value) -> int | None:
    """The size of the input's first axis, where the file states one."""
    first = value.shape[0] if value.shape is not None and len(value.shape) else None
    return first if isinstance(first, int) else None


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise OptionError(f"there is no {path}; expected an .npz or .npy file, or a folder of them")
    found = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS) if path.is_dir() else [path]
    if not found or any(file.suffix not in _ENDINGS for file in found):
        raise OptionError(f"{path} was given as calibration data; expected an .npz or .npy file, or a folder of them")
    return found


def _arrays(file: Path, inputs: list[ir.Value]) -> Arrays:
    """The arrays of one file by input name, in the inputs' types."""
    names = [value.name or "" for value in inputs]
    try:
        content = dict(_content(file, names))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OptionError(f"{file} cannot be read as numpy arrays: {told}; write it with numpy.save or numpy.savez") from error
    missing = [name for name in names if name not in content]
    if missing:
        held = ", ".join(content) or "nothing"
        raise OptionError(f"{file} has no array {missing[0]!r} (it holds {held}); the inputs of the model are {', '.join(names)}")
    arrays = {value.name or "": _fitting(file, value, content[value.name or ""]) for value in inputs}
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise OptionError(f"the arrays of {file} hold different numbers of samples: {sizes}; the first axis has to be the same")
    return arrays


def _content(file: Path, names: list[str]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    if file.suffix == ".npy":
        if len(names) != 1:
            raise ValueError(f"an .npy file is for one input, and the model has {', '.join(names)}: use .npz")
        yield names[0], np.load(file, mmap_mode="r", allow_pickle=False)
        return
    with file.open("rb") as stream:  # which numpy would leave open where it is no archive
        archive = np.load(stream, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array, not an archive of them: name it .npy")
        for name in archive.files:
            yield name, archive[name]


def _fitting(file: Path, value: ir.Value, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shape = [size if isinstance(size, int) else None for size in value.shape] if value.shape is not None else None
    fits = array.ndim > 0 and (
        shape is None
        or (array.ndim == len(shape) and all(b is None or a == b for a, b in zip(array.shape[1:], shape[1:], strict=True)))
    )
    if not fits:
        wanted = "x".join("?" if size is None else str(size) for size in shape or [])
        raise OptionError(f"{file}: {value.name!r} has shape {array.shape}; expected samples of the model's input, {wanted}")
    wanted_type = array.dtype if value.dtype is None else np.dtype(value.dtype.numpy())
    if array.dtype.kind != wanted_type.kind:
        raise OptionError(
            f"{file}: {value.name!r} is {array.dtype}, and the model takes {wanted_type}; prepare the data as for the model"
        )
    return array.astype(wanted_type, copy=False)
