"""Which layers of a model with embeddings are its vocabulary projection or classification head.

Where the graph is known (`Program.reads_tokens`), data flow answers. Without it the answer is a rule of thumb on the modules:
in a model with an nn.Embedding, the Linear that was registered last, outside any list of repeated blocks, is the head unless
it is square.
"""

from __future__ import annotations

from torch import nn

from sparsefx.layers import known_base
from sparsefx.program import Program

SMALLEST_VOCABULARY = 16
"""Tables with fewer rows (segment types) are no vocabularies."""


def embedding_parameters(program: Program) -> frozenset[int]:
    """``id`` of every parameter that an embedding reads, in a module or a functional call."""
    # Not `module.weight`: where that is computed, reading it may move what computes it.
    ids = {id(module._parameters.get("weight")) for module in _embeddings(program.model)}
    parameters = dict(program.model.named_parameters())
    ids |= {id(parameters[name]) for name, sites in program.call_sites.items() if any(site.op == "embedding" for site in sites)}
    return frozenset(ids)


def vocabulary_sizes(program: Program) -> frozenset[int]:
    """Row counts of the embeddings that the model's input indexes; without a graph, of all about as large as the largest.

    Tables of positions and segments are indexed by what the model counts itself, and are smaller.
    """
    if program.vocabularies is not None:
        parameters = dict(program.model.named_parameters())
        rows = [int(parameters[name].shape[0]) for name in program.vocabularies]
    else:
        every = [module.num_embeddings for module in _embeddings(program.model)]
        rows = [count for count in every if 2 * count >= max(every)]
    return frozenset(count for count in rows if count >= SMALLEST_VOCABULARY)


def final_layers(program: Program) -> frozenset[int] | None:
    """``id`` of the weights behind whose products no further layer stands; None where that is unknown."""
    if program.finals is None:
        return None
    parameters = dict(program.model.named_parameters())
    return frozenset(id(parameters[name]) for name in program.finals)


def outside_blocks(program: Program) -> frozenset[int]:
    """``id`` of the parameters that stand in no nn.ModuleList: repeated blocks are no heads."""
    inside: set[int] = set()
    for module in program.model.modules():
        if isinstance(module, nn.ModuleList):
            inside.update(id(parameter) for parameter in module.parameters())
    return frozenset(id(parameter) for parameter in program.model.parameters() if id(parameter) not in inside)


def heads(program: Program, outside: frozenset[int]) -> frozenset[int]:
    """``id`` of the weights of classification heads of a language model."""
    parameters = dict(program.model.named_parameters())
    if program.reads_tokens is not None:
        return frozenset(id(parameters[name]) for name in program.heads)
    if not _embeddings(program.model):
        return frozenset()
    last: nn.Linear | None = None
    for module in program.model.modules():
        if isinstance(module, nn.Linear) and known_base(module) is nn.Linear and id(module.weight) in outside:
            last = module
    if last is None or last.in_features == last.out_features:
        return frozenset()
    return frozenset((id(last.weight),))


def _embeddings(model: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    return [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
