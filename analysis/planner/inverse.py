"""Inverse questions: the least RAM for a target, and the largest image, batch and number of directions that fit."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from analysis.planner.asked import device_costs, library_costs, shape_of
from analysis.planner.costs import Costs
from analysis.planner.fidelity import why_not
from analysis.planner.options import Option, Target
from analysis.planner.search import Candidate, Finder, Plan, Row, finder_for, may_shrink
from analysis.steps.methods import METHODS
from lance_ref import models

SMALLER_SIZES = (192, 160, 128, 96, 64, 48, 32)
FEWER_CLASSES = (100, 10, 2)
PIXELS, TIMES = 8, 4
"""Steps in which the largest image is looked for, and up to how many times the size at hand."""
DOUBLINGS = 10
"""How often the batch is doubled at most, in search of the largest."""


def least(
    costs: Costs,
    options: Sequence[Option],
    batches: Sequence[int],
    target: Target,
    flops_at_most: Fraction | None = None,
    shares: str = "layers",
    most_layers: int | None = None,
) -> Plan:
    """What reaches a target with the least RAM, of every option; the budget of the plan is the least of all.

    The parameters are those of :func:`analysis.planner.search.search`. For every option the fewest layers that reach
    the target are taken, with the fewest images at a time that it runs on. A row without a candidate does not reach
    it.
    """
    finder = finder_for(costs, batches, 2**62, flops_at_most, shares, most_layers)
    rows = [_least(finder, option, sorted(batches), target) for option in options]
    reaching = sorted((row for row in rows if row.best is not None), key=by_memory)
    rest = [row for row in rows if row.best is None and row.option.batch is None]
    budget = by_memory(reaching[0])[0] if reaching else 0
    tried = costs.memory.cache_info().currsize
    return Plan((*reaching, *rest), budget, flops_at_most, costs.layers, tried, every=costs.every, target=str(target))


def by_memory(row: Row) -> tuple[int, int]:
    """The order of rows that reach a target: bytes first, of equals the larger batch; those that do not are last."""
    return (2**63, 0) if row.best is None else (row.best.memory.total, -row.best.batch)


def _least(finder: Finder, option: Option, batches: Sequence[int], target: Target) -> Row:
    note = why_not(option, finder.costs.spectra is not None) or ""
    counts = range(1, finder.most_layers + 1) if METHODS[option.method].layers else (0,)
    sizes = [images for images in batches if not finder.costs.runs(images)]
    for images in sizes if option.batch is None else finder.parts(option, sizes):
        reached = (n for n in counts if _reaches(finder, option, n, images, target, not note))
        n = next(reached, None)
        if n is None:
            return Row(option, None, {}, None, note)
        # Where other parameters than weights train, more layers may take less; see the search.
        more = range(n, finder.most_layers + 1) if may_shrink(option) else (n,)
        try:
            found = [finder.candidate(option, k, images, predict=not note) for k in more]
        except ValueError as error:
            return Row(option, None, {}, None, str(error))
        best = min(found, key=lambda candidate: candidate.memory.total)
        return Row(option, None if best.too_much_work else best, {}, None, note)
    return Row(option, None, {}, None, note)


def _reaches(finder: Finder, option: Option, layers: int, images: int, target: Target, predicted: bool) -> bool:
    if target.kind == "layers":
        return layers >= target.value
    if target.kind == "accuracy":
        of = finder.evidence(option, layers)
        return of is not None and 100 * of.accuracy >= target.value
    fidelity = finder.fidelity(option, layers, images) if predicted else None
    return fidelity is not None and fidelity.estimate >= target.value


def largest(fits: Callable[[int], bool], values: Sequence[int]) -> int | None:
    """The largest of ascending values that fits, where every smaller one than one that fits does too; None if none.

    >>> largest(lambda n: n * n <= 50, [2, 4, 6, 8, 10])
    6
    """
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1] if low else None


# ---- other numbers of what was asked for ------------------------------------------------------------


def room(options: argparse.Namespace, plan: Plan, first: Candidate) -> Iterator[str]:
    """The largest image, batch and number of directions with which the first candidate still fits, as clauses.

    Directions are those of the first device program that has some.
    """
    shape, option = shape_of(options), first.option

    def fits(side: int, images: int, of: Candidate = first, directions: int | None = option.directions) -> bool:
        sized = (shape[0], side, side) if len(shape) == 3 and side != shape[-1] else shape
        changed = replace(of.option, directions=directions)
        try:
            costs = device_costs(options, sized)[0] if changed.update else library_costs(options, sized)[0]
            return costs.memory(changed, of.paths or of.layers, images).total <= plan.budget
        except ValueError:  # a net that takes no such image
            return False

    side, images = shape[-1], first.at_a_time
    programs = (row.best for row in plan.fitting if row.best is not None and row.option.directions is not None)
    program = first if option.directions is not None else next(programs, None)
    for what in options.largest:
        if what == "image-size" and (len(shape) != 3 or options.net.endswith(".onnx")):
            yield "its inputs have one size"
        elif what == "image-size" and option.epsilon is not None:
            yield "the largest image is not known, for there are spectra of this size alone"
        elif what == "image-size":
            most = TIMES * side
            found = largest(lambda n: fits(n, images), range(side, most + 1, PIXELS))
            yield f"images of {found} pixels{_tried(found, most)}"
        elif what == "batch" and (option.update or option.batch is not None):
            yield f"a batch of any size, {images} image{'' if images == 1 else 's'} at a time"
        elif what == "batch":
            sizes = [images * 2**k for k in range(DOUBLINGS + 1)]
            found = largest(lambda n: fits(side, n), sizes)
            yield f"a batch of {found}{_tried(found, sizes[-1])}"
        elif program is None:
            yield "directions are those of LANCE as a device program, and none of these fits"
        else:
            yield _most_directions(fits, side, program)


def _most_directions(fits: Callable[..., bool], side: int, program: Candidate) -> str:
    """The largest number of directions of a device program that fits with some directions."""
    directions = program.option.directions
    assert directions is not None
    numbers = range(directions, 4 * directions + 1)
    found = largest(lambda n: fits(side, 1, program, n), numbers)
    return f"{found} directions{_tried(found, numbers[-1])}, of the device program with {program.layers} layers"


def _tried(found: int | None, most: int) -> str:
    return ", the most that was tried" if found == most else ""


def smaller(options: argparse.Namespace, plan: Plan) -> str:
    """If nothing fits: the options that were left at their defaults and would make a step smaller."""
    if plan.closest is None or not plan.closest.over_bytes:
        return ""
    built_in = options.net.partition("@")[0]
    of_vectors = built_in in models.NETS and len(models.NETS[built_in].input_shape) == 1
    fixed = of_vectors or options.net.endswith(".onnx")
    left = {
        "--image-size": options.image_size is None and options.input_shape is None and not fixed,
        "--num-classes": options.num_classes is None and built_in in models.names(),
        "--batch": plan.closest.batch > 1,
    }
    names = [name for name, there in left.items() if there]
    return f"A smaller {' or '.join(names)} may help." if names else ""


def what_would_fit(options: argparse.Namespace, plan: Plan) -> str:
    """If nothing fits: the largest image, or the most classes, with which something fits, of the few that are tried."""
    built_in = options.net.partition("@")[0]
    if built_in not in models.names() or plan.closest is None or not plan.closest.over_bytes:
        return plan.facts.get("smaller", "")
    found = []
    size = options.image_size or (models.NETS[built_in].input_shape[-1] if options.input_shape is None else 0)
    images = len(models.NETS[built_in].input_shape) == 3 and options.input_shape is None
    for name, values, now in (
        ("image_size", SMALLER_SIZES if images else (), size),
        ("num_classes", FEWER_CLASSES, int(plan.facts["classes"])),
    ):
        value = next((value for value in values if value < now and _fits(options, name, value, plan.budget)), None)
        if value is not None:
            found.append(f"--{name.replace('_', '-')} {value}")
    return f"Something fits with {' or with '.join(found)}." if found else plan.facts.get("smaller", "")


def _fits(options: argparse.Namespace, name: str, value: int, budget: int) -> bool:
    """Whether the head alone fits with another value of an option: there is nothing that takes less."""
    asked = argparse.Namespace(**{**vars(options), name: value, "spectra": None, "tune": None})
    images = min(options.batch)
    try:
        if options.engine != "library" and options.optimizer != "adam":
            program = Option("head-only", update="image")
            if device_costs(asked, shape_of(asked))[0].memory(program, 0, 1).total <= budget:
                return True
        if options.engine == "device":
            return False
        return library_costs(asked, shape_of(asked))[0].memory(Option("head-only"), 0, images).total <= budget
    except (ValueError, LookupError):
        return False
