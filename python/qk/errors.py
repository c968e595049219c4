"""Errors of the stages: "stage: argument must be X, got Y. What to do."."""

from __future__ import annotations


class QkError(ValueError):
    """Input that a stage cannot work with; the message says what, where, and what to do."""


def fail(stage: str, argument: str, expected: str, got: object, advice: str = "") -> QkError:
    """The error to raise. stage: the public function, such as "qk.calibrate"."""
    text = f"{stage}: {argument} must be {expected}, got {got}".rstrip(".")  # what got quotes may end in one
    return QkError(f"{text}. {advice}".rstrip())
