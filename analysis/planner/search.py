"""The search: for every method, setting and number of images at a time, the most layers that fit.

More layers never have a lower fidelity, and for one option and one batch they take no less memory: everything that
is alive with n layers is alive with n + 1 as well. So the largest number that fits in memory is found by bisection.
Where other parameters than weights train (biases, LoRA), what a layer adds may be less than the buffers of the frozen
layers save, which run together: for these every number is tried, from the largest on.
Nor does a step of more images take less: where not even one layer fits, no larger batch is tried.
A batch that goes a few images at a time has the same gradient however many these are; so for such an option the most
layers are found with the fewest images at a time, and then the most images that fit with these layers.
Multiply-adds relative to backpropagation do neither rise nor fall with the layers; under that limit every number below
is tried, from the largest on. The tests compare with all candidates, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import takewhile

from analysis.planner.costs import Costs, Layers, Memory, layers_of, plain, weights_by_layer
from analysis.planner.evidence import Measured, measured
from analysis.planner.fidelity import Fidelity, in_codes, layer_fidelity, layer_shares, whole_fidelity, why_not
from analysis.planner.options import Option
from analysis.steps.methods import METHODS

DIGITS = 4
"""Two fidelities that agree in this number of digits are equal; of equals the larger batch is better."""
SHOWN_DIGITS = 3
"""Digits of a fidelity in tables: one that is shown as 0.000 counts as 0 against one that is not predicted."""


@dataclass(frozen=True)
class Candidate:
    """One option with a number of layers and a batch, and the memory and multiply-adds that it takes."""

    option: Option
    layers: int
    at_a_time: int  #: Images that go forward and backward together.
    fidelity: Fidelity | None  #: None: not predicted.
    measured: Measured | None  #: None: no experiment says.
    memory: Memory
    times_bp: Fraction
    macs: int  #: Of an update; of one image of a device program.
    over_bytes: int  #: Beyond the budget; 0 if it fits.
    too_much_work: bool
    paths: tuple[str, ...] = ()  #: Of the layers, where they are not the last ones of those that may be chosen.

    @property
    def batch(self) -> int:
        """Images of an update; 1 for a device program, whose updates may come after any number of them."""
        return self.at_a_time if self.option.batch is None else self.option.batch

    @property
    def fits(self) -> bool:
        """Memory and multiply-adds."""
        return not self.over_bytes and not self.too_much_work


@dataclass(frozen=True)
class Row:
    """What was found for one option."""

    option: Option
    #: The most faithful that fits (the one with most layers, where that is not predicted), of equals the one with the
    #: largest batch.
    best: Candidate | None
    #: By images at a time, where these were searched: the most layers that fit; None if not even one does (of a method
    #: for which layers do not matter: if it does not fit).
    layers: Mapping[int, int | None]
    #: The one that does not fit and comes first: one layer more than ``best``; if nothing fits, the one that takes
    #: least. None where all layers fit.
    next: Candidate | None
    note: str = ""  #: Why it could not be tried, or why its fidelity is not predicted.


@dataclass(frozen=True)
class Plan:
    """The answer; see :func:`search`."""

    #: Those that fit, the most accurate first by experiments, then the most faithful by prediction, those without a
    #: prediction before those with 0.000; then those that do not fit, by what is missing.
    rows: tuple[Row, ...]
    budget: int
    flops_at_most: Fraction | None
    paths: tuple[str, ...]  #: The layers that could be tuned.
    tried: int = 0  #: Candidates whose memory was worked out.
    skipped: Mapping[str, str] = field(default_factory=dict)  #: Batch sizes that the net cannot run on, and why.
    facts: Mapping[str, str] = field(default_factory=dict)  #: For the heading.
    unit: str = "KiB"  #: Of all sizes that are shown.
    every: tuple[str, ...] = ()  #: All layers of the net but the head, where ``paths`` are some of them.
    target: str = ""  #: What was to be reached with the least RAM, which is the budget then.
    macs_per_second: float | None = None  #: Of the device, for estimates of time.

    @property
    def net(self) -> str:
        """The name of the net, without its width; empty if it is not said."""
        return self.facts.get("name", "").partition("@")[0]

    @property
    def fitting(self) -> tuple[Row, ...]:
        """Rows with something that fits."""
        return tuple(row for row in self.rows if row.best is not None)

    @property
    def shown(self) -> tuple[Row, ...]:
        """The best row of each method on each engine, with subspaces found on the device and elsewhere."""
        first: dict[tuple[str, str, bool], Row] = {}
        for row in self.rows:
            first.setdefault((row.option.engine, row.option.method, row.option.elsewhere), row)
        return tuple(first.values())

    @property
    def closest(self) -> Candidate | None:
        """If nothing fits: the candidate that exceeds the budget least, if possible one that is not too much work."""
        if self.fitting:
            return None
        return min((row.next for row in self.rows if row.next), key=_excess, default=None)


def search(
    costs: Costs,
    options: Sequence[Option],
    batches: Sequence[int],
    budget: int,
    flops_at_most: Fraction | None = None,
    shares: str = "layers",
    most_layers: int | None = None,
    improve: Callable[[Finder, list[Row]], list[Row]] | None = None,
) -> Plan:
    """Find the options that fit, with the number of layers and the batch, ranked by predicted gradient fidelity.

    Parameters
    ----------
    budget : int
        Bytes of RAM.
    flops_at_most : Fraction, optional
        Multiply-adds relative to backpropagation through the same layers with the same batch.
    shares : str
        See :func:`analysis.planner.fidelity.layer_shares`.
    most_layers : int, optional
        To try, of the layers of the net; all by default. Fidelity is about all layers in any case.
    improve : callable, optional
        What makes better rows of those that were found (:func:`analysis.planner.sets.with_sets`).
    """
    finder = finder_for(costs, batches, budget, flops_at_most, shares, most_layers)
    rows = _rows(finder, options, sorted(batches))
    rows = rows if improve is None else improve(finder, rows)
    order = sorted(range(len(rows)), key=lambda i: (*_rank(rows[i]), i))
    tried = costs.memory.cache_info().currsize
    skipped = {f"batch {batch}": costs.runs(batch) for batch in batches if costs.runs(batch)}
    return Plan(tuple(rows[i] for i in order), budget, flops_at_most, costs.layers, tried, skipped, every=costs.every)


def finder_for(
    costs: Costs,
    batches: Sequence[int],
    budget: int,
    flops_at_most: Fraction | None,
    shares: str,
    most_layers: int | None,
) -> Finder:
    """The search for one option after the other, its arguments checked; those of :func:`search`."""
    count = len(costs.layers)
    if not count:
        raise ValueError(f"net {costs.name!r} has no layer to tune besides its head")
    if most_layers is not None and not 1 <= most_layers <= count:
        raise ValueError(f"--layers is {most_layers}, expected 1 to {count}, the layers of the net besides the head")
    runs = [batch for batch in batches if not costs.runs(batch)]
    if not runs:
        raise ValueError(costs.runs(batches[0]))
    weights = weights_by_layer(costs.whole(runs[0]).records, costs.every)
    return Finder(costs, budget, flops_at_most, layer_shares(shares, weights), most_layers or count, runs[0])


def _rows(finder: Finder, options: Sequence[Option], batches: Sequence[int]) -> list[Row]:
    """A row for every option, but for those that have no use beside a plainer one."""
    rows: dict[Option, Row] = {}
    ample = set()
    for option in options:
        kind = (option.method, option.epsilon, option.fraction, option.directions, option.update)
        twin = rows.get(replace(option, elsewhere=False)) if option.elsewhere else None
        is_plain = option == plain(option) and not option.by_image and option.core_bits is None
        if not is_plain and kind in ample:
            continue
        row = finder.row(option, batches)
        best = row.best
        if is_plain and best is not None and best.layers in (0, finder.most_layers) and best.at_a_time == batches[-1]:
            ample.add(kind)  # of everything the most: there is nothing to be won by combining it with more
        if not _alike(row, twin) and (best is not None or option.batch is None):
            rows[option] = row
    return list(rows.values())


def _alike(row: Row, twin: Row | None) -> bool:
    """Whether a row says what its twin says already: of what fits the same candidate, else the same memory."""
    if twin is None or (row.best is None) != (twin.best is None):
        return False
    if row.best is not None and twin.best is not None:
        ours, theirs = ((c.layers, c.batch, c.at_a_time) for c in (row.best, twin.best))
        return ours == theirs
    return row.next is None or (twin.next is not None and row.next.memory.total == twin.next.memory.total)


def _rank(row: Row) -> tuple[float, ...]:
    """The order of the rows: fits, measured accuracy, fidelity, batch, multiply-adds, memory; then what is missing.

    A fidelity that is not predicted may be any. So it stands behind those that are known to be more than 0.000, and
    before those that are known to be 0.000. The head alone is behind all: in every experiment more layers were better.
    """
    best = row.best
    if best is None:
        return (5,) if row.next is None else (4, *_excess(row.next))
    of = best.measured
    place = 2 if best.fidelity is None else 1 if round(best.fidelity.estimate, SHOWN_DIGITS) > 0 else 3
    if of is not None and best.layers:
        place = 0
    accuracy = -round(of.accuracy, 2) if of is not None else 0.0  # less than a point is no difference
    faithful, batch, _ = _order(best.fidelity, best.layers, best.option, best.at_a_time)
    return place, accuracy, faithful, batch, best.macs / best.batch, best.memory.total


NEAR = 0.03
"""Accuracy that a device program has to win for it to be put before a step of the library that fits."""


def merged(library: Plan, device: Plan) -> Plan:
    """One plan of both engines, the rows of each together.

    The library's come first, which takes whole batches and is faster, unless nothing of it fits but the head, or the
    best device program is better by :data:`NEAR` where both were measured, or trains more layers where they were not.
    """
    ours, theirs = (plan.rows[0].best for plan in (library, device))
    if ours is None or not ours.layers:
        device_first = theirs is not None
    elif theirs is None or not theirs.layers:
        device_first = False
    elif ours.measured is not None and theirs.measured is not None:
        device_first = theirs.measured.accuracy > ours.measured.accuracy + NEAR
    else:
        device_first = theirs.layers > ours.layers
    plans = (device, library) if device_first else (library, device)
    fits, rest = (
        [row for plan in plans for row in plan.rows if (row.best is not None) is yes] for yes in (True, False)
    )
    rest.sort(key=_rank)
    facts = {**library.facts, "device": device.facts.get("remark", "")}
    return replace(library, rows=(*fits, *rest), tried=library.tried + device.tried, facts=facts)


def may_shrink(option: Option) -> bool:
    """Whether a step of the library may take less with more layers; see the top of this file."""
    return bool(METHODS[option.method].tune) and METHODS[option.method].layers and not option.update


def _order(fidelity: Fidelity | None, layers: int, option: Option, at_a_time: int) -> tuple[float, int, int]:
    """The best first: by fidelity, or by layers where that is not predicted; of equals the larger batch."""
    batch = at_a_time if option.batch is None else option.batch
    return (-layers if fidelity is None else -round(fidelity.estimate, DIGITS)), -batch, -at_a_time


def _excess(candidate: Candidate) -> tuple[int, float]:
    """The excess in memory, then in work: a candidate within the budget can only be too much work."""
    return candidate.over_bytes, float(candidate.times_bp) if candidate.too_much_work else 0.0


class Finder:
    """The search for one option after the other."""

    def __init__(
        self,
        costs: Costs,
        budget: int,
        flops_at_most: Fraction | None,
        shares: Mapping[str, float],
        most_layers: int,
        runs: int,
    ) -> None:
        self.costs, self.budget, self.flops_at_most = costs, budget, flops_at_most
        self.shares, self.most_layers = shares, most_layers
        self.runs = runs  # a batch size that the net runs on
        self.reason = ""  # why the option at hand could not be had

    def row(self, option: Option, batches: Sequence[int]) -> Row:
        """The best of one option, over all batches and numbers of layers."""
        note = why_not(option, self.costs.spectra is not None) or ""
        layers: dict[int, int | None] = {}
        found: list[tuple[tuple[float, int, int], int, int]] = []  # (order, layers, images at a time)
        if METHODS[option.method].parts and not self.costs.exact_statistics(self.runs):
            note = "batch norm takes the statistics of each part"
        most = self.most_layers if METHODS[option.method].layers else 1
        guess, self.reason = most, ""
        if option.batch is not None:
            found = self._in_parts(option, batches, most)
            if not found:
                return Row(option, None, {}, None, "it takes whole batches, or nothing of it fits")
        for batch in batches if option.batch is None else ():
            too_large = bool(layers) and guess == 0
            n = 0 if self.costs.runs(batch) or too_large else self._most_layers(option, batch, most, guess)
            layers[batch] = layers_of(option)(n) if n else None
            if n:
                guess = n
                of = None if note else self.fidelity(option, layers_of(option)(n), batch)
                found.append((_order(of, n, option, batch), n, batch))
            elif not self.costs.runs(batch) and not self.reason and self.flops_at_most is None:
                guess = 0
        if not found:
            least = self._least(option, batches, most)
            return Row(option, None, layers, least, note if least else self.reason)
        _, n, batch = min(found)
        best = self.candidate(option, n, batch, predict=not note)
        after = None
        if METHODS[option.method].layers and best.layers < self.most_layers:
            after = self._try(option, best.layers + 1, best.at_a_time)
        return Row(option, best, layers, after, note)

    def candidate(self, option: Option, layers: Layers, batch: int, predict: bool = True) -> Candidate:
        """All about one candidate; ValueError if the method does not fit."""
        n = layers_of(option)(layers) if isinstance(layers, int) else layers
        count, paths = (n, ()) if isinstance(n, int) else (len(n), n)
        memory = self.costs.memory(option, n, batch)
        times = self.costs.times_bp(option, n, batch)
        return Candidate(
            option, count, batch, self.fidelity(option, n, batch) if predict else None,
            self.evidence(option, n), memory, times,
            self.costs.macs(plain(option), n, batch) * (1 if option.batch is None else option.batch // batch),
            max(0, memory.total - self.budget), self.flops_at_most is not None and times > self.flops_at_most,
            paths,
        )  # fmt: skip

    def evidence(self, option: Option, layers: Layers) -> Measured | None:
        """What the experiments say about the option with this number of layers."""
        return measured(self.costs.name, option, self.costs.depth(layers))

    def parts(self, option: Option, batches: Sequence[int]) -> list[int]:
        """How many images at a time the option's batch can go, of these numbers, fewer than all; ascending."""
        assert option.batch is not None
        sizes = [k for k in batches if k < option.batch and option.batch % k == 0 and not self.costs.runs(k)]
        return [] if not sizes or self.costs.mixing(plain(option), sizes[0]) is not None else sizes

    def worth(self, option: Option, path: str, batch: int, predicted: bool) -> float:
        """What a layer adds to the fidelity; where that is not predicted, its share of the gradient."""
        of = self.fidelity(option, (path,), batch) if predicted else None
        return self.shares[path] if of is None else of.estimate

    def fidelity(self, option: Option, layers: Layers, batch: int) -> Fidelity | None:
        """Predicted for these layers and so many images at a time; None if it is not."""
        kept, ranks, shapes = {}, self.costs.ranks(option, batch), self.costs.shapes(batch)
        for path in self.costs.trains(layers)[0]:
            spectra = self.costs.spectra.layers[path] if self.costs.spectra else None
            of = layer_fidelity(option, shapes[path], ranks.get(path), spectra)
            if of is None:
                return None
            kept[path] = of if option.core_bits is None else in_codes(of, shapes[path], ranks[path])
        return whole_fidelity(self.shares, kept)

    # ---- one option, one batch -----------------------------------------------------------------

    def _in_parts(
        self, option: Option, batches: Sequence[int], most: int
    ) -> list[tuple[tuple[float, int, int], int, int]]:
        """The most layers with the fewest images at a time, the most images with these layers; empty if none fit."""
        sizes = self.parts(option, batches)
        if not sizes:
            return []
        n = self._most_layers(option, sizes[0], most, most)
        tried = ((k, self._try(option, n, k)) for k in sizes[1:] if n)
        fitting = takewhile(lambda each: each[1] is not None and each[1].fits, tried)
        most_images = max((k for k, _ in fitting), default=sizes[0])
        return [(_order(None, n, option, most_images), n, most_images)] if n else []

    def _most_layers(self, option: Option, batch: int, most: int, guess: int) -> int:
        """The largest number of layers that fits, 0 if none does; ``guess`` is tried before bisection."""
        try:
            n = self._bisect(option, batch, most, guess)
        except ValueError as error:  # some numbers of layers cannot be had, others may
            self.reason = str(error)
            tried = ((n, self._try(option, n, batch)) for n in range(most, 0, -1))
            return next((n for n, candidate in tried if candidate is not None and candidate.fits), 0)
        if self.flops_at_most is not None:
            cheap = (k for k in range(n, 0, -1) if self._times_bp(option, k, batch) <= self.flops_at_most)
            n = next(cheap, 0)
        return n

    def _bisect(self, option: Option, batch: int, most: int, guess: int) -> int:
        if may_shrink(option):
            return next((n for n in range(guess, 0, -1) if self._fits_in_memory(option, n, batch)), 0)
        low, high = 0, most + 1  # low fits (nothing does), high does not
        for n in (1, guess, guess + 1):
            if low < n < high:
                low, high = (n, high) if self._fits_in_memory(option, n, batch) else (low, n)
        while high - low > 1:
            n = (low + high) // 2
            low, high = (n, high) if self._fits_in_memory(option, n, batch) else (low, n)
        return low

    def _fits_in_memory(self, option: Option, layers: int, batch: int) -> bool:
        return self.costs.memory(option, layers_of(option)(layers), batch).total <= self.budget

    def _times_bp(self, option: Option, layers: int, batch: int) -> Fraction:
        return self.costs.times_bp(option, layers_of(option)(layers), batch)

    def _try(self, option: Option, layers: int, batch: int) -> Candidate | None:
        try:
            return self.candidate(option, layers, batch)
        except ValueError:
            return None

    def _least(self, option: Option, batches: Sequence[int], most: int) -> Candidate | None:
        """If nothing fits: the candidate with the fewest layers that are possible and the smallest batch.

        If these fit in memory they are too much work, and so is all else that fits: then the one with the least work.
        """
        first = next(self._existing(option, batches, most), None)
        if first is None or first.over_bytes:
            return first
        within = [c for c in self._existing(option, batches, most) if not c.over_bytes]
        return min(within, key=lambda c: c.times_bp)

    def _existing(self, option: Option, batches: Sequence[int], most: int) -> Iterator[Candidate]:
        for batch in batches:
            for n in range(1, most + 1):
                candidate = self._try(option, n, batch)
                if candidate is not None:
                    yield candidate
                    if candidate.over_bytes:
                        break
