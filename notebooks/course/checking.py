"""Exercises: ``course.check("1.1", answer)`` says whether an answer is right, or what is off.

The checks are in ``course.checks``, one module a lesson. Each is a function of the answer which returns None if the
answer is right, and otherwise a sentence that helps and does not give the answer away.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Check = Callable[[Any], str | None]
CHECKS: dict[str, Check] = {}


class Reached(str):
    """What a check returns where an answer is right and a number says how good it is."""


class NotAnsweredError(Exception):
    """Raised by a check whose answer is a function without a body."""


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, as a condition; printed, it says what is off."""

    right: bool
    sentence: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return self.sentence


def exercise(number: str) -> Callable[[Check], Check]:
    """Register a check under the number of its exercise, such as ``"1.2"``."""

    def register(function: Check) -> Check:
        if number in CHECKS:
            raise ValueError(f"exercise {number} has two checks: {CHECKS[number].__name__} and {function.__name__}")
        CHECKS[number] = function
        return function

    return register


def answered(result: Any) -> Any:
    """The result of calling an answer.

    Raises
    ------
    NotAnsweredError
        If it is None: the function has no body yet.
    """
    if result is None:
        raise NotAnsweredError
    return result


def check(number: str, answer: Any) -> Verdict:
    """Whether an answer is right, or what is off.

    Parameters
    ----------
    number : str
        ``"1.2"`` is exercise 2 of lesson 1.
    answer : object
        A number, an array or a function, as the exercise asks. None, or a function without a body, is no answer yet.

    Raises
    ------
    ValueError
        If there is no such exercise.
    """
    lesson = number.partition(".")[0]
    if lesson.isdecimal() and importlib.util.find_spec(f"course.checks.lesson{int(lesson):02d}") is not None:
        importlib.import_module(f"course.checks.lesson{int(lesson):02d}")
    if number not in CHECKS:
        raise ValueError(f"there is no exercise {number!r}, expected a number such as '1.2'")
    try:
        fault = None if answer is None else CHECKS[number](answer)
    except NotAnsweredError:
        answer = None
        fault = None
    except Exception as error:  # whatever the reader's function does
        fault = f"it raises {type(error).__name__}: {error}"
    if answer is None:
        return Verdict(False, f"{number}: no answer yet")
    if isinstance(fault, Reached):
        return Verdict(True, f"{number}: reached: {fault}")
    return Verdict(not fault, f"{number}: not yet: {fault}" if fault else f"{number}: right")


def whole_number(answer: Any, right: int, hints: dict[int, str], otherwise: str) -> str | None:
    """What is off with a whole number: the hint of a well-known wrong answer, else ``otherwise``."""
    if isinstance(answer, bool) or not isinstance(answer, int):
        try:
            if int(answer) != answer:
                return f"{answer!r} is not a whole number"
        except (TypeError, ValueError):
            return f"expected a whole number, got {answer!r}"
    return None if int(answer) == right else hints.get(int(answer), otherwise)
