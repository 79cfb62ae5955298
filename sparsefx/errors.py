"""The one error hierarchy. Each message says what was given, what was expected and what to do."""

from __future__ import annotations


class SparsefxError(Exception):
    """Base of every error that sparsefx raises on purpose."""


class PatternError(SparsefxError, ValueError):
    """An unknown pattern, a density that a pattern cannot have, or a shape that it cannot take."""


class EligibilityError(SparsefxError, ValueError):
    """No layer can be made sparse, or a selection names no layer."""


class CaptureError(SparsefxError, RuntimeError):
    """A model could not be captured as a graph, or did not run on the example inputs."""


class VerificationError(SparsefxError, RuntimeError):
    """A program does not have what its stage requires; names the pass that broke it."""


class StateError(SparsefxError, RuntimeError):
    """A call that does not fit the state of the model: sparsified twice, not sparsified, on the meta device."""


class NonFiniteError(SparsefxError, ArithmeticError):
    """NaN or infinity in a weight; names the layer."""


class OptimizerError(SparsefxError, ValueError):
    """An optimizer that the mask runtime cannot follow."""


class OptionError(SparsefxError, ValueError):
    """An unknown name or an option outside its range."""


class ExportError(SparsefxError, RuntimeError):
    """An ONNX file could not be produced, did not verify, or could not be written."""
