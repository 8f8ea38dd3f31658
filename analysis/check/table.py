"""The outcomes of a validation, judged and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.check.cells import SHOWN_DIFFERENCES
from analysis.check.measure import MAC_KINDS, MOST_OBJECT_BYTES, OBJECT_BYTES, PEAK, PEAK_SHARE
from analysis.steps.methods import METHODS

COLUMNS = {
    "tape": ("tape bytes",),
    "factors": ("factor bytes",),
    "multiply-adds": tuple(f"{kind} multiply-adds" for kind in MAC_KINDS),
    "PyTorch keeps": ("pytorch bytes",),
    "PyTorch FLOPs": ("FLOPs forward, FlopCounterMode", "FLOPs backward, FlopCounterMode"),
    "peak": (PEAK,),
}
"""The columns of the table of all steps, with the quantities that each pair of columns sums."""

LARGE_PEAK = 2**20
"""Bytes, from which on Python's own objects matter little."""

Outcome = Mapping[str, Any]


def steps(outcomes: Sequence[Outcome]) -> Iterator[tuple[Outcome, str, Outcome]]:
    """(cell, method, what came of it), one for each step."""
    for outcome in outcomes:
        for method, found in outcome["methods"].items():
            yield outcome, method, found


def verdict(found: Outcome) -> str:
    """The verdict on one step: ``agrees``, ``DIFFERS``, ``FAILED`` or ``left out``."""
    if "left_out" in found:
        return "left out"
    if "failed" in found or not found["quantities"]:
        return "FAILED"
    return "DIFFERS" if any(entry["differing"] for entry in found["quantities"].values()) else "agrees"


def summary(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many steps came out how, and how many numbers were compared.

    A step is a net with a method, a batch size and a dtype.
    """
    counts = Counter(verdict(found) for _, _, found in steps(outcomes))
    peaks = [found["quantities"][PEAK] for _, _, found in steps(outcomes) if PEAK in found.get("quantities", {})]
    large = [peak for peak in peaks if peak["measured"] >= LARGE_PEAK]
    entries = [entry for _, _, found in steps(outcomes) for entry in found.get("quantities", {}).values()]
    return {
        "steps": counts.total(),
        "agree": counts["agrees"],
        "differ": counts["DIFFERS"],
        "failed": counts["FAILED"],
        "left_out": counts["left out"],
        "numbers": sum(entry["numbers"] for entry in entries),
        "numbers_differing": sum(entry["differing"] for entry in entries),
        "large_peaks": len(large),
        "large_peaks_near": sum(abs(_off(peak)) <= PEAK_SHARE for peak in large),
    }


def _off(entry: Outcome) -> float:
    """The share of the measured number by which the predicted one is too large."""
    return float(entry["predicted"] / entry["measured"] - 1)


def judged(counts: Mapping[str, int]) -> bool:
    """Whether nothing differs or failed, and something was compared at all."""
    return counts["agree"] > 0 and not counts["differ"] and not counts["failed"]


def markdown(document: Mapping[str, Any]) -> str:
    """The results file as Markdown: verdict, what differs, what agrees, what was left out, and every step."""
    outcomes, counts = document["cells"], document["summary"]
    version = document["pytorch"]
    parts = [
        "# Predicted beside measured",
        f"{counts['steps']:,} steps (net, method, batch, dtype): **{counts['agree']:,} agree, {counts['differ']:,} "
        f"differ, {counts['failed']:,} failed**, {counts['left_out']:,} left out. {counts['numbers']:,} numbers "
        f"compared, {counts['numbers_differing']:,} of them differ.",
        "Bytes and multiply-adds are compared layer by layer and must be equal; the peak of memory must be within "
        f"{PEAK_SHARE:.0%}, or {OBJECT_BYTES // 1024} KiB for each operation (at most {MOST_OBJECT_BYTES // 1024}) "
        "where that is more, for Python's own objects. Of "
        f"{counts['large_peaks']:,} peaks of 1 MiB or more, {counts['large_peaks_near']:,} are within "
        f"{PEAK_SHARE:.0%}. "
        + (f"PyTorch's columns were measured with PyTorch {version}." if version else "PyTorch is not installed.")
        + f" Command: `{document['command']}`.",
        *_section("What differs", _differences(outcomes)),
        *_section("Steps in agreement, by net and method", _by_net(outcomes)),
        *_section("Left out", _left_out(outcomes)),
        *_section("Largest deviation of the peak, where it is 1 MiB or more", _peaks(outcomes)),
        *_section("Every step: predicted, then measured", _every_step(outcomes)),
    ]
    return "\n\n".join(parts)


def _section(title: str, rows: list[list[str]]) -> list[str]:
    """A table under its title, the first row being the names of the columns; nothing without other rows."""
    if len(rows) < 2:
        return []
    lines = [" | ".join(row) for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return [f"## {title}", "\n".join(f"| {line} |" for line in lines)]


def _where(cell: Outcome, method: str) -> list[str]:
    return [cell["net"], method, str(cell["batch"]), cell["dtype"]]


def _differences(outcomes: Sequence[Outcome]) -> list[list[str]]:
    rows = [["net", "method", "batch", "dtype", "quantity", "layer", "predicted", "measured"]]
    for cell, method, found in steps(outcomes):
        if verdict(found) == "FAILED":
            rows.append([*_where(cell, method), "FAILED", found.get("failed", "nothing was compared"), "", ""])
        for what, entry in found.get("quantities", {}).items():
            for layer, predicted, measured in entry["differences"]:
                rows.append([*_where(cell, method), what, layer, f"{predicted:,}", f"{measured:,}"])
            if entry["differing"] > SHOWN_DIFFERENCES:
                rows.append([*_where(cell, method), what, f"and {entry['differing'] - SHOWN_DIFFERENCES} more", "", ""])
    return rows


def _by_net(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Nets by methods: agreeing of compared steps, ``-`` where all were left out."""
    agree: Counter[tuple[str, str]] = Counter()
    compared: Counter[tuple[str, str]] = Counter()
    for cell, method, found in steps(outcomes):
        key, how = (cell["net"], method), verdict(found)
        agree[key] += how == "agrees"
        compared[key] += how != "left out"
    present = {method for _, method, _ in steps(outcomes)}
    methods = [method for method in METHODS if method in present]
    rows = [["net", *methods]]
    for net in dict.fromkeys(cell["net"] for cell in outcomes):
        pairs = [(agree[net, method], compared[net, method]) for method in methods]
        rows.append([net, *(f"{right}/{of}" if of else "-" for right, of in pairs)])
    return rows


def _left_out(outcomes: Sequence[Outcome]) -> list[list[str]]:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for cell, method, found in steps(outcomes):
        if "left_out" in found:
            batches = reasons.setdefault((cell["net"], method, found["left_out"]), [])
            if str(cell["batch"]) not in batches:
                batches.append(str(cell["batch"]))
    rows = [[net, method, ", ".join(batches), why] for (net, method, why), batches in reasons.items()]
    return [["net", "method", "batch", "why"], *rows]


def _peaks(outcomes: Sequence[Outcome]) -> list[list[str]]:
    worst: dict[str, tuple[float, list[str]]] = {}
    for cell, method, found in steps(outcomes):
        entry = found.get("quantities", {}).get(PEAK)
        if entry and entry["measured"] >= LARGE_PEAK and abs(_off(entry)) >= abs(worst.get(cell["net"], (0.0, []))[0]):
            worst[cell["net"]] = _off(entry), _where(cell, method)
    rows = [[*where, f"{100 * off:+.2f} %"] for off, where in worst.values()]
    return [["net", "method", "batch", "dtype", "predicted against measured"], *rows]


def _every_step(outcomes: Sequence[Outcome]) -> list[list[str]]:
    rows = [["net", "method", "batch", "dtype", *(text for name in COLUMNS for text in (name, "measured")), ""]]
    for cell, method, found in steps(outcomes):
        if "quantities" not in found:
            continue
        row = _where(cell, method)
        for quantities in COLUMNS.values():
            entries = [found["quantities"][what] for what in quantities if what in found["quantities"]]
            for side in ("predicted", "measured"):
                row.append(f"{sum(entry[side] for entry in entries):,}" if entries else "")
        rows.append([*row, verdict(found)])
    return rows
