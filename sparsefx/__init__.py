"""Training-time sparsity for PyTorch: sparsify a model, train it as before, audit it, export 2:4 ONNX."""

from importlib.metadata import PackageNotFoundError, version

from sparsefx import patterns, schedules
from sparsefx.api import attach, audit, export_onnx, finalize, graph, masks, sparsify
from sparsefx.errors import SparsefxError
from sparsefx.passes.analyze_eligibility import Eligibility
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.pruning import apply_channel_plan, channel_plan, channel_plan_of, prune_channels, prune_channels_
from sparsefx.runtime import MaskRuntime

try:
    __version__ = version("sparsefx")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"

__all__ = [
    "ChannelPlan",
    "Eligibility",
    "MaskRuntime",
    "SparsefxError",
    "apply_channel_plan",
    "attach",
    "audit",
    "channel_plan",
    "channel_plan_of",
    "export_onnx",
    "finalize",
    "graph",
    "masks",
    "patterns",
    "prune_channels",
    "prune_channels_",
    "schedules",
    "sparsify",
]
