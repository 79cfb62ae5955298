"""Models by name: what ``sparsefx audit`` and ``sparsefx export`` take as their target.

Nothing is downloaded: models come with random weights, from the code of the installed library or from a configuration
file. Models too large to hold comfortably are built on the meta device, which is enough for an audit.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sparsefx.errors import OptionError
from sparsefx.targets_inputs import timm_inputs, torchvision_inputs, transformers_inputs

FORMS = "torchvision:resnet50, timm:NAME, transformers:TYPE|CLASS|config.json, package.module:callable or file.onnx"
# Above this many parameters an audit builds a model on the meta device: shapes are all it needs.
_PARAMETERS_BUILT_FOR_REAL = 300_000_000


@dataclass(frozen=True)
class Target:
    """A model and inputs to run it on.

    Attributes:
        name: as the user wrote it.
        model: in eval mode.
        example_inputs: a tuple of arguments or a dict of keyword arguments; None where none could be made.
        inputs_given: True where the inputs are the user's own, False where they were made up from the model.
    """

    name: str
    model: nn.Module
    example_inputs: Any
    inputs_given: bool


def load_target(text: str, *, batch: int = 1, weights_needed: bool = False) -> Target:
    """Build the model that ``text`` names.

    Args:
        text: one of the forms in `FORMS`, but an ONNX file.
        batch: batch size of inputs that are made up.
        weights_needed: False allows the meta device for large models.

    Raises:
        OptionError: no such form, library, name or callable, or the callable returns no model.
    """
    source, colon, name = text.partition(":")
    if not colon or not name or not source:
        raise OptionError(f"target {text!r} was given; expected {FORMS}")
    if source == "torchvision":
        build, make_inputs = _torchvision(name)
    elif source == "timm":
        build, make_inputs = _timm(name)
    elif source == "transformers":
        build, make_inputs = _transformers(name)
    else:
        return _own(text, source, name)
    with warnings.catch_warnings():
        # Libraries warn about weights that are not loaded and about changes to come in their own defaults.
        warnings.simplefilter("ignore")
        model = _build(build, weights_needed).eval()
        inputs = make_inputs(model, batch)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        inputs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
    return Target(text, model, inputs, inputs_given=False)


Builder = Callable[[], nn.Module]
InputMaker = Callable[[nn.Module, int], Any]


def _build(build: Builder, weights_needed: bool) -> nn.Module:
    if not weights_needed:
        try:
            with torch.device("meta"):
                model = build()
            if sum(parameter.numel() for parameter in model.parameters()) > _PARAMETERS_BUILT_FOR_REAL:
                return model
        except (RuntimeError, TypeError, ValueError):
            # Some constructors read values back, which the meta device cannot do.
            pass
    return build()


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != name:
            raise
        raise OptionError(f"{name} is not installed; install it with: pip install 'sparsefx[zoo]'") from None


def _unknown(kind: str, name: str, known: Iterable[str]) -> OptionError:
    known = list(known)
    exact = {candidate.lower(): candidate for candidate in known}
    near = [exact[match] for match in difflib.get_close_matches(name.lower(), exact, n=4, cutoff=0.6)]
    near = near or [candidate for candidate in known if name.lower() in candidate.lower()][:4]
    hint = f"did you mean {', '.join(near)}?" if near else f"for example {', '.join(known[:4])}"
    return OptionError(f"{kind} {name!r} is not known; {hint}")


def _torchvision(name: str) -> tuple[Builder, InputMaker]:
    models = _library("torchvision").models
    names = models.list_models()
    if name not in names:
        raise _unknown("torchvision model", name, names)
    builder = models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    options = {option: None for option in ("weights", "weights_backbone") if option in accepted}
    return lambda: builder(**options), lambda model, batch: torchvision_inputs(name, builder.__module__, model, batch)


def _timm(name: str) -> tuple[Builder, InputMaker]:
    timm = _library("timm")
    if not timm.is_model(name):
        raise _unknown("timm model", name, timm.list_models())
    return lambda: timm.create_model(name, pretrained=False), timm_inputs


def _transformers(name: str) -> tuple[Builder, InputMaker]:
    transformers = _library("transformers")
    if name.endswith(".json") or os.path.isdir(name) or os.sep in name:
        return _from_config_file(transformers, name)
    if name in transformers.CONFIG_MAPPING:
        config = _quiet_config(transformers.AutoConfig.for_model(name))
        return lambda: _from_config(transformers, config, None), transformers_inputs
    candidate = getattr(transformers, name, None) if name[:1].isupper() else None
    config_class: Any = getattr(candidate, "config_class", None)
    if isinstance(candidate, type) and issubclass(candidate, nn.Module) and config_class is not None:
        own = _quiet_config(config_class())
        return lambda: candidate(own), transformers_inputs
    known = [*transformers.CONFIG_MAPPING, *(entry for entry in dir(transformers) if "For" in entry or entry.endswith("Model"))]
    raise _unknown("transformers model type or class", name, known)


def _from_config_file(transformers: ModuleType, path: str) -> tuple[Builder, InputMaker]:
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError) as error:
        raise OptionError(f"{file} cannot be read as a transformers config.json: {error}") from None
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type not in transformers.CONFIG_MAPPING:
        raise OptionError(f"{file} has model_type {model_type!r}; expected one that the installed transformers knows")
    fields = {key: value for key, value in content.items() if key != "model_type"}
    config = _quiet_config(transformers.AutoConfig.for_model(model_type, **fields))
    architecture = (content.get("architectures") or [None])[0]
    return lambda: _from_config(transformers, config, architecture), transformers_inputs


def _from_config(transformers: ModuleType, config: Any, architecture: str | None) -> nn.Module:
    named = getattr(transformers, architecture, None) if architecture else None
    model: nn.Module
    if isinstance(named, type) and issubclass(named, nn.Module):
        model = named(config)
    else:
        try:
            model = transformers.AutoModel.from_config(config)
        except ValueError:
            raise OptionError(
                f"transformers has no base model for {type(config).__name__}; name a class, such as "
                f"{type(config).__name__.removesuffix('Config')}ForCausalLM"
            ) from None
    return model


def _quiet_config(config: Any) -> Any:
    """One forward pass as in training: no cache of keys and values among the outputs."""
    if getattr(config, "use_cache", None):
        config.use_cache = False
    return config


def _own(text: str, module_name: str, path: str) -> Target:
    """A callable of the user's: it returns a model, or a model and its example inputs."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise OptionError(f"{module_name} cannot be imported: {error}") from error
        raise OptionError(f"there is no module {error.name!r} for target {text!r}; expected {FORMS}") from None
    for part in path.split("."):
        if not hasattr(found, part):
            public = [entry for entry in dir(found) if not entry.startswith("_") and callable(getattr(found, entry))]
            raise _unknown(f"{module_name}'s callable", part, public or ["none: it has no public callable"])
        found = getattr(found, part)
    made = found if isinstance(found, nn.Module) else _call(text, found)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise OptionError(f"{text} gave a {type(model).__name__}; expected a torch.nn.Module, or (model, example_inputs)")
    return Target(text, model.eval(), inputs, inputs_given=inputs is not None)


def _call(text: str, found: Any) -> Any:
    if not callable(found):
        raise OptionError(f"{text} is a {type(found).__name__}; expected a callable that returns a torch.nn.Module")
    try:
        return found()
    except Exception as error:
        raise OptionError(f"{text}() failed with {type(error).__name__}: {error}; it is called without arguments") from error
