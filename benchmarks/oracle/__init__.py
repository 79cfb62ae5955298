"""What could be removed from a model, found by brute force and without looking at its graph."""

from benchmarks.oracle.search import CONFIRMED, Oracle, TooLarge, Verdict

__all__ = ["CONFIRMED", "Oracle", "TooLarge", "Verdict"]
