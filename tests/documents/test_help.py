"""The help of every command is for a newcomer: fits 80 columns, explains each option, and tells a default once."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import pytest

from analysis.commands import command_line, words
from experiments.command import COMMANDS, GROUPS, main, usage
from experiments.continual import command as continual
from experiments.ledger import claims
from lance_ref import datasets, models
from lance_ref.continual.learners import LEARNERS


@pytest.fixture(autouse=True)
def _eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_the_list_of_commands() -> None:
    """Every command once, in groups, each line within 80 columns, and two to begin with."""
    text = usage()
    assert max(map(len, text.splitlines())) <= 80
    assert [name for group in GROUPS.values() for name in group] == list(COMMANDS)
    assert "lance-ref finetune --quick" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_and_begins_with_what_was_typed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line of usage with the command as it was typed; a description; no marks of reStructuredText."""
    text = help_of(command, capsys)
    assert max(map(len, text.splitlines())) <= 80
    first, blank, *rest = text.splitlines()
    assert blank == ""
    assert "``" not in text
    assert ":class:" not in text
    if command != "conformance":  # which has a parser of its own
        assert first.startswith(f"usage: lance-ref {command} ")
        assert rest[0][0].isupper()
        assert "python -m" not in text


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "conformance"])
def test_every_option_is_explained(command: str) -> None:
    """A sentence or a clause, and not only a default; no default is told twice."""
    parser: Any = import_module(COMMANDS[command][0]).parser()
    formatter = parser._get_formatter()
    for action in parser._actions:
        told = formatter._get_help_string(action)
        assert re.search(r"[A-Za-z]{4}", re.sub(r"\([^)]*\)$", "", told)), (command, action.dest, told)
        assert "default:" not in told
        assert not re.search(r"\)\s+\([^)]*\)$", told), (command, action.dest, told)


def test_a_wrong_option_is_told_of_the_command_that_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """And the next parser has its own name again."""
    with pytest.raises(SystemExit):
        main(["cost", "--net", "mlp", "--batch", "0"])
    assert capsys.readouterr().err.startswith("lance-ref cost: error: --batch is 0")
    assert command_line.program is None


def test_nets_data_and_learners_in_words() -> None:
    """What the lists in the help name is what there is."""
    assert set(words.NETS) == set(models.NETS)
    assert set(words.DATA) == set(datasets.names())
    assert set(continual.ABOUT) == set(LEARNERS)
    assert all(about for entries in (words.NETS, words.DATA, continual.ABOUT) for about in entries.values())


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("cost", ["lance-mean-free", "gradient-filter", "mcunet"]),
        ("plan", ["lance-mean-free", "mobilenetv2"]),
        ("device", ["bias", "mcunet"]),
        ("spectra", ["eurosat", "resnet8"]),
        ("finetune", ["lance-planned-channels", "digits", "mcunet"]),
        ("continual", ["lance-no-batch", "alexnet-cl"]),
        ("device-accuracy", ["lance", "cifar10"]),
    ],
)
def test_names_are_explained_where_they_can_be_chosen(
    command: str, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stands at the beginning of a line of its own, with words behind it."""
    text = help_of(command, capsys)
    for name in named:
        assert re.search(rf"^  {re.escape(name)}  +\S+ \S+", text, re.M), name


def test_claims_are_a_line_each(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdict, name and figure within the terminal's width; how to see more stands below."""
    chosen = dict(list(claims.ledger()[1].items())[10:12])
    monkeypatch.setattr(claims, "ledger", lambda: (claims.load_entries.__name__, chosen))
    assert main(["claims"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(chosen) + 3
    for line, name in zip(out, chosen, strict=False):
        assert len(line) <= 80
        assert f" {name}: " in line
    assert "lance-ref claims --run NAME" in out[-1]
