"""The results of a coverage sweep as one JSON file and one Markdown page."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.coverage_checks import STEPS
from benchmarks.sweep import write_json, write_text

PACKAGES = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime")


def write_tables(out: Path) -> None:
    """Gather ``out/models/*/*.json`` into ``out/coverage.json`` and ``out/coverage.md``."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("models/*/*.json"))]
    write_json(out / "coverage.json", {"machine": machine(), "models": results})
    write_text(out / "coverage.md", page(results))


def machine() -> dict[str, str]:
    """Processor and versions."""
    found = {"machine": f"{platform.machine()}, {platform.system()}", "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def page(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown page: totals, FLOPs by family against the rule, refused exports, every model."""
    lines = ["# Coverage", "", ", ".join(f"{name} {text}" for name, text in machine().items()), "", "## Totals", ""]
    lines += _totals(results)
    lines += ["", "## Sparse share of Linear/Conv FLOPs, against what the paper's rule allows", ""]
    lines += _families(results)
    lines += ["", "## Not exported as a whole, and why", ""]
    lines += _refusals(results)
    lines += ["", "## Every model", ""]
    lines += _models(results)
    return "\n".join(lines) + "\n"


def _totals(results: Sequence[dict[str, Any]]) -> list[str]:
    libraries = sorted({result["library"] for result in results})
    rows = []
    for step in STEPS:
        row = [step]
        for library in [*libraries, None]:
            ran = [r for r in results if library in (None, r["library"])]
            passed = sum(r["steps"].get(step, {}).get("ok", False) for r in ran)
            row.append(f"{passed} of {len(ran)}")
        rows.append(row)
    return table(["check", *libraries, "all"], rows)


def _families(results: Sequence[dict[str, Any]]) -> list[str]:
    families: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        if "sparsity" in result:
            families[result["library"], result["family"]].append(result["sparsity"])
    rows, differing = [], []
    for (library, family), found in sorted(families.items()):
        total = sum(one["flops"] for one in found) or 1
        sparse, rule = (sum(one[key] for one in found) / total for key in ("sparse_flops", "allowed_flops"))
        computed = sum(one["computed_flops"] for one in found)
        equal = all(one["sparse_flops"] == one["allowed_flops"] for one in found)
        counted = all(one["audit_flops"] == one["flops"] for one in found)
        note = f"{computed / (total + computed):.1%} more by computed weights" if computed else ""
        name = f"{library}/{family}"
        rows.append([name, str(len(found)), f"{sparse:.4%}", f"{rule:.4%}", _yes(equal), _yes(counted), note])
        if not equal:
            differing += [f"- {name}: {text}" for one in found for text in one["dense_against_rule"] + one["sparse_against_rule"]]
    header = ["family", "models", "sparse", "rule", "equal", "FLOPs counted alike", "note"]
    return [*table(header, rows), "", *(differing or ["Equal everywhere."])]


def _refusals(results: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for result in results:
        step = result["steps"].get("export", {})
        if step and not step["ok"]:
            rows.append([f"{result['library']}/{result['name']}", step["detail"][:300], step.get("parts", "")])
    return table(["model", "reason", "exported in parts"], rows) if rows else ["None."]


def _models(results: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for result in results:
        failed = [name for name, step in result["steps"].items() if not step["ok"]]
        sparsity = result.get("sparsity", {})
        onnx = result.get("onnx", {})
        rows.append(
            [
                f"{result['library']}/{result['name']}",
                f"{result.get('parameters', 0) / 1e6:.1f} M",
                f"{sparsity.get('sparse_layers', 0)} of {sparsity.get('layers', 0)}",
                ", ".join(failed) or "all",
                f"{onnx['bytes'] / 1e6:.1f} MB" if onnx else "",
                f"{onnx['largest_relative_error']:.1e}" if onnx else "",
                f"{result.get('seconds', 0):.0f} s",
                f"{result.get('peak_bytes', 0) / 2**30:.1f} GiB",
            ]
        )
    return table(
        ["model", "parameters", "sparse layers", "passed, or what failed", "ONNX file", "ONNX error", "time", "peak memory"], rows
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *cells]]


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"
