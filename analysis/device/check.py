"""A program beside its prediction: the bytes of its arena, and the multiply-adds that ran."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.device.choices import Choices, DeviceSettings
from analysis.device.predict import DevicePrediction, StepTrace, predict
from analysis.device.work import KINDS
from lance_ref.device import Program
from lance_ref.device.segments import convolutions
from lance_ref.engine.state import state
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module
from lance_ref.nn.tracing import record


@dataclass(frozen=True)
class Difference:
    """One number that is not as predicted."""

    what: str
    predicted: int
    measured: int

    def __str__(self) -> str:
        return f"{self.what}: predicted {self.predicted:,}, measured {self.measured:,}"


def step_trace(net: Module, input_shape: tuple[int, ...]) -> StepTrace:
    """The forward pass of a net in training mode, which is left as it was."""
    training = [module for _, module in net.named_modules() if module.training]
    net.train()
    try:
        x = Tensor.meta((2, *input_shape), next((p.dtype for p in net.parameters()), None))
        with record(net) as records:
            output = net(x)
            assert state.recorder is not None
            return StepTrace(records, state.recorder.value(output).id)
    finally:
        net.eval()
        for module in training:
            module.training = True


def settings_of(program: Program) -> DeviceSettings:
    """How a program trains."""
    recipe = program.recipe
    ranks = {
        path: tuple(None if factor is None else factor.shape[1] for factor in factors)
        for path, factors in recipe.factors.items()
    }
    return DeviceSettings(
        ranks, recipe.in_subspace, recipe.update == "batch", recipe.momentum > 0, recipe.pixels is not None
    )  # fmt: skip


def choices_of(program: Program) -> Choices:
    """What the compiler chose for a program."""
    choice = program.layout.choice
    heads = tuple(choice.heads[node] for node in convolutions(program.graph))
    merged = frozenset(path for path, layer in program.layout.layers.items() if layer.is_merged)
    return Choices(heads, choice.tiled, choice.tile, merged)


def prediction_of(program: Program, net: Module, input_shape: tuple[int, ...]) -> DevicePrediction:
    """The prediction for a program's choices, from the net that it was compiled from."""
    return predict(step_trace(net, input_shape), settings_of(program), choices_of(program))


def measured_macs(program: Program) -> dict[str, int]:
    """Multiply-adds that the last step ran, recomputed ones apart."""
    ran = dict(program.macs)
    again = program.layout.recomputed_macs
    return {**dict.fromkeys(KINDS, 0), **ran, "forward": ran.get("forward", 0) - again, "recomputed": again}


def differences(program: Program, predicted: DevicePrediction) -> list[Difference]:
    """What a program has, and what its last step of one image ran, where that is not as predicted."""
    found = [Difference("lower_bound_bytes", predicted.lower_bound_bytes, program.lower_bound_bytes)]
    found.append(Difference("flash_bytes", predicted.flash_bytes, program.flash_bytes))
    for kind in sorted({*predicted.ram, *program.ram}):
        found.append(Difference(f"RAM for {kind}", predicted.ram.get(kind, 0), program.ram.get(kind, 0)))
    live = program.layout.live
    found.append(Difference("instructions", len(predicted.live), len(live)))
    for i, (of, there) in enumerate(zip(predicted.live, live, strict=False)):
        found.append(Difference(f"bytes alive at instruction {i}, {program.layout.times[i]}", of, there))
    for kind, ran in measured_macs(program).items():
        found.append(Difference(f"multiply-adds {kind}", predicted.macs.get(kind, 0), ran))
    return [difference for difference in found if difference.predicted != difference.measured]
