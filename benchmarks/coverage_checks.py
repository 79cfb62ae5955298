"""What has to hold of one model of the zoo, from sparsify to onnxruntime, in the order in which a user would do it."""

from __future__ import annotations

import math
import resource
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sparsefx
from benchmarks.coverage_rule import allowed, count
from benchmarks.zoo import Case
from sparsefx.errors import ExportError
from sparsefx.layers import known_weights

LEARNING_RATE = 0.1
"""Of a gradient clipped to norm 1; layers behind scales of 1e-5 hardly move with less."""
TOTAL_STEPS = 100
STEPS = ("sparsify", "all_ones", "masked", "training", "audit", "round_trip", "finalize", "export")
"""In order; ``export`` alone may be refused, with the reason."""


class Failed(Exception):
    """A check does not hold; the text says which, and how."""


class Refused(Exception):
    """The model has no ONNX form as a whole; ``parts`` tells what of it has."""

    def __init__(self, reason: str, parts: str) -> None:
        super().__init__(reason)
        self.parts = parts


def cover(case: Case, *, export: bool = True) -> dict[str, Any]:
    """Run every check on one model. What fails is in the result, with its reason; nothing is raised.

    Returns:
        ``steps`` (by name: ``ok``, ``seconds``, ``detail``), ``sparsity`` (shares of parameters and FLOPs, against the
        rule's), ``reasons`` (of dense layers), ``parameters``, ``seconds`` and ``peak_bytes`` (of the process).
    """
    start = time.perf_counter()
    result: dict[str, Any] = {"library": case.library, "name": case.name, "family": case.family, "steps": {}}
    run = _Run(case)
    for name in STEPS:
        if name == "export" and not export:
            continue
        begun = time.perf_counter()
        step: dict[str, Any] = {"ok": True, "detail": ""}
        try:
            step["detail"] = getattr(run, name)() or ""
        except Failed as failure:
            step.update(ok=False, detail=str(failure))
        except Refused as refusal:
            step.update(ok=False, refused=True, detail=str(refusal), parts=refusal.parts)
        except Exception as error:  # whatever a model and torch can raise is the finding
            step.update(ok=False, detail=f"{type(error).__name__}: {error}", trace=traceback.format_exc(limit=-6))
        step["seconds"] = round(time.perf_counter() - begun, 2)
        result["steps"][name] = step
        if not step["ok"] and name != "export":
            break  # what follows stands on it
    result.update(run.facts)
    result["seconds"] = round(time.perf_counter() - start, 2)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


class _Run:
    """One model through the steps; `untouched` is a second one of the same class, and sparsefx never sees it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.facts: dict[str, Any] = {}

    def sparsify(self) -> str:
        """Without example inputs, then with them; the module keeps its keys, and holds w * mask."""
        self.model, self.untouched = self._build(), self._build()
        self.facts["parameters"] = sum(parameter.numel() for parameter in self.model.parameters())
        self.inputs = self._call(self.case.call)
        counter = count(self.case, self.untouched)
        self.flops = {name: counter.flops.get(id(p), 0) for name, p in self.untouched.named_parameters()}
        self.computed_flops = counter.computed
        self.allowed = allowed(self.case, self.untouched, counter)
        self.dense = self._outputs(self.untouched)
        keys = list(self.model.state_dict())
        begun = time.perf_counter()
        sparsefx.sparsify(self.model)
        self.facts["seconds_without_inputs"] = round(time.perf_counter() - begun, 3)
        without = set(sparsefx.masks(self.model))
        self._holds_masked(keys)
        sparsefx.finalize(self.model)
        self._restore()
        return f"{len(without)} weights sparse without example inputs"

    def all_ones(self) -> str:
        """Masks that leave everything in change no bit of the outputs."""
        sparsefx.sparsify(self.model, pattern="unstructured", density=1.0, example_inputs=self.inputs)
        found = sparsefx.masks(self.model)
        self._expect(all(bool(mask.all()) for mask in found.values()), "a mask of density 1 leaves a weight out")
        self._same(self._outputs(self.model), self.dense, "the outputs with all-ones masks and the dense model's")
        sparsefx.finalize(self.model)
        self._restore()
        return f"{len(found)} masks"

    def masked(self) -> str:
        """With 2:4 masks, outputs equal those of the untouched class loaded with w * mask."""
        keys = list(self.model.state_dict())
        begun = time.perf_counter()
        sparsefx.sparsify(self.model, example_inputs=self.inputs)
        self.facts["seconds_with_inputs"] = round(time.perf_counter() - begun, 3)
        self._holds_masked(keys)
        masks = sparsefx.masks(self.model)
        for name, mask in masks.items():
            self._expect(_is_two_of_four(self.model.get_parameter(name).detach(), mask), f"{name} is not 2:4")
        with torch.no_grad():
            for name, mask in masks.items():
                self.untouched.get_parameter(name).mul_(mask)
        outputs = self._outputs(self.model)
        self._same(outputs, self._outputs(self.untouched), "the masked outputs and those of the untouched class with w * mask")
        changed = any(not torch.equal(a, b) for a, b in zip(outputs, self.dense, strict=True))
        self._expect(changed or not masks, "the masks change no output")
        return f"{len(masks)} masks"

    def training(self) -> str:
        """One step of SGD with the runtime: finite, moved, and 2:4 with the same counts afterwards."""
        before = {name: int(mask.sum()) for name, mask in sparsefx.masks(self.model).items()}
        values = {name: self._sum(name) for name in before}  # sums, because copies of the largest models would not fit
        self._train(LEARNING_RATE)
        after = sparsefx.masks(self.model)
        moved = 0
        for name, mask in after.items():
            weight = self.model.get_parameter(name).detach()
            self._expect(int(mask.sum()) == before[name], f"{name} changed its count of weights in a step")
            self._expect(not bool(weight[~mask].any()), f"{name} is not zero where its mask is")
            self._expect(bool(torch.isfinite(weight).all()), f"{name} is not finite after a step")
            moved += self._sum(name) != values[name]
        self._expect(moved > 0 or not after, "no sparse weight moved in a step")
        return f"{moved} of {len(after)} sparse weights moved"  # a small gradient can be rounded away

    def audit(self) -> str:
        """A row for every Linear/Conv, a reason for each dense one; shares of FLOPs against the rule's."""
        audit = sparsefx.audit(self.model)
        text, page = str(audit), audit.to_json()
        self._expect(bool(text) and bool(page), "the audit prints nothing")
        rows = {row.parameter: row for row in audit.layers}
        for path, module in self.model.named_modules():
            for weight in known_weights(module):
                full = f"{path}.{weight.local_name}" if path else weight.local_name
                parameter = module._parameters.get(weight.local_name)
                listed = full in rows or any(parameter is self._parameter(name) for name in rows)
                self._expect(listed, f"{full} has no row in the audit")
        for row in audit.layers:
            self._expect(row.sparse or bool(row.reason), f"{row.name} is dense without a reason")
        sparse = {row.parameter for row in audit.layers if row.sparse}
        flops = sum(self.flops.values())
        self.facts["reasons"] = _grouped(row.reason for row in audit.layers if not row.sparse)
        totals = audit.totals
        self.facts["sparsity"] = {
            "layers": len(audit.layers),
            "sparse_layers": len(sparse),
            "parameters": totals.sparse_weights / max(self.facts["parameters"], 1),
            "flops": flops,
            "computed_flops": self.computed_flops,
            "sparse_flops": sum(self.flops.get(name, 0) for name in sparse),
            "allowed_flops": sum(self.flops[name] for name in self.allowed),
            "audit_flops": totals.flops,
            "audit_sparse_flops": totals.sparse_flops,
            "sparse_against_rule": sorted(sparse - self.allowed)[:10],
            "dense_against_rule": [
                f"{name}: {rows[name].reason if name in rows else 'has no row'}" for name in sorted(self.allowed - sparse)[:10]
            ],
        }
        share = totals.sparse_flops / totals.flops if totals.flops and totals.sparse_flops is not None else math.nan
        return f"{len(sparse)} of {len(audit.layers)} layers, {share:.1%} of their FLOPs"

    def round_trip(self) -> str:
        """The state_dict, through a file: into the untouched class, and back into the model after another step."""
        expected, masks = self._outputs(self.model), sparsefx.masks(self.model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.pt"
            torch.save(self.model.state_dict(), path)
            self.untouched.load_state_dict(torch.load(path, weights_only=True))
            self._same(self._outputs(self.untouched), expected, "the outputs and the untouched class's with the checkpoint")
            self._train(10 * LEARNING_RATE)
            self.model.load_state_dict(torch.load(path, weights_only=True))
        for name, mask in sparsefx.masks(self.model).items():
            self._expect(torch.equal(mask, masks[name]), f"the mask of {name} did not come back from the state_dict")
        self._same(self._outputs(self.model), expected, "the outputs before and after the round trip")
        return ""

    def finalize(self) -> str:
        """Zeros baked in, nothing of ours left, the same outputs."""
        expected, masks = self._outputs(self.model), sparsefx.masks(self.model)
        sparsefx.finalize(self.model)
        left = [path for path, module in self.model.named_modules() if any("sparsefx" in key for key in module.__dict__)]
        self._expect(not left, f"finalize leaves records in {left[:3]}")
        self._same(self._outputs(self.model), expected, "the outputs before and after finalize")
        for name, mask in masks.items():
            self._expect(not bool(self.model.get_parameter(name).detach()[~mask].any()), f"{name} is not zero where its mask was")
        return ""

    def export(self) -> str:
        """ONNX, checked in onnxruntime by export_onnx itself."""
        del self.untouched
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = sparsefx.export_onnx(self.model, self.inputs, Path(folder) / "model.onnx")
            except ExportError as error:
                raise Refused(str(error), self._export_parts(Path(folder))) from error
        self.facts["onnx"] = {
            "bytes": report.bytes,
            "largest_relative_error": report.largest_relative_error,
            "sparse_initializers": sum(weight.pattern != "" for weight in report.initializers),
            "initializers": len(report.initializers),
        }
        return f"{report.bytes / 1e6:.1f} MB, largest relative error {report.largest_relative_error:.1e}"

    def _export_parts(self, folder: Path) -> str:
        try:
            report = sparsefx.export_parts(self.model, self.inputs, folder)
        except ExportError as error:
            return f"none: {error}"
        left = f"; in no file: {', '.join(report.uncovered)}" if report.uncovered else "; no layer is left out"
        return ", ".join(report.parts) + left

    # ---- helpers

    def _build(self) -> nn.Module:
        """With the same weights each time."""
        torch.manual_seed(0)
        return prepared(self.case)

    def _call(self, make: Callable[[], Any]) -> Any:
        torch.manual_seed(1)
        return make()

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        model.eval()
        args, kwargs = self._call(self.case.call)
        with torch.no_grad():
            found = [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
        self._expect(bool(found), "the model returns no tensor")
        return found

    def _train(self, learning_rate: float) -> None:
        """One step in train mode, with whatever the model needs of other parameters too."""
        self.model.train()
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=learning_rate)
        runtime = sparsefx.attach(self.model, optimizer, total_steps=TOTAL_STEPS)
        args, kwargs = self._call(self.case.training_call or self.case.call)
        outputs = [leaf for leaf in tree_leaves(self.model(*args, **kwargs)) if isinstance(leaf, Tensor)]
        generator = torch.Generator().manual_seed(2)
        losses = [(o * torch.randn(o.shape, generator=generator)).mean() for o in outputs if o.requires_grad]
        self._expect(bool(losses), "no output of the training forward needs gradients")
        torch.stack([loss.float() for loss in losses]).sum().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        runtime.detach()
        self.model.zero_grad(set_to_none=True)

    def _sum(self, name: str) -> float:
        return float(self.model.get_parameter(name).detach().abs().sum(dtype=torch.float64))

    def _restore(self) -> None:
        """The values of the untouched model, in place."""
        self.model.load_state_dict(self.untouched.state_dict())

    def _holds_masked(self, keys: list[str]) -> None:
        self._expect(list(self.model.state_dict()) == keys, "sparsify changed the keys of the state_dict")
        for name, mask in sparsefx.masks(self.model).items():
            expected = self.untouched.get_parameter(name).detach() * mask
            self._expect(torch.equal(self.model.get_parameter(name).detach(), expected), f"{name} is not w * mask")

    def _parameter(self, name: str) -> nn.Parameter | None:
        try:
            return self.model.get_parameter(name)
        except AttributeError:
            return None  # a computed weight has a row and no parameter

    @staticmethod
    def _expect(holds: bool, text: str) -> None:
        if not holds:
            raise Failed(text)

    def _same(self, first: list[Tensor], second: list[Tensor], what: str) -> None:
        self._expect(len(first) == len(second), f"{what}: {len(first)} and {len(second)} tensors")
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            if not torch.equal(a, b) and not (a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())):
                gap = (a.double() - b.double()).abs().max().item() if a.shape == b.shape and a.numel() else math.nan
                raise Failed(f"{what} differ in output {number} by {gap:.2e}")


def prepared(case: Case) -> nn.Module:
    """The case's model in eval mode, from torch's global generator, in a state in which every layer reaches the outputs.

    Heads and gates that start at zero would hide what comes before them, and so would activations that fade away because
    the statistics of batch norms are not yet those of any data: one forward in train mode gives them some.
    """
    model = case.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if norms:
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 1.0
            args, kwargs = (case.training_call or case.call)()
            model.train()(*args, **kwargs)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model.eval()


def _is_two_of_four(weight: Tensor, mask: Tensor) -> bool:
    """Two of each four along some axis: a check that knows nothing of the library's own."""
    for axis in range(mask.ndim):
        if mask.shape[axis] % 4 == 0:
            groups = mask.movedim(axis, -1).reshape(-1, 4).sum(-1)
            if bool((groups == 2).all()) and not bool(weight[~mask].any()):
                return True
    return False


def _grouped(reasons: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
