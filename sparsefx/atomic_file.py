"""Write a file whole or not at all, also where the process is killed in between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparsefx.errors import OptionError, SparsefxError

fcntl: Any
try:
    import fcntl
except ModuleNotFoundError:  # on Windows, where processes that write one path at the same time are not kept apart
    fcntl = None


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file in a temporary folder beside ``path``, synchronise it with the disk, and rename it to ``path``.

    Whoever opens ``path`` sees the file of before or the whole new one. The folder has one fixed name, ``.NAME.part``, and is
    emptied first: a run that is killed again and again leaves one unfinished file behind, not many. Processes that write the
    same path at the same time do so in turn.

    Raises:
        OptionError: no file can be written at ``path``; one that was there is as before.
    """
    target = check_place(path)
    folder = target.with_name(f".{target.name}.part")
    try:
        lock = _locked(folder)
        try:
            for left in folder.iterdir():
                left.unlink()
            made = folder / target.name
            _write(made, write)
            _give_permissions(made, target)
            _synchronise(made)
            os.replace(made, target)
            _synchronise(target.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    except OSError as error:
        raise OptionError(
            f"{target} cannot be written: {error.strerror or error}; free some space or choose another path"
        ) from error


def _write(made: Path, write: Callable[[Path], None]) -> None:
    try:
        write(made)
    except SparsefxError:
        raise
    except (RuntimeError, SafetensorError) as error:
        # torch and safetensors wrap what the system says in errors of their own.
        told = str(error).strip().splitlines()
        raise OSError(told[0][:200] if told else type(error).__name__) from error


def check_place(path: str | os.PathLike[str]) -> Path:
    """The file that ``path`` names, links followed. Raises OptionError where it names a folder, or one that does not exist."""
    try:
        target = Path(os.path.realpath(path))
        is_directory = target.is_dir()
        is_other = not is_directory and target.exists() and not target.is_file()
    except (TypeError, ValueError, OSError) as error:
        raise OptionError(f"path={path!r} was given; expected the path of the file to write, as text") from error
    if is_directory:
        raise OptionError(f"{target}: this is a directory; give the path of the file to write")
    if is_other:
        raise OptionError(f"{target}: this is no ordinary file, and writing it would put one in its place; choose another path")
    if not target.parent.is_dir():
        raise OptionError(f"{target}: the directory {target.parent} does not exist; create it first")
    return target


def _locked(folder: Path) -> int | None:
    """Make the folder and hold a lock on it, which ends with the process however that ends."""
    while True:
        folder.mkdir(exist_ok=True)
        if fcntl is None:
            return None
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            # Whoever held the lock before has removed the folder: then this is a dead one, and ours is yet to be made.
            if folder.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _give_permissions(made: Path, target: Path) -> None:
    """Those of the file that is replaced, or of any new file."""
    if target.exists():
        shutil.copymode(target, made)
        return
    ordinary = made.with_name("permissions")
    ordinary.touch()
    shutil.copymode(ordinary, made)


def _synchronise(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
