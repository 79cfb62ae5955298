"""What a pass is, and the pipeline that runs passes and verifies after each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from sparsefx.errors import VerificationError
from sparsefx.program import Program, Stage
from sparsefx.verify import verify


@dataclass(frozen=True)
class PassResult:
    """What a pass made of a Program.

    Attributes:
        program: the new Program; the same object where nothing changed.
        changed: whether any graph is different now.
    """

    program: Program
    changed: bool


class Pass(ABC):
    """One rewrite of a Program: a frozen dataclass whose fields are its options.

    A pass never changes the Program or the graphs that it is given. Run a second time it changes nothing.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """A verb phrase, as its file is named: ``insert_masks``."""

    @property
    @abstractmethod
    def before(self) -> frozenset[Stage]:
        """The stages that it can start from; its own stage after is one of them."""

    @property
    @abstractmethod
    def after(self) -> Stage:
        """The stage of its result."""

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """The rewrite. `run_pipeline` calls it between two verifications."""


@final
@dataclass(frozen=True)
class Pipeline:
    """Passes in order, with a verification of the stage's spec before the first and after each; nothing turns that off."""

    passes: Sequence[Pass]

    def run(self, program: Program) -> PassResult:
        """Run all passes.

        Raises:
            VerificationError: a Program is not what its stage requires; the message names the pass and those before it.
        """
        verify(program)
        changed = False
        for step in self.passes:
            if program.stage not in step.before:
                expected = " or ".join(sorted(stage.value for stage in step.before))
                raise VerificationError(
                    f"pass {step.name!r} was given a program at stage {program.stage.value}, after {', '.join(program.history)}; "
                    f"expected {expected}. Run the passes that lead there first"
                )
            result = step.run(program)
            program = replace(result.program, stage=step.after, history=(*program.history, step.name))
            verify(program)
            changed = changed or result.changed
        return PassResult(program, changed)
