"""Where LANCE's ranks come from: the command line, measured spectra, or an assumption."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from analysis.commands.shipped import shipped
from analysis.ranks.spectra_file import MODE_NAMES, Spectra, load_spectra

SHIPPED: dict[tuple[str, tuple[int, ...]], str] = {
    ("mcunet", (3, 128, 128)): "mcunet_128.json",
    ("mobilenetv2", (3, 224, 224)): "mobilenetv2_224.json",
}
"""Files of spectra that come with the package, by net and shape of one input."""

Ranks = tuple[int | None, ...]
Shapes = Mapping[str, tuple[int, ...]]
"""Shape of the input of every tuned layer, by layer path, batch first."""


@dataclass(frozen=True)
class RankChoice:
    """The ranks of every compressed layer, where they came from, and what to do if that is not enough.

    A layer that is missing from ``ranks`` keeps its activation whole. ``by_energy`` says whether an energy threshold
    chose any of the ranks.
    """

    ranks: dict[str, Ranks]
    source: str
    assumed: bool = False
    by_energy: bool = False


def choose_ranks(
    shapes: Shapes, net: str, input_shape: tuple[int, ...], epsilon: float, given: str | None, spectra: str | None
) -> RankChoice:
    """Ranks for the tuned layers: those given, else from spectra, else a quarter of each mode.

    ``net`` and ``input_shape`` find the shipped spectra; ``given`` is what ``--ranks`` says, ``spectra`` the file of
    ``--spectra``.

    Raises ValueError or OSError in one line that names what came and what is allowed.
    """
    for name, shape in shapes.items():
        if len(shape) not in MODE_NAMES:
            raise ValueError(f"layer {name!r} has an input of shape {shape}, LANCE compresses 2 to 5 dimensions")
    if given is not None and "=" not in given:
        if spectra is not None:
            raise ValueError("--ranks gave a fraction for every layer and --spectra a file, expected one of them")
        return RankChoice(parse_fraction(given, shapes), f"--ranks {given}")
    if given is not None:
        named = parse_ranks(given, shapes)
        stated: dict[str, Ranks] = {name: ranks for name, ranks in named.items() if ranks is not None}
        others = {name: shape for name, shape in shapes.items() if name not in named}
        if not others:
            return RankChoice(stated, f"--ranks {given}")
        rest = choose_ranks(others, net, input_shape, epsilon, None, spectra)
        where = f"--ranks {given}; all other layers: {rest.source}"
        return RankChoice({**stated, **rest.ranks}, where, rest.assumed, rest.by_energy)
    if spectra is not None:
        return ranks_from_spectra(load_spectra(spectra), shapes, epsilon, f"--spectra {spectra}")
    path = shipped_spectra(net, input_shape)
    if path is not None:
        where = f"spectra shipped as analysis/data/{path.name}"
        return ranks_from_spectra(load_spectra(path), shapes, epsilon, where)
    quarter = {name: fraction_of(Fraction(1, 4), shape) for name, shape in shapes.items()}
    source = (
        f"assumed: a quarter of each mode, for there are no spectra of {net} at {'x'.join(map(str, input_shape))}, "
        "and epsilon has no effect; give --ranks, or --spectra with a file from python -m analysis.spectra"
    )
    return RankChoice(quarter, source, assumed=True)


def mean_free(ranks: Mapping[str, Ranks], shapes: Shapes) -> dict[str, Ranks]:
    """The same ranks with one direction of the feature mode, the mean's, not to be had.

    >>> mean_free({"a": (2, 3), "b": (2, 4)}, {"a": (8, 5), "b": (8, 4)})
    {'a': (2, 3), 'b': (2, 3)}
    """
    free: dict[str, Ranks] = {}
    for name, of in ranks.items():
        shape = shapes[name]
        feature = 1 if len(shape) >= 4 else len(shape) - 1
        if shape[feature] == 1:
            raise ValueError(f"layer {name!r} has one channel or feature: without its mean nothing is left of it")
        free[name] = tuple(
            min(r, shape[mode] - 1) if mode == feature and r is not None else r for mode, r in enumerate(of)
        )
    return free


def shipped_spectra(net: str, input_shape: tuple[int, ...]) -> Path | None:
    """The file of spectra that comes with the package for this net and input; None where none was ever measured.

    Raises FileNotFoundError if it should be there and is not.
    """
    name = SHIPPED.get((net, tuple(input_shape)))
    return None if name is None else shipped(name)


def ranks_from_spectra(spectra: Spectra, shapes: Shapes, epsilon: float, where: str) -> RankChoice:
    """Ranks by energy, for layers of the very shapes that were measured (another batch size aside)."""
    ranks: dict[str, Ranks] = {}
    batches = set()
    for name, shape in shapes.items():
        if name not in spectra.layers:
            raise ValueError(f"{where} has no layer {name!r}; it was measured on {spectra.net}")
        layer = spectra.layers[name]
        if layer.shape[1:] != shape[1:]:
            raise ValueError(f"{where}: layer {name!r} was measured with shape {layer.shape}, the net has {shape}")
        ranks[name] = layer.ranks(epsilon, shape[0])
        batches.add(shape[0])
    source = f"{where} at epsilon {epsilon:g}: {spectra.source}"
    if batches - {spectra.batch}:
        source += (
            f"; batch mode predicted for {', '.join(map(str, sorted(batches)))}: v + n*m once, the others spread "
            "about v as measured"
        )
    return RankChoice(ranks, source, by_energy=True)


def fraction_of(fraction: Fraction, shape: tuple[int, ...]) -> Ranks:
    """That fraction of each mode, rounded up.

    >>> fraction_of(Fraction("0.1"), (128, 960, 30, 30))  # 3 of 30, where the float 0.1 would give 4
    (13, 96, 3, 3)
    """
    return tuple(math.ceil(fraction * n) for n in shape)


def parse_fraction(text: str, shapes: Shapes) -> dict[str, Ranks]:
    """Read ``--ranks 0.25``: one fraction for every mode of every layer.

    >>> parse_fraction("0.5", {"a": (8, 5)})
    {'a': (4, 3)}
    """
    try:
        in_range = len(text) < 40 and 0 < float(text) <= 1
    except ValueError:
        in_range = False
    if not in_range:
        raise ValueError(f"--ranks is {text!r}, expected a fraction in (0, 1], or layer=r1,r2,r3,r4;layer=...")
    return {name: fraction_of(Fraction(text), shape) for name, shape in shapes.items()}


def parse_ranks(text: str, shapes: Shapes) -> dict[str, Ranks | None]:
    """Read ``--ranks layer=r1,r2,r3,r4;layer=…``.

    In place of a rank ``-`` leaves the mode alone; in place of all ranks ``exact`` leaves the layer
    uncompressed (None). Layers that are not named are for somebody else to decide.

    >>> parse_ranks("a=3,-;b=exact", {"a": (8, 6), "b": (8, 4), "c": (8, 2)})
    {'a': (3, None), 'b': None}
    """
    entries: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, _, values = (piece.strip() for piece in part.partition("="))
        if name not in shapes:
            raise ValueError(f"--ranks names layer {name!r}, expected the tuned layers: {_listed(shapes)}")
        if name in entries:
            raise ValueError(f"--ranks names layer {name!r} twice")
        entries[name] = values
    return {
        name: None if values == "exact" else _layer_ranks(name, values, shapes[name])
        for name, values in entries.items()
    }


def _layer_ranks(name: str, text: str, shape: tuple[int, ...]) -> Ranks:
    parts = [part.strip() for part in text.split(",")]
    modes = MODE_NAMES[len(shape)]
    if len(parts) != len(shape):
        raise ValueError(f"--ranks gives layer {name!r} {text!r}, expected {len(shape)} ranks ({', '.join(modes)})")
    ranks: list[int | None] = []
    for part, mode, n in zip(parts, modes, shape, strict=True):
        if part == "-":
            ranks.append(None)
            continue
        if not (part.isascii() and part.isdigit() and len(part) < 10 and 1 <= int(part) <= n):
            allowed = f"1 to {n}, or - to leave it alone"
            raise ValueError(f"--ranks gives layer {name!r} {mode} rank {part!r}, expected {allowed}")
        ranks.append(int(part))
    if all(rank is None for rank in ranks):
        raise ValueError(
            f"--ranks gives layer {name!r} {text!r}, which compresses nothing; write {name}=exact for that"
        )
    return tuple(ranks)


def _listed(names: object) -> str:
    listed = list(names)  # type: ignore[call-overload]
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
