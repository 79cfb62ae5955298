"""The models that the coverage sweep and its relatives run over: every library's cases, by name."""

from benchmarks.zoo.case import Case
from benchmarks.zoo.cases import LIBRARIES, cases, find

__all__ = ["LIBRARIES", "Case", "cases", "find"]
