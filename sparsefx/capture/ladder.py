"""The ladder: torch.export, one observed run, torch.fx, the layer modules alone."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from sparsefx.capture.arguments import split_arguments
from sparsefx.capture.export import export_graph
from sparsefx.capture.graph_uses import graph_call_sites
from sparsefx.capture.heads import final_layers, language_model_heads, reads_tokens, vocabularies
from sparsefx.capture.observe import observe_run
from sparsefx.capture.trace import trace_parts
from sparsefx.layers import known_weights, runs_own_forward
from sparsefx.program import CallSite, Program, Rung, Stage, parameter_names


def capture(model: nn.Module, example_inputs: Any = None) -> Program:
    """Capture a model by the highest rung of the ladder that holds; the model is as before in every case.

    1. With example inputs: torch.export.
    2. With inputs that torch.export refuses: one observed run (and whatever torch.fx can trace, for the graph).
    3. Without inputs: torch.fx, where a submodule that resists becomes a leaf and is traced on its own.
    4. A layer module that none of these saw: by its type.

    Args:
        model: any module, in the mode (train or eval) that is meant.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a pair of both; None for none.

    Raises:
        CaptureError: the model itself does not run on the example inputs.
    """
    aliases = parameter_names(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sites: list[CallSite] = []
    graphs: dict[str, fx.GraphModule] = {}
    resisted: list[str] = []
    tokens: bool | None = None
    heads: frozenset[str] = frozenset()
    finals: frozenset[str] | None = None
    tables: frozenset[str] | None = None
    complete = False

    uninitialized = [name for name, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    # What torch.compile returned is captured as the module inside it; parameters are known by identity.
    inner = getattr(model, "_orig_mod", None)
    prefix, runs = ("_orig_mod", inner) if isinstance(inner, nn.Module) else ("", model)
    if uninitialized:
        # Running it would initialise it, which is the user's to do.
        resisted.append(f"{uninitialized[0]} is uninitialised (a lazy module); run the model once first")
    else:
        if example_inputs is not None:
            args, kwargs = split_arguments(example_inputs)
            try:
                graphs[""] = export_graph(runs, args, kwargs)
            except Exception as error:  # export may raise anything, from its own refusals to the model's own errors
                resisted.append(f"torch.export: {_first_line(error)}")
                sites = observe_run(runs, args, kwargs, names)
            else:
                sites = graph_call_sites(graphs[""], names, Rung.EXPORT)
                tokens = reads_tokens(graphs[""])
                heads = language_model_heads(graphs[""], names) if tokens else heads
                finals = final_layers(graphs[""], names)
                tables = vocabularies(graphs[""], names)
            complete = True
        if not graphs:
            graphs, refusals = trace_parts(runs)
            resisted += refusals
            if not complete:
                for path, part in graphs.items():
                    sites += graph_call_sites(part, names, Rung.TRACED, ".".join(filter(None, (prefix, path))))
    # The floor stands below what a layer's type says too: without inputs, and for layers that the run did not reach.
    sites += _sites_by_type(model, names, sites)
    by_parameter: dict[str, list[CallSite]] = {}
    for site in sites:
        by_parameter.setdefault(site.parameter, []).append(site)
    return Program(
        model=model,
        stage=Stage.CAPTURED,
        graphs=MappingProxyType(graphs),
        call_sites=MappingProxyType({name: tuple(found) for name, found in by_parameter.items()}),
        aliases=MappingProxyType(aliases),
        resisted=tuple(resisted),
        complete=complete,
        reads_tokens=tokens,
        heads=heads,
        finals=finals,
        vocabularies=tables,
    )


def _sites_by_type(model: nn.Module, names: dict[int, str], sites: Iterable[CallSite]) -> list[CallSite]:
    """Rung 4: weights of known layer types that no call was seen to read, and embeddings."""
    seen = {site.parameter for site in sites}
    embedded = {site.parameter for site in sites if site.op == "embedding"}
    found: list[CallSite] = []
    for path, module in model.named_modules(remove_duplicate=False):
        for weight in known_weights(module):
            parameter = module._parameters.get(weight.local_name)
            if parameter is None or names[id(parameter)] in seen:
                continue
            own = runs_own_forward(module)
            problem = (
                ""
                if own
                else (f"its class {type(module).__name__} has a forward of its own that could not be traced; pass example_inputs")
            )
            site = CallSite(
                names[id(parameter)], weight.op, path, Rung.MODULE, weight.reduction_axis, weight.groups, problem=problem
            )
            found.append(site)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            name = names.get(id(module._parameters.get("weight")))
            if name is not None and name not in embedded:
                found.append(CallSite(name, "embedding", path, Rung.MODULE))
    return found


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
