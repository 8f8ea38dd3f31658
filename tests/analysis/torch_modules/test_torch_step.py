"""A step on shapes alone beside a real one: every byte and every multiply-add, module by module."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_nets import (  # noqa: E402
    NETS,
    ByValue,
    Checkpointed,
    Named,
    all_frozen,
    between,
    plain,
    really_kept,
    summed,
)
from torch_twins import one_thread  # noqa: E402

from analysis.steps.nets import CannotRunError  # noqa: E402
from analysis.torch_modules.inputs import Asked, read_specs  # noqa: E402
from analysis.torch_modules.run import Run, watched_step  # noqa: E402


def run(spec: Any, batch: int = 2, **options: Any) -> Run:
    return Run(Asked.of(batch, read_specs(spec, None), None, batch), **options)


@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("name", NETS)
def test_shapes_alone_say_what_a_real_step_does(name: str, kind: str) -> None:
    """Other kernels for tensors without data, and other dtypes of what they keep, would be seen here."""
    make, spec = NETS[name]
    module = make().to(torch.bfloat16) if kind == "bfloat16" else make()
    autocast = "bfloat16" if kind == "autocast" else None
    how = run(spec, autocast=autocast, loss=summed)
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_shapes, real = (watched_step(module, name, how, real=real) for real in (False, True))
        inputs = how.inputs.tensors(module).args
        kept = really_kept(module, inputs, summed, torch.bfloat16 if autocast else None)
    assert on_shapes.total_bytes() == kept
    assert on_shapes.bytes_by_path() == real.bytes_by_path()
    assert on_shapes.macs == real.macs
    assert on_shapes.uncounted == ()


def test_a_hand_made_step() -> None:
    """Two linear layers: 2x7 in, 6 hidden, 4 out. ReLU's result is the next layer's input, and kept once."""
    step = watched_step(NETS["mlp"][0](), "mlp", run((7,)))
    assert step.bytes_by_path() == {"0": 4 * 2 * 7, "1": 4 * 2 * 6, "(loss)": 4 * 2 * 4 + 2 * 8 + 4}
    assert step.macs == {
        ("0", "forward"): 84, ("2", "forward"): 48,
        ("0", "grad_weight"): 84, ("2", "grad_weight"): 48, ("2", "grad_input"): 48,
    }  # fmt: skip
    assert (step.head, step.tuned_layers, step.classes) == ("2", ("0",), 4)
    assert step.bytes_by_path({"0", "2"}) == {"1": 48, "(loss)": 52}  # the ReLU still holds what "2" does not
    step = watched_step(NETS["mlp"][0](), "mlp", run((7,), autocast="bfloat16"))
    assert step.bytes_by_path({"0", "2"})["2"] == 2 * 4 * 6  # the weight in half precision, for the input's gradient


def test_a_checkpoint_runs_twice() -> None:
    """Recomputed multiply-adds are those of the segment, all but what nobody needs a second time."""
    for reentrant in (False, True):
        step = watched_step(Checkpointed(reentrant), "net", run((8,)))
        again = step.total_macs("recompute")
        first = 2 * 8 * 16
        assert again == (2 * first if reentrant else first)  # the other kind stops as soon as nothing is missing
        assert step.total_macs("grad_weight") == 2 * first + 2 * 8 * 5


def test_groups_stay_in_the_weight_gradient() -> None:
    """FlopCounterMode has four times as many."""
    step = watched_step(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Flatten()), "net", run((4, 6, 6), loss=summed))
    assert step.macs["0", "grad_weight"] == 2 * 8 * 16 * 1 * 9 == step.macs["0", "forward"]


def test_what_is_frozen_keeps_less_and_convolutions_keep_their_input() -> None:
    """A linear layer that is frozen drops its input; PyTorch's convolution keeps it where backward comes through."""
    linear = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 4))
    step = watched_step(linear, "net", run((7,), freeze=("1.*",), loss=summed))
    assert step.bytes_by_path() == {"0": 4 * 2 * 7, "2": 4 * 2 * 5}
    assert ("1", "grad_weight") not in step.macs
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1))
    step = watched_step(conv, "net", run((3, 6, 6), freeze=("1.*",), loss=summed))
    assert step.bytes_by_path()["1"] == 4 * 2 * 4 * 36
    assert ("1", "grad_weight") not in step.macs


def test_selected_layers_train_with_the_head() -> None:
    """As lance_ref.tune selects, whatever the module itself says."""
    step = watched_step(all_frozen(), "net", run((3, 16, 16), tune="last:1"))
    assert (step.tuned_layers, step.head) == (("2",), "6")
    assert step.trained_parameters == 8 * 2 * 9 + 8 + 1152 * 10 + 10
    with pytest.raises(ValueError, match="matches no convolution or linear layer"):
        watched_step(plain(), "net", run((3, 16, 16), tune="nowhere*"))


@pytest.mark.parametrize("real", [False, True])
def test_nothing_of_the_module_changes(real: bool) -> None:
    """Weights, running statistics, gradients, mode, selection and random numbers are as they were."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(196, 3))
    module[0].weight.requires_grad_(False)
    module[4].weight.grad = torch.ones_like(module[4].weight)
    before = copy.deepcopy(module.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    watched_step(module, "net", run((3, 9, 9), tune="all", freeze=("4.bias",)), real=real)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True, True, True]
    assert torch.equal(module[4].weight.grad, torch.ones_like(module[4].weight))
    assert module.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002


def test_examples_name_inputs_and_stay() -> None:
    """A dictionary gives arguments by name; the module's own loss is taken where it returns one."""
    tokens, mask = torch.zeros(5, 7, dtype=torch.int64), torch.ones(5, 7)
    example = {"tokens": tokens, "mask": mask}
    step = watched_step(Named(), "net", Run(Asked.of(None, (), example, 128)))
    assert (step.batch, step.classes, step.loss) == (5, 3, "Loss: cross-entropy of the output's logits")
    labelled = {**example, "labels": torch.zeros(5, dtype=torch.int64)}
    step = watched_step(Named(), "net", Run(Asked.of(None, (), labelled, 128)))
    assert step.loss == "Loss: the one that the module returned"
    specs = read_specs(["7:int64", "mask=7"], None)
    assert watched_step(Named(), "net", Run(Asked.of(5, specs, None, 128))).total_bytes() == (
        watched_step(Named(), "net", Run(Asked.of(None, (), example, 128))).total_bytes()
    )
    written = torch.full((5, 4), -1.0)
    how = Run(Asked.of(None, (), written, 128))
    watched_step(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)), "net", how, real=True)
    assert torch.equal(written, torch.full((5, 4), -1.0))
    with pytest.raises(ValueError, match="batch is 4, but the example"):
        Asked.of(4, (), example, 128)


def test_a_batch_that_no_memory_could_hold() -> None:
    """Shapes alone take no memory: 28 GiB of activations here."""
    step = watched_step(between(nn.ReLU()), "net", run((3, 512, 512), batch=4096))
    assert step.total_bytes() == 4096 * 512 * 512 * 4 * (3 + 4)


@pytest.mark.parametrize(
    ("make", "spec", "options", "error", "words"),
    [
        (all_frozen, (3, 16, 16), {}, ValueError, "nothing trains"),
        (plain, (3, 15, 15), {}, CannotRunError, r"cannot run on inputs \(2, 3, 15, 15\)"),
        (plain, (3, 16, 16), {"freeze": ("nowhere*",)}, ValueError, "--freeze 'nowhere"),
        (
            plain,
            (3, 16, 16),
            {"loss": lambda y: y},
            ValueError,
            r"gave a tensor of shape \(2, 10\), expected one number",
        ),
        (plain, (3, 16, 16), {"loss": lambda y: y.detach().sum()}, ValueError, "the loss has no gradient"),
        (plain, (3, 16, 16), {"loss": lambda y: y.nothing}, ValueError, "nothing"),
        (ByValue, (4,), {}, CannotRunError, "depends on the values of tensors"),
        (lambda: nn.LazyLinear(3), (4,), {}, ValueError, "run it once on an example"),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)),
            (4,),
            {"freeze": ("0.*",)},
            ValueError,
            "nothing trains",
        ),
    ],
)
def test_refusals(make: Any, spec: Any, options: Any, error: Any, words: str) -> None:
    """In one line that says what to do."""
    with pytest.raises(error, match=words) as raised:
        watched_step(make(), "net", run(spec, **options))
    assert "\n" not in str(raised.value)
