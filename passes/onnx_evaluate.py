"""A model as it is exported: in eval mode, without gradients, on plain ops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsefx.capture.state import unchanged


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context ``model`` is in eval mode without gradients; afterwards it and torch's switches are as before.

    Each run inside wants `unchanged` of its own, so that a state that the model keeps does not carry over to the next.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # Parameters too: an embedding with max_norm rescales its table in every forward.
    with unchanged(model, parameters=True):
        try:
            # The fused path of nn.TransformerEncoderLayer is one opaque op, which no exporter translates.
            torch.backends.mha.set_fastpath_enabled(False)
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
                model.eval()
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
