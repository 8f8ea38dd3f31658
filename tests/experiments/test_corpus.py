"""The corpus of networks: a dozen are predicted and run here, where their packages are installed."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import pytest

from experiments.corpus.command import main, table
from experiments.corpus.networks import Network, define_operations_without_kernels, networks

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "torch_networks.json"
TAPES = RESULTS.with_name("torch_tapes.json")
QUICK = [network for network in networks() if network.quick]
MIB = 2**20


def installed(*packages: str) -> None:
    for package in packages:
        if not Network(package, "", "").is_installed():
            pytest.skip(f"{package} is not installed")


def test_the_list_has_enough_of_each() -> None:
    """At least 20 networks of three packages, a dozen of them quick, every name once."""
    found = Counter(network.package for network in networks())
    assert all(found[package] >= 20 for package in ("torchvision", "timm", "transformers"))
    assert found["peft"] >= 3
    assert len(QUICK) >= 12


@pytest.mark.parametrize("network", QUICK, ids=lambda network: f"{network.package}-{network.name}")
def test_quick_networks_are_exact(network: Network) -> None:
    """Kept bytes, forward and backward FLOPs of a real step equal the prediction, and so does our tape."""
    installed(network.package)
    from experiments.corpus.compare import compare

    outcome = compare(network, tape=True)
    assert outcome.failed == ""
    assert outcome.is_exact, (outcome.predicted, outcome.real, outcome.tape)
    assert outcome.tape is not None
    assert outcome.tape.none == ""
    assert outcome.uncounted == ()


def test_the_published_memory_of_lora_is_explained() -> None:
    """ResNet-50, batch 16: 1,310.95 and 2,618.32 MiB were reported; the page says what was counted beside."""
    installed("torchvision", "peft")
    from analysis import cost
    from experiments.corpus.adapted import with_lora

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        define_operations_without_kernels()
        import torch
        import torchvision

        net = torchvision.models.resnet50(num_classes=1)
        plain = cost(net, batch=16, method="bp").totals["bp"].activation_bytes["pytorch"]
        kept = {}
        for dropout in (0.1, 0.0):
            adapted = with_lora(torchvision.models.resnet50(num_classes=1), (torch.nn.Conv2d,), dropout)
            report = cost(adapted, batch=16, method="bp")
            kept[dropout] = report.totals["bp"].activation_bytes["pytorch"]
            assert "317,772 of 23,827,853 parameters train" in report.remark
    images, head_input = 4 * 16 * 3 * 224 * 224, 4 * 16 * 2048
    assert round((plain - head_input) / MIB, 2) == 1310.95
    assert round((kept[0.1] + images) / MIB, 2) == 2618.32
    assert round(kept[0.0] / MIB, 2) == 1325.94


def test_committed_results_are_all_exact() -> None:
    """The table speaks of networks of the list, at least 20 of each of three packages."""
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = document["rows"]
    assert {(row["package"], row["name"]) for row in rows} <= {(each.package, each.name) for each in networks()}
    found = Counter(row["package"] for row in rows)
    assert all(found[package] >= 20 for package in ("torchvision", "timm", "transformers"))
    assert all(row["exact"] and row["predicted"] == row["real"] and not row["failed"] for row in rows)
    assert set(document["packages"]) == {"torch", "torchvision", "timm", "transformers", "peft"}


def test_committed_tapes_are_the_measured_ones() -> None:
    """Nine of ten networks have a tape, each of them the one of a real step; the page says how many."""
    document = json.loads(TAPES.read_text(encoding="utf-8"))
    rows = document["rows"]
    assert {(row["package"], row["name"]) for row in rows} == {(each.package, each.name) for each in networks()}
    assert all(row["tape"]["predicted"] == row["tape"]["measured"] for row in rows)
    with_tape = [row for row in rows if row["tape"]["predicted"] is not None]
    assert all(row["tape"]["none"] for row in rows if row not in with_tape)
    assert len(with_tape) >= 0.9 * len(rows)
    page = (ROOT / "docs" / "torch_networks.md").read_text(encoding="utf-8")
    assert f"{len(with_tape)} of the {len(rows)} networks have such a tape" in " ".join(page.split())


def test_the_command_refuses_what_names_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "nothing"])
    assert stopped.value.code == 2
    assert "names no network of the corpus" in capsys.readouterr().err


def test_a_difference_stands_in_the_table() -> None:
    """A network that is not exact says which numbers the real step had."""
    installed("torchvision")
    from analysis.check.torch_measure import Totals
    from experiments.corpus.compare import Export, Outcome

    right, wrong = Totals(10, 20, 30), Totals(10, 20, 31)
    rows = [Outcome("torchvision", "a", 2, (), 5, right, right), Outcome("torchvision", "b", 2, (), 5, right, wrong)]
    text = table(rows)
    assert text.startswith("1 of 2 networks are exact")
    assert "no: 10, 20, 31" in text
    assert str(Export("", Totals(99, 20, 30), Totals(100, 20, 30), marked=True)) == "bytes -1.00 %, marked"
    assert str(Export("", right, wrong)) == "backward -3.23 %"
    assert str(Export("", right, right)) == "exact"
    assert str(Export("no rule")) == "no: no rule"
    assert "export" not in text
    assert "tape" not in text


def test_a_tape_that_is_not_the_measured_one_stands_in_the_table() -> None:
    """Then the network is not exact; one without a tape is."""
    installed("torchvision")
    from analysis.check.torch_measure import Totals
    from experiments.corpus.compare import Outcome, Tape

    totals = Totals(10, 20, 30)
    tapes = [Tape(1234, 1234), Tape(1234, 1235), Tape(none="cumsum has no counterpart"), None]
    rows = [Outcome("torchvision", "a", 2, (), 5, totals, totals, tape=tape) for tape in tapes]
    assert [row.is_exact for row in rows] == [True, False, True, True]
    text = table(rows)
    assert text.splitlines()[2].endswith("| tape of this library |")
    cells = [line.split(" | ")[-1].removesuffix(" |") for line in text.splitlines()[4:8]]
    assert cells == [
        "1,234, measured equal", "1,234, measured 1,235", "none: cumsum has no counterpart", "not tried",
    ]  # fmt: skip
