"""The claims' rules on figures that are known, and their runs: made once, found again, the same for the same task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsefx
from benchmarks.claims.claim import Finding, _dead, _page
from benchmarks.claims.every import CLAIMS
from benchmarks.claims.networks import build, load
from benchmarks.claims.results import Results, _make
from benchmarks.claims.task import RECIPE, STEPS_PER_EPOCH, Scale, Task, scale_of
from benchmarks.claims.trainer import _Run, _weights, train
from benchmarks.claims.verdict import Check, below, difference, equal, together

SMOKE = scale_of("smoke", has_mnist=False, has_cifar10=False)
TINY = Task("digits", "conv", "dense", 1.0, "unstructured", (), 1, 0)


class Figures(Results):
    """Results by a function of the task, in place of training."""

    def __init__(self, figure: Any) -> None:
        super().__init__(Path("nowhere"))
        self._figure = figure

    def get(self, task: Task) -> dict[str, Any]:
        value = self._figure(task)
        bins = {"layer": [[0.1, 0.2], [0.3, 0.4]]}
        names = ("error", "small", "large", "specialization", "empty", "operations", "speedup")
        return {**dict.fromkeys(names, value), "difference": 1e-9, "same": 1.0, "bins": bins}


def test_a_difference_has_the_interval_of_students_t() -> None:
    found = difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.303 / 3**0.5)
    assert difference([1.0], [0.5]).low == -float("inf")


@pytest.mark.parametrize(
    ("first", "second", "margin", "word"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], 0.0, "holds"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], 0.0, "does not hold"),
        ([1.0, 3.0, 2.0], [2.0, 2.0, 2.0], 0.0, "undecided"),
        ([1.2, 1.2, 1.2], [1.0, 1.0, 1.0], 0.5, "holds"),
        ([1.0, 1.0], [1.0, 1.0], 0.0, "does not hold"),
        ([1.0], [2.0], 0.0, "undecided"),
    ],
)
def test_below_is_decided_by_the_interval(first: list[float], second: list[float], margin: float, word: str) -> None:
    assert below("a minus b", first, second, margin=margin).word == word


@pytest.mark.parametrize(("shift", "word"), [(0.1, "holds"), (2.0, "does not hold"), (-2.0, "does not hold")])
def test_equal_is_both_ways(shift: float, word: str) -> None:
    assert equal("a minus b", [1.0 + shift, 2.0 + shift, 3.0 + shift], [1.0, 2.0, 3.0], margin=0.5).word == word


def test_a_claim_falls_with_any_part_and_waits_for_all() -> None:
    good, bad, open_ = Check("", "holds"), Check("", "does not hold"), Check("", "undecided")
    assert together([good, good]) == "holds"
    assert together([good, open_]) == "undecided"
    assert together([open_, bad]) == "does not hold"
    assert together([]) == "undecided"


def test_there_are_the_fourteen_claims_with_rules_and_files() -> None:
    assert [claim.number for claim in CLAIMS] == list(range(1, 15))
    folder = Path(__file__).parent.parent / "benchmarks" / "claims"
    for claim in CLAIMS:
        assert (folder / f"{claim.module}.py").exists()
        assert f"claim{claim.number:02}" in claim.module
        assert claim.says
        assert claim.rule


@pytest.mark.parametrize("scale", ["smoke", "cpu", "gpu"])
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.module)
def test_every_claim_judges_and_draws_at_every_scale(claim: Any, scale: str) -> None:
    at = scale_of(scale, has_mnist=True, has_cifar10=True)
    named = claim.tasks(at)
    tasks = [task for group in named.values() for task in group]
    assert len({task.key for task in tasks}) == len(set(tasks))
    assert all(len(group) == at.seeds for group in named.values())
    # Error rises with the seed alone: nothing differs, so nothing that wants a difference may hold.
    finding: Finding = claim.judge(named, Figures(lambda task: 10.0 + task.seed), at)
    assert finding.checks
    assert all(check.word in ("holds", "does not hold", "undecided") for check in finding.checks)
    text = _page([(claim, finding)], "settings", at)
    assert finding.word in text
    assert "svg+xml" in text


def test_recipes_that_are_better_make_the_claim_hold() -> None:
    claim = CLAIMS[5]
    cost = {1.0: 5.0, 0.5: 5.0, 0.25: 5.2, 0.1: 7.0}
    at = Scale("cpu", 5, SMOKE.main, SMOKE.images)
    finding = claim.judge(claim.tasks(at), Figures(lambda task: cost[task.density] + 0.1 * task.seed), at)
    assert finding.word == "holds"
    finding = claim.judge(claim.tasks(at), Figures(lambda task: cost[task.density] + 9 * (task.density == 0.5)), at)
    assert finding.word == "does not hold"


def test_equal_tasks_are_one_run_and_others_are_not() -> None:
    assert replace(TINY).key == TINY.key
    keys = {TINY.key, replace(TINY, seed=1).key, replace(TINY, options=(("scale", 0.5),)).key, replace(TINY, epochs=2).key}
    assert len(keys) == 4


def test_an_option_that_says_what_is_so_anyway_makes_no_other_run() -> None:
    assert SMOKE.tasks("magnitude", 0.1, rewire_every=1, scale=1.0) == SMOKE.tasks("magnitude", 0.1)
    assert SMOKE.tasks("magnitude", 0.1, rewire_every=2) != SMOKE.tasks("magnitude", 0.1)


def test_runs_of_another_recipe_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    before = TINY.key
    monkeypatch.setattr("benchmarks.claims.task.RECIPE", RECIPE + 1)
    assert TINY.key != before


def test_nets_that_learned_nothing_are_told() -> None:
    named = {"dense": SMOKE.tasks("dense"), "sparse": SMOKE.tasks("magnitude", 0.1)}
    results = Figures(lambda task: 90.0 if task.method == "magnitude" and task.seed == 1 else 3.0)
    assert _dead(named, results) == ["sparse: 1 of 2 nets learned nothing"]


def test_longer_training_closes_a_gap_only_where_there_was_one() -> None:
    claim, at = CLAIMS[9], Scale("cpu", 5, SMOKE.main, SMOKE.images)
    gaps = {SMOKE.main.epochs: 3.0, 2 * SMOKE.main.epochs: 0.5, 4 * SMOKE.main.epochs: 0.2}
    closing = Figures(lambda task: 5.0 + task.seed + (gaps[task.epochs] if task.density == 0.25 else 0.0))
    assert claim.judge(claim.tasks(at), closing, at).word == "holds"
    same = Figures(lambda task: 5.0 + task.seed)
    assert claim.judge(claim.tasks(at), same, at).word == "does not hold"


def test_the_momentum_of_the_optimizer_stays_as_published() -> None:
    run = _Run(TINY, load("digits", None))
    state, _ = run.train(build("conv"), 0, 3, None)
    assert state["param_groups"][0]["momentum"] == 0.9


@pytest.mark.parametrize("net", ["resnet8", "resnet"])
def test_nets_as_narrow_as_the_sparsest_are_small_exist(net: str) -> None:
    sparse = sparsefx.sparsify(build(net), pattern="unstructured", density=0.05)
    small = sparsefx.small_baseline(sparse, None, torch.randn(2, 3, 32, 32))
    wanted = _weights(sparse)
    assert sum(parameter.numel() for parameter in small.parameters()) == pytest.approx(wanted, rel=0.05)


def test_results_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert results.missing([TINY, TINY, replace(TINY, seed=1)]) == [TINY, replace(TINY, seed=1)]
    _make(TINY, str(results.path(TINY)), None, "cpu")
    content = results.path(TINY).read_text()
    assert set(json.loads(content)) == {"task", "made_with", "result"}
    assert f"torch {torch.__version__}" in results.made_with([TINY])[0]
    _make(TINY, str(results.path(TINY)), None, "cpu")
    assert results.path(TINY).read_text() == content
    assert results.missing([TINY]) == []
    results.run([TINY])
    assert results.values([TINY])[0] == results.get(TINY)["error"]


@pytest.mark.parametrize(
    ("method", "density", "pattern", "measure"),
    [
        ("small", 0.3, "unstructured", ""),
        ("lottery", 0.3, "unstructured", ""),
        ("snip", 0.3, "unstructured", "specialization"),
        ("magnitude", 0.5, "2:4", "decorrelation"),
        ("sparse-momentum", 0.05, "unstructured", "channels"),
    ],
)
def test_runs_repeat_and_measure_what_they_are_asked(method: str, density: float, pattern: str, measure: str) -> None:
    task = Task("digits", "conv", method, density, pattern, (), 1, 3, measure)
    torch.manual_seed(5)
    first = train(task, None, "cpu")
    second = train(task, None, "cpu")
    for name in ("error", "weights"):
        assert first[name] == second[name]
    assert 0 <= first["error"] <= 100
    assert first["weights"] < sum(parameter.numel() for parameter in build("conv").parameters())
    wanted = {"specialization": "specialization", "decorrelation": "bins", "channels": "empty"}
    assert measure == "" or wanted[measure] in first
    json.dumps(first)


def test_data_sets_are_found_where_they_are(tmp_path: Path) -> None:
    data = load("digits", None)
    assert len(data.images) // 48 == STEPS_PER_EPOCH["digits"]
    assert scale_of("cpu", has_mnist=False, has_cifar10=False).main.data == "digits"
    assert scale_of("cpu", has_mnist=True, has_cifar10=False).main.data == "mnist"
    with pytest.raises(FileNotFoundError, match="--data"):
        load("mnist", None)
    with pytest.raises(FileNotFoundError, match="train-images"):
        load("mnist", tmp_path)
