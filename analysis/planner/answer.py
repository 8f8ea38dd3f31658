"""The short answer of a plan: what to train, how good that was where it was measured, and what else fits.

Sizes are in the unit of the budget, rounded up, so that what does not fit is never shown as fitting.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from analysis.planner.options import UNITS
from analysis.planner.search import SHOWN_DIGITS, Candidate, Plan, Row

ALTERNATIVES = 3
"""The largest number of alternatives, each with what it gives up; the tables have all."""
DIGITS = {"B": 0, "KiB": 1, "MiB": 2, "GiB": 3}


def amount(nbytes: int, unit: str) -> str:
    """A number of bytes in a unit, rounded up, without the unit.

    >>> amount(524288, "KiB"), amount(524289, "MiB")
    ('512.0', '0.51')
    """
    scale = 10 ** DIGITS[unit]
    parts = -(-nbytes * scale // UNITS[unit])
    return f"{parts // scale:,}" + (f".{parts % scale:0{DIGITS[unit]}d}" if DIGITS[unit] else "")


def answer(plan: Plan) -> list[str]:
    """Sentences: what fits best, and the alternatives; or the closest, and what would make something fit."""
    if plan.fitting:
        first = plan.fitting[0].best
        assert first is not None
        total, budget = amount(first.memory.total, plan.unit), amount(plan.budget, plan.unit)
        begin = f"Train {title(first, plan)}: {total} of {budget} {plan.unit}."
        if plan.target:
            begin = f"The least RAM for {plan.target}: {total} {plan.unit}. Train {title(first, plan)}."
        room = plan.facts.get("room", "")
        return [f"{begin} {_known(first, plan)}", *([room] if room else []), *_alternatives(plan, first)]
    closest = plan.closest
    if plan.target:
        return [f"Nothing that was tried reaches {plan.target}. {plan.facts.get('reach', '')}".rstrip()]
    if closest is None:
        return ["Nothing fits, and there was nothing that could be tried."]
    if not closest.over_bytes:
        much = f"{float(closest.times_bp):.3f}x backpropagation's FLOPs, too much work"
        return [f"Nothing fits. Closest: {title(closest, plan)}: {much}."]
    sentence = (
        f"Nothing fits in {amount(plan.budget, plan.unit)} {plan.unit}. Closest: {title(closest, plan)}: "
        f"{amount(closest.memory.total, plan.unit)} {plan.unit}, {amount(closest.over_bytes, plan.unit)} {plan.unit} "
        f"too much{_where(closest, plan.unit)}. {plan.facts.get('smaller', '')}"
    )
    return [sentence.rstrip()]


def title(candidate: Candidate, plan: Plan) -> str:
    """What is trained, how, and on which engine."""
    option, count, n = candidate.option, len(plan.paths), candidate.layers
    chosen = f"the {count} chosen layers" if 0 < count < len(plan.every) else f"{count} layers"
    layers = f"all {chosen.removeprefix('the ')}" if n == count else f"the last {n} of {chosen}"
    layers = "the last layer" if n == 1 < count else layers
    if candidate.paths:
        layers = f"{n} layer{'' if n == 1 else 's'} chosen one by one"
    name = replace(option, update="").name  # when a program updates is said in words
    what = f"{layers} with {name}" if n else name
    how = f"batch {images(candidate).replace(' by ', ' in parts of ')}"
    if option.update:
        how = f"one image at a time with {'an update after each' if option.update == 'image' else 'one update a batch'}"
    engine = "a device program" if option.update else "a step of the library"
    elsewhere = ", calibrated elsewhere" if option.elsewhere else ""
    return f"{what}, {how}{elsewhere}, as {engine}"


def images(candidate: Candidate) -> str:
    """Images of an update, and how many of them at a time where these are fewer, as the tables have them."""
    parts = f" by {candidate.at_a_time}" if candidate.at_a_time < candidate.batch else ""
    return f"{candidate.batch}{parts}"


def fidelity(candidate: Candidate) -> str:
    """The estimate with three digits, or that there is none."""
    return "not predicted" if candidate.fidelity is None else f"{candidate.fidelity.estimate:.{SHOWN_DIGITS}f}"


def _known(candidate: Candidate, plan: Plan) -> str:
    """Its accuracy where that was measured, and its predicted fidelity."""
    of = candidate.measured
    accuracy = "not measured in this repository"
    if of is not None:
        family = "" if plan.net in ("", of.net) else f", of the family of {plan.net}"
        accuracy = f"{of.shown}{family}"
    predicted = "not known" if candidate.fidelity is None else f"{fidelity(candidate)} of 1"
    return f"Accuracy: {accuracy}; predicted gradient fidelity: {predicted}."


def _alternatives(plan: Plan, first: Candidate) -> list[str]:
    """The best of other methods, and what each gives up beside the first."""
    others: dict[tuple[str, str], Candidate] = {}
    for row in plan.fitting:
        best = row.best
        assert best is not None
        key = (best.option.engine, best.option.method)
        if key != (first.option.engine, first.option.method):
            others.setdefault(key, best)
    # Of each engine at least one: what the library needs and what a program of one's own needs are far apart.
    shown = list(others.values())[: ALTERNATIVES - 1]
    rest = [c for c in others.values() if c not in shown]
    engines = {c.option.engine for c in (first, *shown)}
    shown += [next((c for c in rest if c.option.engine not in engines), rest[0])] if rest else []
    lines = [f"Or {title(other, plan)}: {_beside(other, first, plan)}." for other in shown]
    more = len(others) - len(shown)
    if more:
        lines.append(f"{more} more method{_verb(more, plan)}; see the table.")
    return lines or ["No other method does." if plan.target else "No other method fits."]


def _verb(count: int, plan: Plan) -> str:
    one, several = (" does", "s do") if plan.target else (" fits", "s fit")
    return one if count == 1 else several


def _beside(other: Candidate, first: Candidate, plan: Plan) -> str:
    """What another candidate takes, and what it gives up or gains beside the first."""
    parts = [f"{amount(other.memory.total, plan.unit)} {plan.unit}"]
    if other.measured is not None and first.measured is not None:
        points = 100 * (other.measured.accuracy - first.measured.accuracy)
        much = f"{abs(points):.1f} points {'more' if points > 0 else 'less'}" if abs(points) >= 0.05 else "the same"
        parts.append(f"{much} accuracy where both were measured")
    elif first.measured is not None:
        parts.append("its accuracy was not measured")
    if not other.layers and first.layers:
        parts.append("the classifier alone trains")
    elif other.layers < first.layers:
        fewer = first.layers - other.layers
        parts.append(f"{fewer} layer{'' if fewer == 1 else 's'} fewer")
    if other.option.engine == first.option.engine and other.batch < first.batch:
        parts.append(f"updates after {other.batch} image{'' if other.batch == 1 else 's'} in place of {first.batch}")
    ours, theirs = (Fraction(c.macs, c.batch) for c in (first, other))  # of an image
    if ours and theirs > ours * Fraction(5, 4):
        parts.append(f"{float(theirs / ours):.1f} times the multiply-adds")
    if other.memory.calibration > other.memory.training:
        parts.append("most of it while the subspaces are found, which another machine can do")
    return ", ".join(parts)


def _where(candidate: Candidate, unit: str) -> str:
    """What exceeds the budget: the calibration, the weights, or the peak."""
    if candidate.memory.calibration > candidate.memory.training:
        return " while it is calibrated"
    if 2 * candidate.memory.weights > candidate.memory.total:
        return f" (the weights that train alone take {amount(candidate.memory.weights, unit)} {unit})"
    return f" ({candidate.memory.at})" if candidate.memory.at else ""


def missing(row: Row, unit: str) -> str:
    """What the next candidate of a row lacks: bytes, or work."""
    candidate = row.next
    if candidate is None:
        return "-"
    if candidate.over_bytes:
        return f"{amount(candidate.over_bytes, unit)} {unit}"
    return f"{float(candidate.times_bp):.2f}x FLOPs" if candidate.too_much_work else "-"
