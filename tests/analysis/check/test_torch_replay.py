"""The `pytorch` column against PyTorch itself, operation by operation and for whole published networks."""

from __future__ import annotations

import pytest
from cost_cases import CASES, run

from analysis.check import torch_replay
from analysis.check.measure import compare
from analysis.cost_model import predict
from analysis.rules.account import account
from lance_ref import nn

torch = pytest.importorskip("torch")


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CASES)
def test_saved_bytes_equal_pytorchs(name: str) -> None:
    """A rule that says PyTorch keeps what it does not, or forgets what it keeps, record by record."""
    records, _ = run(name, real=False) if name != "mask index" else run(name, real=True)
    assert [bill.pytorch_bytes for bill in account(records, None)] == torch_replay.saved_bytes(records)


@pytest.mark.parametrize("name", CASES)
def test_flops_equal_pytorchs_counter(name: str) -> None:
    """A product that PyTorch counts otherwise, forward or backward."""
    records, _ = run(name, real=False)
    bills = account(records, None)
    counted = torch_replay.flops(records)
    assert counted.forward == 2 * sum(bill.cost.forward_macs for bill in bills)
    assert counted.backward == 2 * sum(bill.cost.grad_input_macs + bill.cost.grad_weight_macs for bill in bills)


@pytest.mark.parametrize(
    ("net", "tuned", "batch", "bp_mib", "lance_mib"),
    [
        ("mobilenetv2", "last:2", 128, 100.79, 70.16),
        ("mobilenetv2", "last:4", 64, 109.73, 81.02),
        ("resnet18", "last:2", 64, 30.75, 24.63),
        ("resnet18", "last:4", 64, 61.38, 43.00),
        ("resnet34", "last:4", 32, 27.63, 24.56),
    ],
)
def test_the_five_measured_rows(net: str, tuned: str, batch: int, bp_mib: float, lance_mib: float) -> None:
    """Published measurements of PyTorch's tape, the cores neglected: within 1 %, and equal to a replay here."""
    prediction = predict(net, batch, None, None, 10, tune=tuned, methods=["bp", "lance"], ranks="0.001")
    totals = prediction.report.totals
    cores = totals["lance"].activation_bytes["paper"]
    assert totals["bp"].activation_bytes["pytorch"] / 2**20 == pytest.approx(bp_mib, rel=0.01)
    assert (totals["lance"].activation_bytes["pytorch"] - cores) / 2**20 == pytest.approx(lance_mib, rel=0.01)


def test_a_core_in_place_of_the_input_frees_only_what_nobody_else_keeps() -> None:
    """In a ResNet the ReLU before the convolution keeps the same array: PyTorch frees nothing."""
    prediction = predict("resnet18", 4, 64, None, 10, tune="last:2", methods=["bp", "lance"], ranks="0.1")
    assert prediction.choice is not None
    bills = prediction.bills["lance"]
    measured = torch_replay.saved_bytes([bill.record for bill in bills], prediction.choice.ranks)
    assert [bill.pytorch_bytes for bill in bills] == measured
    by_name = {bill.name: bill for bill in bills}
    x = by_name["layer4.1.conv2"].record.inputs[0]
    assert by_name["layer4.1.relu"].pytorch_bytes == x.nbytes  # the ReLU's result, kept all the same


def test_a_wrong_pytorch_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: ReLU said to keep its input, as ReLU6 does."""
    from analysis.rules import elementwise as elementwise_rules

    wrong = elementwise_rules.UNARY["relu"]._replace(pytorch="x")
    monkeypatch.setitem(elementwise_rules.UNARY, "relu", wrong)
    prediction = predict("resnet18", 2, 32, None, 10, tune="last:2", methods=["bp"])
    bills = prediction.bills["bp"]
    assert [bill.pytorch_bytes for bill in bills] != torch_replay.saved_bytes([bill.record for bill in bills])


@pytest.mark.parametrize("groups", [1, 3])
def test_groups_in_pytorchs_flop_counter(groups: int) -> None:
    """Why groups are replayed otherwise: PyTorch bills the weight gradient groups times. Once it stops, so can we."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.empty(2, 6, 5, 5, device="meta")
    weight = torch.empty(9, 6 // groups, 3, 3, device="meta", requires_grad=True)
    out = torch.nn.functional.conv2d(x, weight, groups=groups)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    right = 2 * 2 * 9 * 3 * 3 * (6 // groups) * 3 * 3
    assert counter.get_total_flops() == right * groups


def test_a_measurement_says_where_groups_were_reworked() -> None:
    """A grouped layer that trains is named under the table; without one, nothing is said."""
    for groups, said in ((1, False), (3, True)):
        net = nn.Sequential(nn.Conv2d(3, 6, 3, groups=groups), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
        text = str(compare(predict(net, batch=2, input_shape=(3, 6, 6), methods=["bp"], with_weights=True)))
        assert ("one group on as many times the images: 0" in " ".join(text.split())) == said
