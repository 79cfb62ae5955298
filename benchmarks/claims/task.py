"""One training run of a claim, as a value: equal tasks are the same run, whichever claims ask for it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsefx.algorithms import find

Option = tuple[str, float | int | str]
RECIPE = 2
"""Of the trainer: raised when runs would come out otherwise, so that none made before is taken for one made since."""


@dataclass(frozen=True)
class Task:
    """A training run.

    Attributes:
        data: ``digits`` (shipped), ``mnist`` or ``cifar10``.
        net: ``conv``, ``lenet300`` or ``resnet``.
        method: ``dense``, ``small``, ``lottery``, or an algorithm of sparsefx.
        density: share of the masked weights that participate; of ``small``, that of the sparse model of its size.
        pattern: of the masks.
        options: for ``attach``, as pairs.
        epochs: of training.
        seed: of first weights, batches and masks.
        measure: ``""``, ``decorrelation``, ``specialization`` or ``channels``: what is looked at beside the test error.
    """

    data: str
    net: str
    method: str
    density: float
    pattern: str
    options: tuple[Option, ...]
    epochs: int
    seed: int
    measure: str = ""

    @property
    def key(self) -> str:
        """A file name: what a reader wants to see of the task, and a digest of all of it."""
        told = json.dumps({**asdict(self), "recipe": RECIPE}, sort_keys=True)
        digest = hashlib.sha256(told.encode()).hexdigest()[:10]
        pattern = self.pattern.replace(":", "-")
        return f"{self.data}-{self.net}-{self.method}-{pattern}-{self.density:g}-seed{self.seed}-{digest}"


@dataclass(frozen=True)
class Setting:
    """Where runs take place at one scale.

    Attributes:
        data, net, epochs: as in `Task`.
        margin: points of test error that count as no difference, fixed before any run.
    """

    data: str
    net: str
    epochs: int
    margin: float


@dataclass(frozen=True)
class Scale:
    """How large the experiments are.

    Attributes:
        name: ``smoke`` (does everything run), ``cpu`` or ``gpu``.
        seeds: of each point.
        main: where most claims are tested.
        images: a convolutional net, for claims about channels and 2-D patterns.
    """

    name: str
    seeds: int
    main: Setting
    images: Setting

    def tasks(
        self,
        method: str,
        density: float = 1.0,
        *,
        pattern: str = "unstructured",
        images: bool = False,
        longer: float = 1,
        measure: str = "",
        **options: Any,
    ) -> list[Task]:
        """One task a seed; ``longer`` is a factor on the epochs."""
        setting = self.images if images else self.main
        first = Task(
            setting.data,
            setting.net,
            method,
            density,
            pattern,
            tuple(sorted(_unlike_defaults(method, options).items())),
            max(1, round(setting.epochs * longer)),
            0,
            measure,
        )
        return [replace(first, seed=seed) for seed in range(self.seeds)]

    def steps(self, *, images: bool = False) -> int:
        """Optimizer steps of a run, for options that count in steps."""
        setting = self.images if images else self.main
        return setting.epochs * STEPS_PER_EPOCH[setting.data]


def _unlike_defaults(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """An option that says what is so anyway makes no other run."""
    algorithm = find(method) if options else None
    return {name: value for name, value in options.items() if getattr(algorithm, name) != value}


BATCH = {"digits": 48, "mnist": 100, "cifar10": 128}
# Training images over the batch size; the last, smaller batch of an epoch is left out.
STEPS_PER_EPOCH = {"digits": 25, "mnist": 540, "cifar10": 351}


def scale_of(name: str, *, has_mnist: bool, has_cifar10: bool) -> Scale:
    """The settings of a scale, with the data that is there: the shipped digits always are."""
    if name == "smoke":
        digits = Setting("digits", "conv", 2, 1.0)
        return Scale("smoke", 2, digits, digits)
    digits = Setting("digits", "conv", 30, 0.5)
    if name == "cpu":
        return Scale("cpu", 5, Setting("mnist", "lenet300", 10, 0.15) if has_mnist else digits, digits)
    images = Setting("cifar10", "resnet", 60, 0.5) if has_cifar10 else digits
    return Scale("gpu", 5, images, images)
