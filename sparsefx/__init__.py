"""Training-time sparsity for PyTorch: sparsify a model, train it as before, audit it, export 2:4 ONNX."""

from importlib.metadata import PackageNotFoundError, version

from sparsefx import algorithms, patterns, schedules
from sparsefx.api import attach, audit, export_onnx, finalize, graph, masks, sparsify
from sparsefx.errors import SparsefxError
from sparsefx.lottery import lottery_ticket
from sparsefx.passes.analyze_eligibility import Eligibility
from sparsefx.runtime import MaskRuntime
from sparsefx.sparse_file import Loaded, load, save

try:
    __version__ = version("sparsefx")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"

__all__ = [
    "Eligibility",
    "Loaded",
    "MaskRuntime",
    "SparsefxError",
    "algorithms",
    "attach",
    "audit",
    "export_onnx",
    "finalize",
    "graph",
    "load",
    "lottery_ticket",
    "masks",
    "patterns",
    "save",
    "schedules",
    "sparsify",
]
