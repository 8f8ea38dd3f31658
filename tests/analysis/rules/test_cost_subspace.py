"""What training in a subspace costs: formulas by hand, the records of the register beside real ones, whole steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import cost
from analysis.check.measure import compare
from analysis.peak import updates
from analysis.reports.predict import predict
from analysis.rules.account import account
from analysis.rules.layouts import Memory
from analysis.rules.op_cost import Call
from analysis.steps.methods import METHODS
from analysis.steps.settings import Settings
from lance_ref import Subspace, attach, compress, nn, record
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.stores import Lance


def bill(net: nn.Sequential, shape: tuple[int, ...]) -> Any:
    """Of the first layer, on an input that has a gradient."""
    from lance_ref import Tensor

    with record(net) as records:
        net(Tensor(np.ones(shape, np.float32), requires_grad=True)).sum()
    return account(records, None)[0].cost


def test_a_convolution_by_hand() -> None:
    """(3, 4, 5, 6), 8 channels out, kernel 1x2, r = 2: 3·5·5 places; W has 64 numbers, D 32."""
    plain = 75 * 8 * 4 * 2
    merging, narrow = 64 * 2, 3 * 5 * 6 * 4 * 2 + 75 * 8 * 2 * 2
    for forward, more in (("merged", merging), ("factored", narrow), ("auto", merging)):
        net = nn.Sequential(nn.Conv2d(4, 8, (1, 2), rng=0))
        space = Subspace.random((3, 4, 5, 6), (None, 2, None, None), np.random.default_rng(0))
        attach(net, lambda *_, space=space: Lance(space), update="subspace", forward=forward)
        found = bill(net, (3, 4, 5, 6))
        assert found.forward_macs == found.grad_input_macs == plain + more
        assert found.grad_weight_macs == 75 * 8 * 2 * 2  # the exact gradient of a layer of two channels
        assert found.subspace_bytes == 4 * 4 * 2  # Q is U itself
        assert found.tape[0].storage.nbytes == 4 * 3 * 2 * 5 * 6


def test_one_image_by_hand() -> None:
    """A linear layer 8 to 6 of rank 2 on one row: 2·(8 + 6) beside 48, where writing W down would take 96."""
    net = nn.Sequential(nn.Linear(8, 6, rng=0))
    space = Subspace.random((1, 8), (None, 2), np.random.default_rng(0))
    attach(net, lambda *_: Lance(space), update="subspace")
    found = bill(net, (1, 8))
    assert found.forward_macs == found.grad_input_macs == 48 + 28


def test_writing_the_weight_down_takes_it_twice() -> None:
    """A kernel of nine places: the product, and its axes in order; one of one place needs no second array."""
    for kernel, arrays in ((3, 2), (1, 1)):
        net = nn.Sequential(nn.Conv2d(32, 64, kernel, rng=0))
        space = Subspace.random((64, 32, 3, 3), (None, 2, None, None), np.random.default_rng(0))
        attach(net, lambda *_, space=space: Lance(space), update="subspace", forward="merged")
        with record(net) as records:
            net(np.ones((64, 32, 3, 3), np.float32))
        call = account(records, None)[0]
        inputs = tuple(Memory().of(value) for value in call.record.inputs)
        assert updates.merging(Call(call.record, inputs, inputs[0], True)) == arrays * net[0].weight.data.nbytes


def test_the_page_prints_these_numbers() -> None:
    """Gradients and peaks of docs/subspace.md, in KiB."""
    page = (Path(__file__).parents[3] / "docs" / "subspace.md").read_text(encoding="utf-8")
    for name, batch in (("mcunet", 1), ("resnet18", 8)):
        for update in ("weight", "subspace"):
            peak = cost(
                name, batch=batch, num_classes=10, method="lance", optimizer="sgd-momentum", update=update
            ).peaks["lance"]  # fmt: skip
            for value in (peak.gradients_bytes, peak.optimizer_state_bytes, peak.peak_bytes):
                assert f" {value / 1024:,.1f}" in page


def test_groups_by_hand() -> None:
    """12 channels in 2 groups, r = 3: Q has 2·6·3 numbers and U in its coordinates 2·3·3, beside 12·3 of U."""
    net = nn.Sequential(nn.Conv2d(12, 4, 1, groups=2, rng=0))
    space = Subspace.random((2, 12, 3, 3), (None, 3, None, None), np.random.default_rng(0))
    attach(net, lambda *_: Lance(space), update="subspace")
    found = bill(net, (2, 12, 3, 3))
    assert found.subspace_bytes == 4 * (36 + 36 + 18) == net[0].store.factor_bytes


@pytest.mark.parametrize("method", ["lance", "lance-mean-free", "lance-center"])
@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum"])
def test_predicted_equals_measured(method: str, optimizer: str) -> None:
    """Bytes and multiply-adds of a whole step to the last one, and the peak within its band."""
    prediction = predict(
        "resnet8", 4, 16, tune="last:5", methods=["bp", method], with_weights=True,
        settings=Settings(update="subspace"), optimizer=optimizer,
    )  # fmt: skip
    before = dict(prediction.step.net.state_dict())
    comparison = compare(prediction, peaks=True)
    assert comparison.agrees, str(comparison)
    assert any(method in note and "PyTorch has no such update" in note for note in comparison.notes)
    after = prediction.step.net.state_dict()
    assert list(after) == list(before), "the net is as it was"
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    if numba_enabled():
        assert any(line.what == "peak bytes" and line.method == method for line in comparison.lines)


def test_depthwise_layers_train_as_they_are() -> None:
    """One channel a group has no smaller coordinates; the layers around it have."""
    prediction = predict("mcunet", 2, 96, tune="last:6", methods=["lance"], settings=Settings(update="subspace"))
    tuned = [r for r in prediction.steps["lance"].records if r.attributes.get("store", {}).get("name") == "lance"]
    depthwise = [r for r in tuned if r.attributes["groups"] > 1]
    assert 0 < len(depthwise) < len(tuned)
    assert all(("update" in r.attributes) == (r not in depthwise) for r in tuned)


def test_gradients_and_state_fall() -> None:
    """By C_in/r each: with the same ranks the peak of a net whose weights outweigh its maps falls too."""
    peaks = {
        update: cost("mcunet", batch=1, num_classes=10, method="lance", optimizer="sgd-momentum", update=update).peaks[
            "lance"
        ]
        for update in ("weight", "subspace")
    }
    weight, subspace = peaks["weight"], peaks["subspace"]
    assert subspace.gradients_bytes < 0.5 * weight.gradients_bytes
    assert subspace.optimizer_state_bytes == subspace.gradients_bytes
    assert subspace.peak_bytes < weight.peak_bytes


def test_only_what_the_register_says_changes() -> None:
    """Other methods know no update; the weight is the default, and the same as before."""
    with_update = [name for name, method in METHODS.items() if "update" in method.names]
    assert with_update == ["lance", "lance-mean-free", "lance-center"]
    plain = cost("resnet8", batch=4, method="lance", image_size=16)
    said = cost("resnet8", batch=4, method="lance", image_size=16, update="weight")
    assert said.totals["lance"] == plain.totals["lance"]
    with pytest.raises(ValueError, match="update is 'space', expected one of weight, subspace"):
        Settings(update="space")


def test_records_of_the_register_are_those_of_a_real_net() -> None:
    """Shapes, parameters and what needs gradients, of D and s as of W_0."""
    prediction = predict("resnet8", 4, 16, tune="last:3", methods=["lance"], with_weights=True,
                         settings=Settings(update="subspace"))  # fmt: skip
    ours = [r for r in prediction.steps["lance"].records if "update" in r.attributes]
    net = prediction.step.net
    rng = np.random.default_rng(0)
    tuned = {r.path: r for r in ours}
    spaces = {
        path: Subspace.random(r.inputs[0].shape, r.attributes["store"]["ranks"], rng) for path, r in tuned.items()
    }
    compress(net, spaces, update="subspace")
    with record(net) as records:
        net(np.zeros((4, *prediction.step.input_shape), np.float32))
    theirs = [r for r in records if "update" in r.attributes]
    assert len(theirs) == len(ours) > 0
    for mine, real in zip(ours, theirs, strict=True):
        assert [(v.shape, v.parameter, v.requires_grad) for v in mine.inputs] == [
            (v.shape, v.parameter, v.requires_grad) for v in real.inputs
        ]
        assert mine.attributes == real.attributes
