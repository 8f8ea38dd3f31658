"""What the experiments share: how a command begins, what it runs, the files that it writes, and tables over seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from analysis.commands import cli, command_line


def parser(module: str, doc: str | None, **more: Any) -> command_line.OneLineParser:
    """The parser of a module that is run as a command; its help begins with ``doc``."""
    return command_line.OneLineParser(
        prog=f"python -m {module}", description=command_line.prose(doc), allow_abbrev=False, **more
    )


TUNE_HELP = "layers that train besides the classifier: last:4 for the last four, all, or names with *"
"""Help of ``--tune``, wherever the classifier always trains."""


def add_net_data_and_tune(p: argparse.ArgumentParser) -> None:
    """The options that say which layers of which net train on which images.

    The help names the defaults that all experiments of fine-tuning share. The values themselves are in each experiment,
    because ``--quick`` has others.
    """
    p.add_argument("--net", type=cli.any_net, help=f"{cli.NET_HELP} (mcunet)")
    p.add_argument("--data", type=cli.data_set, help=f"{cli.DATA_HELP} (cifar10)")
    p.add_argument("--image-size", type=cli.pixels, help="height and width in pixels (those that the net is made for)")
    cli.add_pixels(p)
    p.add_argument("--tune", help=f"{TUNE_HELP} (last:4)")


def settle(options: argparse.Namespace, *selections: str) -> None:
    """What the net says where an option is missing, and the checks of net, data and ``--tune`` before anything runs.

    Raises
    ------
    ValueError
        If the net does not exist or lacks the layers of a selection, or ``--mean`` and ``--std`` do not fit.
    """
    from analysis.steps.net_choice import NetChoice

    choice = NetChoice(options.net)
    if options.image_size is None:
        options.image_size = choice.image_size
    choice.normalise(options.mean, options.std)
    for selection in selections:
        choice.check_tune(selection)
    options.own = own_mark(options.net, options.data)


def own_mark(net: str, data: str) -> str | None:
    """What tells a user's net and data from others of the same names, for the names of finished runs.

    None where both come with the package or under the name of a data set: finished runs of these keep their names.
    """
    import hashlib

    from analysis.steps.net_choice import NetChoice
    from lance_ref import datasets

    of_net = NetChoice(net).own_sha256
    of_data = None if data in datasets.names() else datasets.checksum(data)
    marks = [mark for mark in (of_net, of_data) if mark is not None]
    return hashlib.sha256(" ".join(marks).encode()).hexdigest() if marks else None


def net_and_data(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a cell that say which net and images; what has no value is left out.

    So finished cells of before, which could not be told so much, keep their names.
    """
    given = {name: getattr(options, name) for name in ("net", "data", "image_size", "train_images", "test_images")}
    more = {name: getattr(options, name) for name in ("channels", "mean", "std", "own")}
    return {**given, **{name: value for name, value in more.items() if value is not None}}


def add_outputs(p: argparse.ArgumentParser, drawn: str, table: bool = False) -> None:
    """The options ``--output``, ``--table`` and ``--figure``; ``drawn`` says what the figure shows."""
    p.add_argument("--output", type=cli.json_file, help="also write the results to this file, .json")
    if table:
        p.add_argument("--table", type=cli.markdown_file, help="also write the table to this file, .md")
    p.add_argument("--figure", type=cli.figure_file, help=f"also draw {drawn} into this file, .png or .svg")


def run_cells(
    options: argparse.Namespace, cells: Sequence[dict[str, Any]], function: str, expected: float | None = None
) -> list[dict[str, Any]]:
    """The results of all cells, from the folder of finished ones or from running them as the options say.

    ``expected`` are the seconds of one cell, as measured before, if that is known.
    """
    from analysis.commands import sweep

    return sweep.run_cells(
        cells, function, options.folder, jobs=options.jobs, scheduler=options.scheduler, expected=expected
    )


MILLISECONDS = {("mcunet", "last:4"): 1.3, ("convnet", "last:2"): 0.25}
"""Time for one image in one epoch of fine-tuning on two cores: the mean over the methods, calibration included.

MCUNet: experiments/results/finetune_cifar10.json; the small net: its quick run.
"""


def expected_seconds(options: argparse.Namespace, epochs: int, images: int) -> float | None:
    """The expected time of one run of fine-tuning; None where nets and layers of this kind were not measured before."""
    each = MILLISECONDS.get((options.net, options.tune))
    return None if each is None else 0.6 + each * epochs * images / 1000


def begin(seconds: float | None, keeps: str = "nothing is kept before the end") -> None:
    """Say on standard error how long a command will take, as measured before on two cores, and what Ctrl-C leaves.

    Without ``seconds`` nothing like it was measured, and that is said.
    """
    import sys

    from analysis.commands.sweep import duration

    known = "how long this takes was not measured for such options"
    how = known if seconds is None else f"about {duration(seconds)} (estimate, as measured before on two cores)"
    print(f"{how}; {keeps}", file=sys.stderr, flush=True)


def by_seed(outcomes: Sequence[dict[str, Any]], seeds: int) -> list[tuple[dict[str, Any], ...]]:
    """The outcomes in groups of as many as there are seeds.

    >>> by_seed([{"a": 0}, {"a": 1}, {"b": 0}, {"b": 1}], 2)
    [({'a': 0}, {'a': 1}), ({'b': 0}, {'b': 1})]
    """
    return [tuple(outcomes[i : i + seeds]) for i in range(0, len(outcomes), seeds)]


def write(
    options: argparse.Namespace,
    document: Callable[[], Mapping[str, Any]],
    draw: Callable[[str], None],
    table: Callable[[], str] = str,
) -> None:
    """Write the files that the options ask for; each is made only if it is asked for."""
    from lance_ref.io.whole_file import write_json, write_text

    if options.output:
        write_json(options.output, document())
    if getattr(options, "table", None):
        write_text(options.table, table())
    if options.figure:
        draw(options.figure)


def document(
    module: str, options: Mapping[str, Any], arguments: Sequence[str], rows: Iterable[Any], **more: Any
) -> dict[str, Any]:
    """What goes into a result file: where it comes from, the settings, and the rows."""
    from analysis.commands.provenance import provenance

    about = {**provenance(module, 0), "arguments": list(arguments), "settings": dict(options), **more}
    return {**about, "rows": list(rows)}


def origin_sentence(origin: Mapping[str, Any]) -> str:
    """Where weights and images came from, for a reader; ``origin`` is that of :func:`~.finetune.cell.prepare_data`."""
    weights, images = origin["weights"], origin["images"]
    head = {"own": "with its own classifier", "fresh": "with a fresh classifier"}[weights["head"]]
    drawn = weights["origin"] == "freshly initialised"
    return (
        f"Weights: {weights['words']}{'' if drawn else f', {head}'}. Images: {images['name']}, {images['source']}; "
        f"{'x'.join(map(str, images['shape']))} (height, width, channels), {images['classes']} classes. "
        f"Normalisation: {origin['normalisation']}."
    )


def statistics(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds, as a result file has them; of one seed no deviation is known.

    >>> statistics("acc", [0.5])
    {'acc_mean': 0.5, 'acc_sd': None}
    """
    return {f"{name}_mean": fmean(values), f"{name}_sd": stdev(values) if len(values) > 1 else None}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation; the mean alone of one value.

    >>> spread([1.0, 2.0, 3.0]), spread([5.0]), spread([-0.001])
    ('2.00 ± 1.00', '5.00', '0.00')
    """
    mean = round(fmean(values), digits) + 0.0  # without the sign of a negative zero
    return f"{mean:.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def markdown(
    module: str,
    arguments: Sequence[str],
    columns: Sequence[str],
    tables: Mapping[str, Iterable[Sequence[str]]],
    *notes: str,
) -> str:
    """Tables in Markdown, each below its heading, with the command that made them above and the notes below."""
    lines = [f"`python -m {module} {' '.join(arguments)}`", ""]
    for heading, rows in tables.items():
        lines += [heading, "", f"| {' | '.join(columns)} |", f"|{'|'.join(['---'] + ['---:'] * (len(columns) - 1))}|"]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in notes)])
