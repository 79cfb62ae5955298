"""What a claim is, and the command line that each of their files has."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.claims.networks import find
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task, scale_of
from benchmarks.claims.verdict import Check, Word, together
from sparsefx.analysis import estimate
from sparsefx.analysis.plots import COLOURS, new_figure
from sparsefx.html import Markup, bullets, page, section, svg_picture, table, write_text

Point = tuple[float, Sequence[float]]
LEARNED_NOTHING = 80.0
"""Test error in percent; all data sets have ten classes."""


@dataclass(frozen=True)
class Curve:
    """Means over seeds and their standard errors along x."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """One figure; ``x_log`` draws x by its logarithm, and ``x_names`` replaces numbers by words."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    x_log: bool = False
    x_names: Sequence[str] = ()


@dataclass(frozen=True)
class Finding:
    """What the runs of one claim say."""

    checks: Sequence[Check]
    chart: Chart
    notes: Sequence[str] = ()

    @property
    def word(self) -> Word:
        return together(self.checks)


@dataclass(frozen=True)
class Claim:
    """One claim of the two texts.

    Attributes:
        number: in the list.
        says: the claim and where it stands.
        rule: what it takes to hold, as fixed before any run.
        tasks: the runs that it wants, named.
        judge: what they say.
        module: the file that it stands in.
    """

    number: int
    says: str
    rule: str
    tasks: Callable[[Scale], Mapping[str, list[Task]]]
    judge: Callable[[Mapping[str, list[Task]], Results, Scale], Finding]
    module: str


def main(*claims: Claim, description: str) -> None:
    """Run claims and write their page."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("smoke", "cpu", "gpu"), default="smoke")
    parser.add_argument("--data", type=Path, help="folder with MNIST or CIFAR-10; without it the shipped digits are taken")
    parser.add_argument("--out", type=Path, default=Path("claims"), help="folder of results and of the page")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of claims")
    arguments = parser.parse_args()
    mnist, cifar10 = (find(name, arguments.data) for name in ("mnist", "cifar10"))
    scale = scale_of(arguments.scale, has_mnist=mnist, has_cifar10=cifar10)
    chosen = [claim for claim in claims if not arguments.only or claim.number in arguments.only]
    results = Results(arguments.out / scale.name, data=arguments.data, device=arguments.device, workers=arguments.workers)
    started = time.perf_counter()
    wanted = {claim.number: claim.tasks(scale) for claim in chosen}
    tasks = [task for named in wanted.values() for group in named.values() for task in group]
    missing = len(results.missing(tasks))
    told = (
        f"scale {scale.name}: {scale.main.data}/{scale.main.net}, {scale.main.epochs} epochs; {scale.images.data}/"
        f"{scale.images.net}, {scale.images.epochs} epochs; seeds 0 to {scale.seeds - 1}"
    )
    print(f"{told}; {len(set(tasks))} runs, {missing} of them to make", flush=True)
    results.run(tasks)
    told = "; ".join([told, *results.made_with(tasks)])
    print(told)
    findings = []
    for claim in chosen:
        finding = claim.judge(wanted[claim.number], results, scale)
        finding = replace(finding, notes=[*finding.notes, *_dead(wanted[claim.number], results)])
        findings.append((claim, finding))
        print(f"\n{claim.number}. {claim.says}\n   {finding.word.upper()}. Rule: {claim.rule}")
        for check in finding.checks:
            print(f"   {check.word:14} {check.told}")
        for note in finding.notes:
            print(f"   {note}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "claims" if len(chosen) > 1 else f"claim{chosen[0].number:02}" if chosen else "none"
    path = arguments.out / f"{name}-{scale.name}.html"
    write_text(path, _page(findings, told, scale))
    print(f"\nwrote {path}; {time.perf_counter() - started:.0f} s")


def _dead(named: Mapping[str, Sequence[Task]], results: Results) -> list[str]:
    """Nets that learned nothing: their errors say that training broke down, not how good a method is."""
    dead = {name: sum(error >= LEARNED_NOTHING for error in results.values(group)) for name, group in named.items()}
    return [f"{name}: {count} of {len(named[name])} nets learned nothing" for name, count in dead.items() if count]


def _page(findings: Sequence[tuple[Claim, Finding]], told: str, scale: Scale) -> str:
    rows = [[str(claim.number), claim.says, finding.word] for claim, finding in findings]
    parts = [section("Verdicts", table(["number", "claim", "verdict"], rows))]
    for claim, finding in findings:
        checks = bullets([f"{check.word}: {check.told}" for check in finding.checks])
        command = f"python -m benchmarks.claims.{claim.module} --scale {scale.name}"
        figure = _picture(finding.chart)
        texts = [claim.says, f"Rule, fixed before the runs: {claim.rule}", f"Command: {command}", *finding.notes]
        parts.append(section(f"{claim.number}. {finding.word}", *texts, checks, figure))
    return page("Claims re-checked", *parts, subtitle=told)


def _picture(chart: Chart) -> Markup:
    from sparsefx.analysis.plots import svg

    figure, axes = new_figure(chart.title, chart.x_label, chart.y_label)
    for number, curve in enumerate(chart.curves):
        found = [(x, estimate(values)) for x, values in curve.points]
        axes.errorbar(
            [x for x, _ in found],
            [one.mean for _, one in found],
            yerr=[0.0 if one.count < 2 else one.standard_error for _, one in found],
            marker="o",
            markersize=4,
            capsize=3,
            color=COLOURS[number % len(COLOURS)],
            label=curve.name,
        )
    if chart.x_log:
        axes.set_xscale("log")
    if chart.x_names:
        axes.set_xticks(range(len(chart.x_names)), chart.x_names, rotation=20, fontsize=8)
    if len(chart.curves) > 1:
        axes.legend(fontsize=7, frameon=False)
    return svg_picture(chart.title, svg(figure))
