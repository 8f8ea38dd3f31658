"""The cost rules against what runs: for every operation, bytes of the live tape and multiply-adds executed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cost_cases import CASES, run

import lance_ref
from analysis.rules.account import account
from analysis.rules.op_cost import MissingRuleError
from analysis.rules.operations import OPERATIONS


@pytest.mark.parametrize("name", CASES)
def test_tape_bytes_equal_the_live_tape(name: str) -> None:
    """A rule that forgets, invents or doubles a kept array."""
    records, _ = run(name, real=False)
    _, loss = run(name, real=True)
    assert sum(bill.tape_bytes for bill in account(records, None)) == lance_ref.tape(loss).total_bytes


@pytest.mark.parametrize("name", CASES)
def test_multiply_adds_equal_the_executed_ones(name: str) -> None:
    """A rule that miscounts a product, or books it as the wrong kind."""
    records, _ = run(name, real=False)
    with lance_ref.count_macs() as counter:
        run(name, real=True)[1].backward()
    bills = account(records, None)
    kinds = ("forward", "grad_input", "grad_weight")
    predicted = {kind: sum(getattr(bill.cost, f"{kind}_macs") for bill in bills) for kind in kinds}
    assert predicted == {kind: counter.by_kind()[kind] for kind in predicted}


def test_every_operation_of_the_library_has_a_rule() -> None:
    """A new operation without a rule would stop every net that uses it."""
    functions = [lance_ref.engine.autograd.Function]
    for function in functions:
        functions += function.__subclasses__()
    ops = {f.op for f in functions if hasattr(f, "op") and f.__module__.startswith("lance_ref.")}
    assert len(ops) > 30
    assert ops <= {name for name, row in OPERATIONS.items() if row.cost}


def test_an_operation_without_a_rule_is_an_error() -> None:
    """Unknown work must never count as zero: the error names the operation and the layer."""
    records, _ = run("relu", real=False)
    records[0] = replace(records[0], op="fold", path="encoder.3")
    with pytest.raises(MissingRuleError, match=r"no cost rule for operation 'fold' in layer 'encoder\.3'"):
        account(records, None)


def test_a_store_without_a_rule_is_an_error() -> None:
    """An unknown way of keeping activations must not be billed as an exact one."""
    records, _ = run("conv2d", real=False)
    changed = replace(records[0], path="conv", attributes={**records[0].attributes, "store": {"name": "wavelet"}})
    with pytest.raises(LookupError, match="no cost rule for the activation store 'wavelet' of layer 'conv'"):
        account([changed, *records[1:]], None)


@pytest.mark.parametrize(
    ("name", "elementwise"),
    [
        ("relu", 120 * (1 + 1) + 120),  # 2·3·5·4 elements; and the sum
        ("gelu", 120 * (5 + 11) + 120),
        ("sub", 6 + (0 + 6) + 6 + 6),  # forward; b is negated and summed to its shape; the sum
        ("div both", 6 + 6 + 24 + 6 + 6),  # forward, ∂a, ∂b, folded to (3,), the sum
        ("conv2d", 2 * 4 * 5 * 7 * 3),  # bias added, its gradient summed, and the sum; (2, 4, 5, 7)
        ("cross_entropy", 5 * 1500 + 5 + 2 * 1500),
        ("max_pool2d", 2 * 3 * 4 * 5 * (6 + 1 + 1)),  # (2, 3, 4, 5): six in a window, one scattered, the sum
        ("batch_norm frozen", 120 * (2 + 1 + 1)),
        ("layer_norm", 48 * (8 + 2 + 7 + 2 + 1 + 1)),
        ("adaptive_avg_pool2d", 6 * (4 + 4) * (3 + 4 + 3) * 2 + 36 * 2 + 36),  # rows 0-4, 3-7; columns 0-3, 2-6, 5-8
        ("dead branch", 24 + 24 * 2 + 24),
    ],
)
def test_elementwise_is_what_the_table_says(name: str, elementwise: int) -> None:
    """The documented count of scalar operations, worked by hand."""
    records, _ = run(name, real=False)
    assert sum(bill.cost.elementwise for bill in account(records, None)) == elementwise
