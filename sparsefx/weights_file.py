"""Load a state_dict file into a model, and save one: whole or not at all."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from sparsefx.atomic_file import replace_file
from sparsefx.errors import OptionError

# Where training scripts put the weights among other things.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# What DistributedDataParallel and torch.compile put in front of every name.
_PREFIXES = ("module.", "_orig_mod.")


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load ``path`` into ``model``. Only tensors are read: no code of the file runs.

    Raises:
        OptionError: the file cannot be read, holds no state_dict, or does not fit the model, which then is as before.
    """
    name = os.fspath(path)
    found = read_weights(name)
    expected = model.state_dict()
    problems = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", expected.keys() - found.keys()),
            ("unexpected", found.keys() - expected.keys()),
            ("of another shape", {key for key in expected.keys() & found.keys() if _shape(expected[key]) != _shape(found[key])}),
        )
        if keys
    ]
    if problems:
        raise OptionError(f"{name} does not fit the model: {'; '.join(problems)}; pass the weights of this very architecture")
    model.load_state_dict(found)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's state_dict, as safetensors where the name ends so, else as torch.save does, through a temporary file.

    Raises:
        OptionError: the file cannot be written.
    """
    name = os.fspath(path)

    def write(file: Path) -> None:
        if name.endswith(".safetensors"):
            save_model(model, str(file))
        else:
            with file.open("wb") as stream:  # through which errors of the system come as they are
                torch.save(model.state_dict(), stream)

    replace_file(name, write)


def read_weights(name: str) -> dict[str, Any]:
    """The state_dict in a file, under the names of an unwrapped model. Raises OptionError as `load_weights` does."""
    found = _unwrapped(_read(name), name)
    for prefix in _PREFIXES:
        if found and all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return found


def _read(name: str) -> Any:
    try:
        if name.endswith(".safetensors"):
            # What sparsefx.save puts beside the weights is not part of a state_dict.
            return {key: value for key, value in load_file(name).items() if not key.startswith("sparsefx/")}
        return torch.load(name, map_location="cpu", weights_only=True)
    except OptionError:
        raise
    except FileNotFoundError:
        raise OptionError(f"there is no file {name}; expected a state_dict in .safetensors or .pt") from None
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OptionError(
            f"{name} cannot be read as a state_dict of tensors: {told}; save it with torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:
        # safetensors raises an error class of its own, derived from Exception alone.
        raise OptionError(f"{name} cannot be read as a state_dict of tensors: {error}; save model.state_dict() again") from error


def _unwrapped(content: Any, name: str) -> dict[str, Any]:
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise OptionError(f"{name} holds no state_dict; save it with torch.save(model.state_dict(), ...)")
    return {str(key): value for key, value in content.items()}


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else None
