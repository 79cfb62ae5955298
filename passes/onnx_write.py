"""Write an ONNX file so that it appears whole and checked, or not at all."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from sparsefx.errors import ExportError

# Protobuf refuses messages of 2 GiB; the graph itself needs a little of that.
LARGEST_SINGLE_FILE = 2**31 - 2**24
_LONGEST_PREFIX = 48  # characters of the name that a temporary folder repeats
_LARGEST_INSIDE = 256  # bytes of a tensor that stays in the graph where the others stand beside it


def tensor_bytes(model: ir.Model) -> int:
    """Size of all initializers in bytes."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def destination_of(path: object) -> Path:
    """``path`` as a Path. Raises ExportError where it cannot name a file."""
    try:
        destination = Path(path)  # type: ignore[arg-type]
        os.stat(destination)
    except (TypeError, ValueError) as error:
        raise ExportError(f"path={path!r} was given; expected the path of the file to write, as text") from error
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ExportError(f"{str(path)[:80]}: no file can have this path: {error.strerror}; choose another path") from error
    return destination


def check_destination(path: Path) -> Path:
    """The file that ``path`` names, links followed, in an existing writable directory; else an ExportError."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ExportError(f"{path}: this is a directory; give the path of the file to write, such as {path / 'model.onnx'}")
    if target.exists() and not target.is_file():
        raise ExportError(f"{path}: this is no ordinary file, and writing it would put one in its place; choose another path")
    if not target.parent.is_dir():
        raise ExportError(f"{path}: the directory {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise ExportError(f"{path}: there is no permission to write here; choose another path")
    return target


def temporary_prefix(target: Path) -> str:
    """How a temporary folder beside a file is called: after it, but no longer than a system allows where that is at the limit."""
    return f".{target.name[:_LONGEST_PREFIX]}."


def write_checked(model: ir.Model, path: Path, check: Callable[[Path], None]) -> int:
    """Write ``model``, run ``check`` on the written file, and only then put it in place of ``path``.

    The file is written and synchronised in a temporary directory beside ``path``, which is removed whatever happens,
    so that an earlier file at ``path`` stays as it was until the new one takes its place in one step. Above
    `LARGEST_SINGLE_FILE` the weights go to a second file, whose name holds a hash of its content: data of the same name
    either holds the same bytes and stays, or is damaged and is replaced.

    Returns:
        Bytes written, external data included.

    Raises:
        ExportError: the file could not be written (no space, no permission), or ``check`` refused it.
    """
    target = check_destination(path)
    directory: Path | None = None
    placed: Path | None = None
    damaged: Path | None = None
    try:
        directory = Path(tempfile.mkdtemp(prefix=temporary_prefix(target), dir=target.parent))
        # A directory made by mkdtemp is private; the file in it gets the user's own default permissions.
        temporary = directory / target.name
        data = _write(model, temporary, external=tensor_bytes(model) > LARGEST_SINGLE_FILE)
        size = temporary.stat().st_size + (data.stat().st_size if data is not None else 0)
        check(temporary)
        if target.exists():
            shutil.copymode(target, temporary)
        if data is not None:
            final = target.parent / data.name
            if not _same_content(data, final):
                if final.is_symlink() or final.is_file():
                    damaged = directory / "damaged.data"
                    shutil.copy2(final, damaged, follow_symlinks=False)
                os.replace(data, final)
                placed = final
        os.replace(temporary, target)
        placed = None
        _synchronise(target.parent)
        return size
    except OSError as error:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "choose another path"
        raise ExportError(
            f"{path}: the file could not be written: {error.strerror or error}; {remedy} and export again"
        ) from error
    finally:
        if placed is not None and damaged is not None:
            os.replace(damaged, placed)
        elif placed is not None:
            placed.unlink(missing_ok=True)
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


def _same_content(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _write(model: ir.Model, temporary: Path, *, external: bool) -> Path | None:
    """Write the model, and beside it, if asked, its data; both are on the disk on return."""
    if not external:
        content = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return None
    written = temporary.with_suffix(".data")
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    tensors = [value.const_value for value in values]
    try:
        ir.external_data.unload_from_model(model, written.parent, written.name, size_threshold_bytes=_LARGEST_INSIDE)
        data = written.with_name(f"{written.stem}-{_digest(written)[:12]}.data")
        os.replace(written, data)
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = _at(data, value.const_value, tensor)
        _write(model, temporary, external=False)
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor
    with data.open("rb") as file:
        os.fsync(file.fileno())
    return data


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _at(data: Path, stored: ir.TensorProtocol | None, tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    """What was stored in a file beside the graph, in the file's last place, with what the tensor says of itself."""
    if tensor is None or not isinstance(stored, ir.ExternalTensor):
        return stored
    return ir.ExternalTensor(
        data.name,
        stored.offset,
        stored.length,
        stored.dtype,
        shape=stored.shape,
        name=stored.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
        base_dir=data.parent,
    )


def _synchronise(directory: Path) -> None:
    """Make the rename itself durable where the file system can."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
