"""What one candidate costs as a device program: its arena, and multiply-adds beside backpropagation's.

The same search as for the library runs on these costs. A device sees one image at a time, so that the batch is 1
everywhere: gradients of a batch of any size are added up, or every image is an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import lance_ref
from analysis.device.check import choices_of, settings_of, step_trace
from analysis.device.choices import DeviceSettings, LayerRanks
from analysis.device.predict import StepTrace, predict, trained_bytes
from analysis.device.programs import DEVICE_METHODS
from analysis.device.subspaces import random_subspaces
from analysis.planner.costs import Costs, Device, Layers, Memory
from analysis.planner.options import Option
from analysis.ranks.spectra_file import Spectra
from analysis.steps.methods import METHODS
from lance_ref import device as programs
from lance_ref.device import Program
from lance_ref.nn.module import Module

FAR = 2
"""Times the budget from which on the weights that train decide alone that nothing fits."""


def device_options(methods: Sequence[str], directions: Sequence[int], updates: Sequence[str]) -> list[Option]:
    """Every method that a device has, with every number of directions and every time of its update.

    >>> [option.name for option in device_options(["lance", "bp"], [8], ["batch", "image"])]
    ['lance 8 directions, update batch', 'lance 8 directions, update image', 'bp update batch', 'bp update image']
    """
    options = []
    for method in methods:
        for number in directions if method == "lance" else (None,):
            options += [Option(method, directions=number, update=update) for update in updates]
    return options


class DeviceCosts(Costs):
    """Costs of candidates as device programs; those of an option without an update are the library's.

    Parameters
    ----------
    net : Module
        With weights.
    name, input_shape, dtype, spectra, tune
        As of :class:`analysis.planner.costs.Costs`.
    budget : int
        Bytes of RAM: of the programs that fit, the one with the fewest multiply-adds counts. None: the smallest.
    optimizer : {"sgd", "sgd-momentum"}
    weights : {"flash", "int8"}
        How frozen weights lie in flash; they take no RAM either way.
    """

    def __init__(
        self,
        net: Module,
        name: str,
        input_shape: tuple[int, ...],
        dtype: str,
        spectra: Spectra | None,
        budget: int | None,
        optimizer: str = "sgd",
        tune: str | Sequence[str] = "all",
        weights: str = "flash",
    ) -> None:
        if optimizer == "adam":
            raise ValueError("--optimizer is 'adam', but a device program has sgd and sgd-momentum")
        super().__init__(net, name, input_shape, Device("peak", "flash", "elsewhere", optimizer), dtype, spectra, tune)
        self.budget = budget
        self.program = lru_cache(maxsize=None)(self._program)
        self.library = self.device
        self.device = Device("program", weights, "elsewhere", optimizer)
        self.program(Option("head-only", update="image"), 0)  # a net that no device can run is refused at once

    def _program(self, option: Option, layers: Layers) -> tuple[Memory, Program | None]:
        """Memory of an option, and its program; without one where none fits, with the memory of the smallest.

        Where the weights that train take far more than the budget, their bytes stand for the memory of all.
        """
        momentum = self.device.optimizer == "sgd-momentum"
        trace, ranks = self._tuned_for(option, layers)
        weights = trained_bytes(trace, DeviceSettings(ranks))
        sums = weights if momentum or option.update == "batch" else 0
        needed, program, flash = weights + sums, None, 0
        if self.budget is None or layers in (0, 1) or needed <= FAR * self.budget:
            try:
                program = self._compiled(option, layers, ranks, self.budget or 1)
            except programs.BudgetError as error:
                needed = error.needed_bytes
                if self.budget is None:
                    program = self._compiled(option, layers, ranks, needed)
        if program is not None:
            needed, flash = program.ram_bytes, self._flash(program)
        gradients, state = (0, sums) if momentum else (sums, 0)
        return Memory(needed - weights, 0, weights, gradients, state, flash=flash), program

    def _flash(self, program: Program) -> int:
        """Bytes in flash; in int8 a frozen weight has a byte a number, and a float32 for each output channel."""
        stored = program.flash.items()
        if self.device.weights == "flash":
            return program.flash_bytes
        return sum(a.size + 4 * len(a) if name.endswith(".weight") else a.nbytes for name, a in stored)

    def _tuned_for(self, option: Option, layers: Layers) -> tuple[StepTrace, dict[str, LayerRanks]]:
        """The forward pass with so many layers chosen, and the ranks of those that keep a core, without the batch's."""
        biases = option.method == "bias-only" and bool(layers)
        try:
            tuned = lance_ref.tune(self.net, self.selection(layers), parameters="bias" if biases else "all").layers
            trace = step_trace(self.net, self.input_shape)
        finally:
            lance_ref.tune(self.net, "head")  # what self.tuned() takes for granted
        ranks = self.ranks(option, 1) if option.directions is not None else {}
        return trace, {path: ranks[path][1:] for path in tuned if any(ranks.get(path, ()))}

    def _compiled(self, option: Option, layers: Layers, ranks: dict[str, LayerRanks], budget: int | None) -> Program:
        method = DEVICE_METHODS[option.method]
        momentum = 0.9 if self.device.optimizer == "sgd-momentum" else 0.0
        calibration = random_subspaces(self.shapes(1), ranks) if method == "lance" else None
        try:
            return programs.compile(
                self.net, calibration, self.input_shape, self.selection(layers), option.update, budget, method=method,
                momentum=momentum,
            )  # fmt: skip
        finally:
            lance_ref.tune(self.net, "head")

    def _work(self, option: Option, layers: Layers) -> int:
        """Multiply-adds of the program, of the smallest one where none fits."""
        memory, program = self.program(option, layers)
        trace, ranks = self._tuned_for(option, layers)
        if program is None:
            try:
                program = self._compiled(option, layers, ranks, memory.total)
            except programs.BudgetError:  # what stands for the memory is that of the weights
                program = self._compiled(option, layers, ranks, None)
        return sum(predict(trace, settings_of(program), choices_of(program)).macs.values())

    def _memory(self, option: Option, layers: Layers, batch: int) -> Memory:
        return self.program(option, layers)[0] if option.update else super()._memory(option, layers, batch)

    def macs(self, option: Option, layers: Layers, batch: int) -> int:
        """Multiply-adds of one image's step, those that tiles compute again included."""
        return self._work(option, layers) if option.update else super().macs(option, layers, batch)

    def in_the_library(self, option: Option, layers: Layers) -> Memory:
        """The same directions and layers in the library, with one image."""
        with_library = Option(option.method, option.settings, directions=option.directions)
        own, self.device = self.device, self.library
        try:
            return super()._memory(with_library, layers if METHODS[option.method].layers else 0, 1)
        finally:
            self.device = own
