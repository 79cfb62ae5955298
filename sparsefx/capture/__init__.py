"""Capture: from a model to a Program, by a ladder of four rungs that never leaves a layer without an answer."""

from sparsefx.capture.ladder import capture

__all__ = ["capture"]
