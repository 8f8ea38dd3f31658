"""Findings: statements that hold with the numbers of a lesson, and may stop holding when the reader changes one.

A lesson has two kinds of statements in code. An ``assert`` is a theorem or an identity: it holds for all numbers. An
:func:`expect` is a finding: with other numbers it may be false, and then the reader is told and the lesson goes on.
"""

from __future__ import annotations

import os

CHECKED = "LANCE_REF_LESSON_CHECKED"
"""While this variable of the environment is set, a finding that does not hold is an error (``notebooks/check.py``)."""


def checked() -> bool:
    """Whether a program runs the lesson to check it, and not a reader."""
    return bool(os.environ.get(CHECKED))


def expect(holds: object, sentence: str) -> None:
    """State a finding.

    Parameters
    ----------
    holds : object
        Whether it holds, as ``bool`` understands it.
    sentence : str
        The finding as a whole sentence.

    Raises
    ------
    AssertionError
        If it does not hold while the lesson is checked (:func:`checked`). A reader sees a line instead.
    """
    if holds:
        return
    if checked():
        raise AssertionError(f"this finding of the lesson does not hold: {sentence}")
    print(f"With your numbers this is no longer so: {sentence}")
