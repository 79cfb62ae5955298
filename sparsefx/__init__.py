"""Training-time sparsity for PyTorch: sparsify a model, train it as before, audit it, export 2:4 ONNX."""

from importlib.metadata import PackageNotFoundError, version

from sparsefx import algorithms, patterns, schedules
from sparsefx.acceleration import accelerate, load_accelerated
from sparsefx.api import attach, audit, export_onnx, export_parts, finalize, graph, masks, sparsify
from sparsefx.channel_order import channel_order, permute_channels
from sparsefx.errors import SparsefxError
from sparsefx.lottery import lottery_ticket
from sparsefx.mask_once import mask_once
from sparsefx.narrow import small_baseline
from sparsefx.onnx_audit import audit_onnx
from sparsefx.onnx_files import compact_onnx, densify_onnx
from sparsefx.passes.acceleration_report import Acceleration
from sparsefx.passes.analyze_eligibility import Eligibility
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.passes.permute_channels import ChannelOrder
from sparsefx.passes.quantize_onnx import quantize_onnx
from sparsefx.permutation import kept_magnitude, search_permutation
from sparsefx.pruning import apply_channel_plan, channel_plan, channel_plan_of, prune_channels, prune_channels_
from sparsefx.runtime import MaskRuntime
from sparsefx.sparse_file import Loaded, load, save

try:
    __version__ = version("sparsefx")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"

__all__ = [
    "Acceleration",
    "ChannelOrder",
    "ChannelPlan",
    "Eligibility",
    "Loaded",
    "MaskRuntime",
    "SparsefxError",
    "accelerate",
    "algorithms",
    "apply_channel_plan",
    "attach",
    "audit",
    "audit_onnx",
    "channel_order",
    "channel_plan",
    "channel_plan_of",
    "compact_onnx",
    "densify_onnx",
    "export_onnx",
    "export_parts",
    "finalize",
    "graph",
    "kept_magnitude",
    "load",
    "load_accelerated",
    "lottery_ticket",
    "mask_once",
    "masks",
    "patterns",
    "permute_channels",
    "prune_channels",
    "prune_channels_",
    "quantize_onnx",
    "save",
    "schedules",
    "search_permutation",
    "small_baseline",
    "sparsify",
]
