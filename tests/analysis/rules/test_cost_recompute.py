"""The cost of recomputed segments and of micro-batches: exact integers, and predicted = measured for any net."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import recompute_nets
from hypothesis import given, settings

from analysis.check import torch_replay
from analysis.check.measure import Comparison, compare
from analysis.cost_model import cost, main, predict
from analysis.rules import account as fold
from analysis.rules import recompute as recompute_rules
from analysis.rules.account import account, with_described_stores
from analysis.rules.layouts import Memory
from analysis.rules.op_cost import OpCost
from analysis.rules.recompute import Executed, executed, flatten
from lance_ref import F, Tensor, count_macs, models, nn, record, tape, tune
from lance_ref.engine.autograd import Node
from lance_ref.engine.recording import OpRecord
from lance_ref.nn.module import Module
from lance_ref.nn.recompute import Rerun
from lance_ref.stores import Hosvd

SHAPE = (2, *recompute_nets.SIZE)


def measure(net: Module, shape: tuple[int, ...] = SHAPE, **options: Any) -> Comparison:
    return compare(predict(net, 4, input_shape=shape, **{"ranks": "0.5", "tune": "all", **options}))


def step(net: Module, x: np.ndarray, labels: np.ndarray) -> tuple[list[OpRecord], Tensor]:
    with record(net) as records:
        loss = F.cross_entropy(net(x), labels)
    return list(records), loss


# ---- by hand ---------------------------------------------------------------------------------


def two_linears() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 7, rng=0), nn.Tanh(), nn.Linear(7, 5, rng=1), nn.ReLU())


def test_one_segment_by_hand() -> None:
    """Kept: the input, 4·6 floats. Products: 4·6·7 and 4·7·5, twice forward; tanh 1 more per element, ReLU 1."""
    net = nn.Sequential(nn.Recompute(two_linears()), nn.Linear(5, 3, rng=2))
    records, _ = step(net, np.ones((4, 6), np.float32), np.zeros(4, np.int64))
    bills = {bill.name: bill for bill in account(records, head="1")}
    assert list(bills) == ["0", "0.0", "0.1", "0.2", "0.3", "1", "loss"]
    assert [bill.tape_bytes for bill in bills.values()][:6] == [4 * 6 * 4, 0, 0, 0, 0, 4 * 5 * 4]
    assert [bill.pytorch_bytes for bill in bills.values()][:5] == [4 * 6 * 4, 0, 0, 0, 0]
    assert [bill.paper_bytes for bill in bills.values()][:6] == [4 * 6 * 4, 0, 0, 0, 0, 0]
    first, second = bills["0.0"].cost, bills["0.2"].cost
    assert (first.forward_macs, first.recompute_macs, first.grad_input_macs, first.grad_weight_macs) == (
        168,
        168,
        0,
        168,
    )
    assert (second.forward_macs, second.recompute_macs, second.grad_input_macs, second.grad_weight_macs) == (140,) * 4
    assert bills["1"].cost.recompute_macs == 0
    assert bills["0.1"].cost.elementwise == (2 + 3) * 4 * 7
    assert bills["0.3"].cost.elementwise == (2 + 1) * 4 * 5
    assert bills["0.0"].cost.elementwise == (2 + 1) * 4 * 7  # the bias, twice, and its gradient
    # the second run keeps tanh's result, which is also the second layer's input, and 20 bits
    assert bills["0"].cost.second_tape_bytes == 4 * 7 * 4 + 3


def test_each_segment_around_runs_it_once_more() -> None:
    """Three nested segments: 1, 2 and 3 runs beside the first."""
    net: Module = nn.Recompute(nn.Sequential(nn.Linear(6, 6, rng=0)))
    for seed in (1, 2):
        net = nn.Recompute(nn.Sequential(nn.Linear(6, 6, rng=seed), net))
    records, _ = step(net, np.ones((4, 6), np.float32), np.zeros(4, np.int64))
    again = {item.record.path: item.runs_again for item in executed(records) if item.record.op == "linear"}
    assert again == {"0": 1, "1.0": 2, "1.1.0": 3}
    assert [bill.cost.recompute_macs for bill in account(records, None) if bill.record.op == "linear"] == [
        144,
        288,
        432,
    ]
    assert [bill.tape_bytes for bill in account(records, None)][:2] == [4 * 6 * 4, 0]


def test_a_segment_below_the_first_trained_layer_runs_once() -> None:
    """Backward does not come there: nothing kept, nothing run again."""
    net = nn.Sequential(nn.Recompute(two_linears()), nn.Linear(5, 3, rng=2))
    tune(net, "head")
    records, _ = step(net, np.ones((4, 6), np.float32), np.zeros(4, np.int64))
    for bill in account(records, head="1"):
        assert bill.cost.recompute_macs == 0
        assert bill.cost.second_tape_bytes == 0
        assert bill.tape_bytes == 0 or bill.name in ("1", "loss")


def test_an_operation_inside_that_leads_nowhere_runs_again_and_has_no_backward() -> None:
    """The second run repeats all of the first, dead branches too."""

    class DeadEnd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 5, rng=0), nn.Linear(6, 7, rng=1)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    comparison = measure(nn.Sequential(nn.Recompute(DeadEnd()), nn.Linear(5, 3)), (6,), methods=["bp"])
    assert comparison.agrees, str(comparison)
    found = {(x.layer, x.what): x.measured for x in comparison.lines if x.method == "bp"}
    assert found["0.unused", "recompute multiply-adds"] == 4 * 6 * 7
    assert ("0.unused", "grad_weight multiply-adds") not in found


def test_a_view_out_of_a_segment_keeps_what_it_looks_at() -> None:
    """The result of a segment that ends in a slice holds the whole array inside alive once it is kept."""

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.exp(x)[:, :3].reshape(-1, 3)

    comparison = measure(nn.Sequential(nn.Linear(6, 6), nn.Recompute(Half()), nn.Linear(3, 3)), (6,))
    assert comparison.agrees, str(comparison)
    kept = {x.layer: x.measured for x in comparison.lines if (x.method, x.what) == ("bp", "tape bytes")}
    assert kept["2"] == 4 * 6 * 4


# ---- predicted = measured --------------------------------------------------------------------


@given(recompute_nets.plans(), recompute_nets.tunings())
@settings(max_examples=30)
def test_any_net_measures_as_predicted(plan: list[Any], tuning: dict[str, Any]) -> None:
    """Bytes and multiply-adds of every layer and kind, with bp and LANCE, and PyTorch's own checkpointing beside."""
    comparison = measure(recompute_nets.net(plan), tune=tuning["selection"])
    assert comparison.agrees, str(comparison)


@given(recompute_nets.plans(), recompute_nets.tunings())
@settings(max_examples=30)
def test_any_recorded_step_costs_what_it_did(plan: list[Any], tuning: dict[str, Any]) -> None:
    """The fold over a real step's records, batch norm trained too, against its tape and its counter."""
    net = recompute_nets.net(plan)
    tuned = tune(net, **tuning)
    recompute_nets.compress_at_random(net, 3, "float32")
    x = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    with count_macs() as counter:
        records, loss = step(net, x, np.array([0, 2, 1]))
        kept = {path: nbytes for path, nbytes in tape(loss).by_layer().items() if nbytes}
        loss.backward()
    bills = account(records, tuned.head)
    predicted: dict[str, int] = {}
    for bill in bills:
        predicted[bill.record.path] = predicted.get(bill.record.path, 0) + bill.tape_bytes
    assert {path: nbytes for path, nbytes in predicted.items() if nbytes} == kept
    for kind, macs in counter.by_kind().items():
        if kind != "calibration":
            assert sum(getattr(bill.cost, f"{kind}_macs") for bill in bills) == macs, kind


def test_the_tape_of_the_second_run_is_as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What backward needs for a moment beside the tape: measured on the nodes of the second run."""
    net, found = recompute_nets.small(), []
    second_run = Rerun.second_run

    def measured(ctx: Node) -> Node:
        last = second_run(ctx)
        output = Tensor(np.ones(1))
        output._node = last
        inside = [entry for entry in tape(output).entries if entry.path.startswith(f"{ctx.path}.")]
        found.append((ctx.path, sum(entry.nbytes for entry in inside)))
        return last

    monkeypatch.setattr(Rerun, "second_run", staticmethod(measured))
    records, loss = step(net, np.ones((2, 3, 7, 8), np.float32), np.array([0, 1]))
    loss.backward()
    predicted = {b.record.path: b.cost.second_tape_bytes for b in account(records, "4") if b.record.op == "recompute"}
    nested = 2 * 4 * 5 * 6 * 4  # the inner segment's input, in use again: predicted with the outer tape
    assert dict(found) == {"1": predicted["1"], "1.3.body": predicted["1.3.body"] + nested}


@pytest.mark.parametrize("method", ["bp", "lance"])
def test_the_command_line_costs_and_measures_a_users_own_net(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--net pkg.module:factory with segments in it: agreement is exit code 0, and the JSON has the kind."""
    arguments = ["--net", "recompute_nets:small", "--input-shape", "3,8,9", "--batch", "4", "--tune", "all"]
    arguments += ["--method", method, *(["--ranks", "0.5"] if method == "lance" else [])]
    arguments += ["--measure", "--format", "json"]
    assert main(arguments) == 0
    totals = json.loads(capsys.readouterr().out)["totals"][method]
    assert totals["flops"]["recompute"] > 0
    assert main([*arguments[:-2]]) == 0
    assert "recompute" in capsys.readouterr().out


def test_the_papers_convention_bills_the_second_forward_of_tuned_layers() -> None:
    """Multiply-adds of the tuned layers alone; the head, outside, is not run again anyway."""
    net = nn.Sequential(nn.Recompute(two_linears()), nn.Linear(5, 3))
    report = cost(net, batch=4, input_shape=(6,), tune="all", methods=["bp"], convention="paper")
    assert report.totals["bp"].flops["recompute"] == report.totals["bp"].flops["forward"] == 168 + 140


def test_nets_without_segments_have_no_recompute_column(capsys: pytest.CaptureFixture[str]) -> None:
    """A kind that nobody spends on is not shown."""
    assert main(["--net", "convnet", "--batch", "2", "--tune", "all"]) == 0
    assert "recompute" not in capsys.readouterr().out


def test_mobilenetv2_in_four_segments() -> None:
    """A real net: the factor by which the tape shrinks, and exactly one more forward pass of the features."""
    net = models.create("mobilenetv2", num_classes=10, rng=0)
    plain = cost(net, batch=2, image_size=64, tune="all", methods=["bp"]).totals["bp"]
    net.features = nn.checkpoint_sequential(net.features, 4)
    prediction = predict(net, 2, 64, tune="all", methods=["bp"])
    found = prediction.report.totals["bp"]
    assert found.activation_bytes["tape"] < plain.activation_bytes["tape"] / 5
    head = 2 * 2 * 1280 * 10
    assert found.flops["recompute"] == plain.flops["forward"] - head
    assert {kind: found.flops[kind] for kind in ("forward", "grad_input", "grad_weight")} == {
        kind: plain.flops[kind] for kind in ("forward", "grad_input", "grad_weight")
    }
    comparison = compare(prediction)
    assert comparison.agrees, str(comparison)


def test_lance_inside_a_segment_keeps_nothing_until_backward() -> None:
    """The change of stores reaches into segments: the layer projects in the second run, and its factors are at hand."""
    net = nn.Sequential(nn.Recompute(two_linears()), nn.Linear(5, 3))
    records, _ = step(net, np.ones((4, 6), np.float32), np.zeros(4, np.int64))
    bills = {
        b.name: b
        for b in account(
            with_described_stores(records, {"0.0": {"name": "lance", "ranks": (2, 3), "order": "auto"}}), "1"
        )
    }
    assert bills["0.0"].cost.projection_macs > 0
    assert (bills["0.0"].tape_bytes, bills["0.0"].subspace_bytes) == (0, (4 * 2 + 6 * 3) * 4)
    assert bills["0"].tape_bytes == 4 * 6 * 4
    assert bills["0"].cost.second_tape_bytes == 4 * 7 * 4 + 3 + 2 * 3 * 4  # and the core


def test_a_store_whose_ranks_vary_is_costed_with_those_of_the_second_run() -> None:
    """HOSVD inside nested segments chooses its ranks during backward, after the records were made."""
    inner = nn.Recompute(nn.Sequential(nn.Conv2d(4, 4, 3, rng=2)))
    net = nn.Sequential(nn.Recompute(nn.Sequential(nn.Conv2d(2, 4, 3, rng=1), inner)), nn.Flatten(), nn.Linear(8, 3))
    for path in tune(net, "all").layers:
        net.get_submodule(path).store = Hosvd(epsilon=0.8)
    found = []
    for contrast in (1.0, 0.01):  # near-constant images have ranks of 1
        x = 1 + contrast * np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
        with count_macs() as counter:
            records, loss = step(net, x, np.array([0, 2, 1]))
            loss.backward()
        bills = account(records, "2")
        for kind in ("forward", "grad_input", "grad_weight", "projection", "decomposition", "recompute"):
            assert sum(getattr(bill.cost, f"{kind}_macs") for bill in bills) == counter.by_kind()[kind], kind
        found.append([bill.cost.ranks for bill in bills if bill.cost.ranks])
    assert len(found[0]) == 2
    assert found[0] != found[1]


# ---- PyTorch ---------------------------------------------------------------------------------


def test_pytorchs_checkpoint_keeps_what_the_rule_says() -> None:
    """torch.utils.checkpoint on layers of PyTorch's own: the input of each segment, nothing of the inside."""
    torch = pytest.importorskip("torch")
    from torch.utils.checkpoint import checkpoint

    def segment(seed: int) -> Any:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6), torch.nn.ReLU())

    kept: list[Any] = []
    x = torch.ones(4, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = checkpoint(segment(0), x, use_reentrant=False)
        checkpoint(segment(1), y, use_reentrant=False)
    ours = nn.Sequential(
        *(nn.Recompute(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU())) for _ in "ab")
    )
    with record(ours) as records:
        ours(np.ones((4, 6), np.float32)).sum()
    bills = account(records, None)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept if t.numel()}
    assert sum(bill.pytorch_bytes for bill in bills) == sum(storages.values()) == 2 * 4 * 6 * 4


def test_pytorchs_replay_really_recomputes() -> None:
    """Its counter sees the second forward pass: without it this comparison would prove nothing."""
    pytest.importorskip("torch")
    net = nn.Sequential(nn.Recompute(two_linears()), nn.Linear(5, 3))
    records, _ = step(net, np.ones((4, 6), np.float32), np.zeros(4, np.int64))
    plain, _ = step(nn.Sequential(two_linears(), nn.Linear(5, 3)), np.ones((4, 6), np.float32), np.zeros(4, np.int64))
    assert torch_replay.flops(records).backward - torch_replay.flops(plain).backward == 2 * (168 + 140)


# ---- planted faults --------------------------------------------------------------------------


@pytest.fixture(name="differences")
def _differences() -> Callable[[], set[str]]:
    """What differs for a net with nested segments."""

    def run() -> set[str]:
        comparison = measure(recompute_nets.small(), (3, 8, 9))
        return {line.what for line in comparison.lines if not line.agrees}

    assert run() == set()
    return run


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[OpCost, Executed, Memory], OpCost]) -> None:
    right = recompute_rules.cost_inside
    monkeypatch.setattr(fold, "cost_inside", lambda item, memory: change(right(item, memory), item, memory))


def test_planted_forgotten_second_forward(monkeypatch: pytest.MonkeyPatch, differences: Callable[[], set[str]]) -> None:
    """Checkpointing that comes for free."""
    plant(monkeypatch, lambda cost, item, memory: replace(cost, recompute_macs=0))
    assert "recompute multiply-adds" in differences()


def test_planted_one_second_forward_however_deep(
    monkeypatch: pytest.MonkeyPatch, differences: Callable[[], set[str]]
) -> None:
    """Nested segments billed as if there were one."""
    plant(
        monkeypatch,
        lambda cost, item, memory: replace(cost, recompute_macs=min(item.runs_again, 1) * cost.forward_macs),
    )
    assert differences() >= {"recompute multiply-adds"}


def test_planted_activations_kept_inside(monkeypatch: pytest.MonkeyPatch, differences: Callable[[], set[str]]) -> None:
    """Checkpointing that keeps what it is there not to keep."""

    def keep(cost: OpCost, item: Executed, memory: Memory) -> OpCost:
        return replace(cost, tape=recompute_rules.cost_of(item.record, memory, item.on_tape).tape)

    plant(monkeypatch, keep)
    assert "tape bytes" in differences()


# ---- micro-batches ---------------------------------------------------------------------------


def test_a_step_with_micro_batches_has_the_tape_of_one_and_the_work_of_all() -> None:
    """Batch 12 in three micro-batches of 4: the bytes predicted at batch 4, three times its multiply-adds."""
    B, k = 12, 4
    net = models.create("convnet", in_channels=3, num_classes=5, rng=0)
    prediction = predict(net, k, input_shape=(3, 16, 16), tune="last:2", methods=["bp"])
    total = prediction.report.totals["bp"]
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((B, 3, 16, 16)).astype(np.float32), rng.integers(0, 5, B)
    with count_macs() as counter:
        for start in range(0, B, k):
            loss = F.cross_entropy(net(x[start : start + k]), labels[start : start + k]) * (k / B)
            # the loss is scaled afterwards by a number, which is kept as an array of one element
            assert tape(loss).total_bytes == total.activation_bytes["tape"] + 4
            loss.backward()
    for kind, macs in counter.by_kind().items():
        if kind != "calibration":
            assert 2 * macs == B // k * total.flops[kind], kind


def test_flatten_lists_segments_before_their_inside() -> None:
    """The order of all tables."""
    records, _ = step(nn.Recompute(two_linears()), np.ones((4, 6), np.float32), np.zeros(4, np.int64))
    assert [r.op for r in flatten(records)] == ["recompute", "linear", "tanh", "linear", "relu", "cross_entropy"]
