"""``python -m analysis.plan``: its input is checked, its formats agree, and it says what is closest."""

from __future__ import annotations

import csv
import io
import json
from fractions import Fraction
from pathlib import Path

import pytest

from analysis.plan import main
from analysis.planner.options import parse_bytes, parse_times

NONSENSE = "|nan|NaNKiB|infMiB|-5KiB|0KiB|0.01B|256|256KB|256kib|1e3KiB|٣KiB|1,5MiB|" + "9" * 40 + "B"


@pytest.mark.parametrize("text", NONSENSE.split("|"))
def test_nonsense_budgets(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says what is expected, exit 2."""
    with pytest.raises(SystemExit) as left:
        main(["--net", "mlp", f"--budget={text}"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--budget" in error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--flops-at-most", "nanx"], "--flops-at-most"),
        (["--flops-at-most", "0x"], "--flops-at-most"),
        (["--flops-at-most=-1.5x"], "--flops-at-most"),
        (["--batch", "0"], "--batch"),
        (["--batch", "2", "2"], "--batch"),
        (["--epsilon", "nan"], "--epsilon"),
        (["--epsilon", "0.7"], "spectra"),
        (["--ranks", "1.5"], "--ranks"),
        (["--ratio", "0"], "--ratio"),
        (["--patch", "0"], "patch"),
        (["--layers", "3"], "--layers"),
        (["--method", "magic"], "magic"),
        (["--spectra", "no-such-file"], "no-such-file"),
        (["--shares", "no-such-file"], "no-such-file"),
        (["--output", "no-such-folder/x"], "no-such-folder"),
        (["--input-shape", "3,x"], "--input-shape"),
    ],
)
def test_bad_options(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the option, exit 2, nothing on stdout."""
    with pytest.raises(SystemExit) as left:
        main(["--net", "mlp", "--budget", "1MiB", *arguments])
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert word in captured.err
    assert not captured.out


def test_limits_are_exact() -> None:
    """1 KiB is 1024 bytes, and 1.1 is eleven tenths."""
    assert parse_bytes("1KiB") == 1024
    assert parse_bytes("1.5 MiB") == 3 * 2**19
    assert parse_bytes("2GiB") == 2**31
    assert parse_times("1.1x") == Fraction(11, 10)


SMALL = ["--net", "mlp", "--num-classes", "10", "--batch", "2", "8"]


def test_formats_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, JSON and CSV of one plan, to stdout and into a file; plain, and twice the same."""
    arguments = [*SMALL, "--budget", "2MiB"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "\x1b" not in table
    assert main([*arguments, "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["answer"] in " ".join(table.split())
    output = tmp_path / "plan.csv"
    assert main([*arguments, "--format", "csv", "--output", str(output)]) == 0
    lines = list(csv.DictReader(io.StringIO(output.read_text())))
    assert [line["method"] for line in lines] == [row["method"] for row in document["rows"]]
    for line, row in zip(lines, document["rows"], strict=True):
        assert int(line["total_bytes"]) == (row["best"] or row["next"])["total_bytes"]
    best = document["rows"][0]["best"]
    assert best["total_bytes"] == best["step_bytes"] + best["factors_bytes"] + best["weights_bytes"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == table


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """The closest, and what is missing: exit 0. The head's 101·10 weights and their gradients are more than 4 KiB."""
    assert main([*SMALL, "--budget", "4KiB", "--format", "json", "--engine", "library"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["closest"]["method"], document["closest"]["engine"]) == ("head-only", "library")
    assert document["closest"]["over_bytes"] == document["closest"]["total_bytes"] - 4096 > 0
    assert document["answer"].startswith(
        "Nothing fits in 4.0 KiB. Closest: head-only, batch 2, as a step of the library: "
    )
    assert document["answer"].endswith(" Something fits with --num-classes 2.") or "--batch" in document["answer"]
    assert not document["code"]
    assert not any(row["fits"] for row in document["rows"])


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (["resnet8"], "). A smaller --image-size or --num-classes may help."),
        (["resnet8", "--image-size", "16", "--batch", "2"], "). A smaller --num-classes or --batch may help."),
        (["resnet8", "--image-size", "16", "--num-classes", "3"], ")."),
        (["mlp"], "). A smaller --num-classes may help."),
    ],
)
def test_what_may_help_where_nothing_fits(arguments: list[str], end: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Only options that were left alone; nothing where all were given."""
    assert main(["--budget", "1KiB", "--method", "head-only", "--engine", "library", "--net", *arguments]) == 0
    answer, _, _ = " ".join(capsys.readouterr().out.split()).partition(" What does not fit")
    assert answer.endswith(end)


def test_the_number_of_classes_is_the_nets_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factory decides by itself; another number that it was asked for in vain is an error."""
    (tmp_path / "plans_net.py").write_text(
        "from lance_ref import nn\ndef net():\n    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 7))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--net", "plans_net:net", "--input-shape", "8", "--budget", "1MiB", "--methods", "bp"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("plans_net:net, input 8, 7 classes, float32: ")
    with pytest.raises(SystemExit):
        main([*arguments, "--num-classes", "9"])
    assert "num_classes is 9, but net 'plans_net:net' gives 7" in capsys.readouterr().err


def test_terminal_colours_are_a_choice(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Colour on a terminal, none with NO_COLOR."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    for plain in (False, True):
        if plain:
            monkeypatch.setenv("NO_COLOR", "1")
        else:
            monkeypatch.delenv("NO_COLOR", raising=False)
        assert main([*SMALL, "--budget", "2MiB"]) == 0
        out = capsys.readouterr().out
        assert ("\x1b[32m" in out) == (not plain)
        assert "Train all 2 layers with " in out


def test_a_batch_that_cannot_run_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Batch norm over vectors takes two images; so neither a batch of one nor micro-batches of one."""
    arguments = ["--net", "alexnet-cl", "--budget", "300MiB", "--batch", "1", "2", "--method", "bp", "micro-batch"]
    assert main([*arguments, "--layers", "1", "--format", "json", "--count", "kept"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["skipped"]) == ["batch 1"]
    rows = {row["method"]: row for row in document["rows"]}
    assert rows["bp"]["most_layers"] == {"1": None, "2": 1}
    assert not rows["micro-batch"]["fits"]
    assert "in parts of 1" in rows["micro-batch"]["note"]


def test_a_smaller_image_or_fewer_classes_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """They are tried: the head of 1000 classes alone has 629 KiB, that of 100 has a tenth."""
    arguments = ["--net", "mcunet", "--image-size", "128", "--budget", "512KiB", "--method", "head-only"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["answer"].endswith("Something fits with --num-classes 100.")
    assert main([*arguments, "--json", "--num-classes", "100"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["fits"]


def test_the_first_lines_name_what_else_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """MCUNet at 32 pixels in 256 KiB: a step of the library for the biases, and what was measured; what else fits."""
    arguments = ["--net", "mcunet", "--budget", "256KiB", "--image-size", "32", "--num-classes", "10"]
    assert main([*arguments, "--engine", "library"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    answer = text[: text.index(" What fits")]
    assert "Train all 42 layers with bias-only, batch 32 in parts of 1, as a step of the library: " in answer
    assert (
        "Accuracy: 71.3 ± 0.1 % on CIFAR-10 (10,000 training images of 128 pixels), mcunet with its last 4 layers"
        in answer
    )
    assert "Or the last 11 of 42 layers with lora rank 4, batch 1, " in answer
    assert "updates after 1 image in place of 32" in answer
    assert "Or head-only, batch 32 in parts of 4, as a step of the library: " in answer


def test_an_answer_without_alternatives_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """One method was asked for; of many that fit three are named."""
    arguments = [*SMALL, "--budget", "2MiB", "--engine", "library"]
    assert main([*arguments, "--method", "head-only"]) == 0
    assert "No other method fits. " in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    fitting = list(dict.fromkeys(row["method"] for row in document["rows"] if row["fits"]))
    assert len(fitting) > 5
    assert document["answer"].count(" Or ") == 3
    assert document["answer"].endswith(f"{len(fitting) - 4} more methods fit; see the table.")


def test_both_engines_stand_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    """And a net that no device runs has the reason in place of rows."""
    assert (
        main(["--net", "resnet8", "--num-classes", "10", "--budget", "1MiB", "--method", "bp", "lance", "--json"]) == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert {row["engine"] for row in document["rows"]} == {"library", "device"}
    assert main(["--net", "deit-tiny", "--budget", "1GiB", "--method", "bp", "--batch", "1", "--layers", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "device programs: none, for " in out
    assert "none that a device runs" in out


def test_sizes_are_in_the_unit_of_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    for budget, shown in (
        ("2MiB", "2.00 MiB of RAM"),
        ("2048KiB", "2,048.0 KiB of RAM"),
        ("2097152B", "2,048.0 KiB of RAM"),
    ):
        assert main([*SMALL, "--budget", budget, "--method", "bp", "--engine", "library"]) == 0
        assert shown in capsys.readouterr().out
