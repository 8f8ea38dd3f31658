"""Peak memory of a training step: the largest total of buffers that are alive at the same time.

The tape is what lives between forward and backward. On top of it come activations in flight, gradients, the state of
the optimiser, and what an operation lays out while it runs. :func:`peak` simulates the step over its records;
:func:`measure_peak` runs a real one under ``tracemalloc``, to which NumPy reports its arrays.
"""

from __future__ import annotations

import gc
import importlib
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.commands.names import plain
from analysis.peak.arrays import BLOCK
from analysis.peak.lifetimes import Lifetimes, lifetimes_from_scopes
from analysis.peak.simulation import Simulation
from analysis.peak.stores import STORES
from analysis.rules.account import Billed, row_names
from analysis.rules.loss import loss_of
from analysis.rules.operations import known
from analysis.rules.recompute import OP as SEGMENT
from analysis.rules.recompute import flatten
from lance_ref import optim
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.engine.recording import OpRecord, itemsize
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module
from lance_ref.optim import Optimizer
from lance_ref.stores import ActivationStore

ESTIMATED = "no rule, an upper estimate is used"
"""Of the peak of an operation."""
STATE_COPIES = {"sgd": 0, "sgd-momentum": 1, "adam": 2}
"""By optimiser: arrays of a parameter's size that it remembers from step to step."""


@dataclass(frozen=True)
class Peak:
    """The peak of one training step, in bytes."""

    #: The largest total of live buffers: the batch, activations in flight, tape, gradients, optimiser state,
    #: workspaces. Parameters, module buffers and fixed factors, which are there all the time, are not in it.
    peak_bytes: int
    moment: str  #: When it occurs: "forward", "backward" or "optimiser".
    at: str  #: The operation, as the table names it; the parameter's name for the optimiser.
    #: The peak of each part.
    forward_bytes: int
    backward_bytes: int
    optimizer_bytes: int
    parameters_bytes: int  #: All parameters.
    gradients_bytes: int  #: Of the parameters that train, when backward is done.
    optimizer_state_bytes: int  #: Kept from step to step.
    #: Operations and stores without a rule, for which an upper estimate is used, in words.
    estimated: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Peak and parameters."""
        return self.peak_bytes + self.parameters_bytes

    def __str__(self) -> str:
        where = f"{self.peak_bytes / 2**20:.1f} MiB in {self.moment}, at {self.at}"
        apart = {
            "parameters": self.parameters_bytes,
            "gradients": self.gradients_bytes,
            "optimiser state": self.optimizer_state_bytes,
        }
        return f"{where}; {', '.join(f'{name} {count / 2**20:.1f} MiB' for name, count in apart.items())}"


def peak(
    step: Sequence[OpRecord] | Sequence[Billed],
    *,
    optimizer: str = "sgd",
    parameters: Iterable[Tensor] | None = None,
    lifetimes: Lifetimes | None = None,
) -> Peak:
    """The peak memory of one training step, simulated over its records in the order of execution.

    The work arrays of BLAS are not counted, and those of the compiled loops for as many threads as they have here.

    Parameters
    ----------
    step : sequence of OpRecord or of Billed
        Of a forward pass and its loss, the loss last, with the stores of the method in question. A step of
        micro-batches of k examples has the peak of a batch of k, and gradients from the start.
    optimizer : {"sgd", "sgd-momentum", "adam"}
    parameters : iterable of Tensor, optional
        All parameters of the net, for ``parameters_bytes``; by default those that the step reads.
    lifetimes : mapping, optional
        From :func:`analysis.peak.lifetimes.lifetimes`: exact. By default guessed from the paths of the records, which
        misses activations that a ``forward`` goes on naming.

    Examples
    --------
    >>> from lance_ref import nn
    >>> from analysis.peak.lifetimes import lifetimes
    >>> from analysis.steps.nets import trace_step
    >>> step = trace_step(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), "net", (6,), 8, "all", "float32")
    >>> found = peak(step.records, lifetimes=lifetimes(step.net, (8, 6)))
    >>> found.gradients_bytes, found.parameters_bytes  # 24 + 4 + 8 + 2 numbers
    (152, 152)
    """
    records = records_of(step)
    if not records:
        raise ValueError("the step is empty, expected the records of a forward pass and its loss")
    simulation = Simulation(records, lifetimes_from_scopes(records) if lifetimes is None else lifetimes)
    simulation.run()
    return peak_of(simulation, optimizer, None if parameters is None else parameters_bytes(parameters))


def estimated(records: Iterable[OpRecord]) -> tuple[str, ...]:
    """What among these has no rule of what it holds, so that an upper estimate is used: in words, each once."""
    found = set()
    for record in records:
        if record.op != SEGMENT and known(record.op).is_estimated:
            found.add(f"operation {plain(record.op)!r}")
        store = record.attributes.get("store", {}).get("name")
        if store is not None and store not in STORES and record.inputs[1].requires_grad:
            found.add(f"activation store {plain(store)!r}")
    return tuple(sorted(found))


def parameters_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of these parameters."""
    return sum(p.size * p.dtype.itemsize for p in parameters)


def peak_of(simulation: Simulation, optimizer: str, parameters: int | None) -> Peak:
    """The peak of a step that was simulated; ``parameters``: bytes of all of the net, else those that the step reads.

    Raises ValueError if there is no such optimiser.
    """
    if optimizer not in STATE_COPIES:
        raise ValueError(f"optimizer is {optimizer!r}, expected one of {', '.join(STATE_COPIES)}")
    records = simulation.records
    everything = flatten(records)
    read = {v.id: v for record in everything for v in record.inputs if v.parameter is not None}
    trained = {v: storage.nbytes for v, storage in simulation.gradients.items() if v in read}
    state, ledger = STATE_COPIES[optimizer] * sum(trained.values()), simulation.ledger
    names = dict(zip(map(id, everything), row_names(everything), strict=True))
    ends = {moment: most + state for moment, most in ledger.most.items()}
    where = {moment: names[id(record)] for moment, record in ledger.at.items()}
    ends["optimiser"] = ledger.live + state
    if trained:
        largest = max(trained, key=lambda value: trained[value])
        ends["optimiser"] += updating(optimizer, trained[largest], itemsize(read[largest].dtype))
        where["optimiser"] = str(read[largest].parameter)
    moment = max(ends, key=lambda moment: ends[moment])
    return Peak(
        peak_bytes=ends[moment],
        moment=moment,
        at=where.get(moment, ""),
        forward_bytes=ends["forward"],
        backward_bytes=ends["backward"],
        optimizer_bytes=ends["optimiser"],
        parameters_bytes=sum(value.nbytes for value in read.values()) if parameters is None else parameters,
        gradients_bytes=sum(trained.values()),
        optimizer_state_bytes=state,
        estimated=estimated(everything),
    )


def records_of(step: Sequence[OpRecord] | Sequence[Billed]) -> list[OpRecord]:
    """The records, those inside of segments within these."""
    return [
        item.record if isinstance(item, Billed) else item
        for item in step
        if not (isinstance(item, Billed) and item.in_segment)
    ]


def updating(optimizer: str, nbytes: int, item: int) -> int:
    """Bytes allocated while a parameter of ``nbytes`` is updated in place, a block of ``item``-byte numbers at a time.

    SGD, with momentum or without: the step. Adam: the step and its denominator.
    """
    return (2 if optimizer == "adam" else 1) * min(nbytes, BLOCK * item)


def make_optimizer(name: str, net: Module, lr: float = 1e-300) -> Optimizer:
    """The optimiser of that name on the parameters that train.

    By default its steps are so small that they leave every parameter as it is: a step is taken for its memory, and a
    net that would diverge must not.
    """
    parameters = [p for p in net.parameters() if p.requires_grad]
    if name == "adam":
        return optim.Adam(parameters, lr)
    if name not in STATE_COPIES:
        raise ValueError(f"optimizer is {name!r}, expected one of {', '.join(STATE_COPIES)}")
    return optim.SGD(parameters, lr, momentum=0.9 if name == "sgd-momentum" else 0.0)


def measure_peak(net: Module, images: np.ndarray, labels: np.ndarray, optimizer: str = "sgd", parts: int = 1) -> int:
    """The peak of a real training step, in bytes, as :attr:`Peak.peak_bytes` counts it.

    A first step warms up (compiled loops, state of the optimiser); the second is measured. The net is in the mode, with
    the selection and the stores of the step. Parameters, buffers and the state of stores are put back afterwards;
    random generators (dropout) have gone on. A step may take its images in ``parts``, one after the other; then the
    images of one part are counted. ``tracemalloc`` sees every Python object as well, some kilobytes for each operation.

    Raises RuntimeError if ``tracemalloc`` runs already.
    """
    if tracemalloc.is_tracing():
        raise RuntimeError("tracemalloc runs already, its peak would be somebody else's")
    if numba_enabled():
        importlib.import_module("numba")  # takes a minute under tracemalloc
    before, batches = _Before(net), [[part.copy() for part in np.split(a, parts)] for a in (images, labels)]
    optimiser = make_optimizer(optimizer, net)
    try:
        tracemalloc.start()
        _one_step(net, batches, optimiser)
        optimiser.zero_grad()
        gc.collect()
        start = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        _one_step(net, batches, optimiser)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        optimiser.zero_grad()
        carried = sum(array.nbytes for store in _stores(net).values() for array in store.state().values())
        before.put_back()
    state = sum(array.nbytes for arrays in optimiser.buffers.values() for array in arrays if array is not None)
    return most - start + state + carried + sum(arrays[0].nbytes for arrays in batches)


def _one_step(net: Module, batches: Sequence[Sequence[np.ndarray]], optimiser: Optimizer) -> None:
    for images, labels in zip(*batches, strict=True):
        loss = loss_of(net(Tensor(images)), Tensor(labels))
        loss.backward()
    optimiser.step()


def _stores(net: Module) -> dict[str, ActivationStore]:
    return {path: module.store for path, module in net.named_modules() if hasattr(module, "store")}


class _Before:
    """What a step changes of a net, to be put back."""

    def __init__(self, net: Module) -> None:
        self.parameters = [(p, p.data, p.grad) for p in net.parameters()]
        self.buffers = [(array, array.copy()) for m in net.modules() for array in m._buffers.values()]
        self.stores = [(store, store.state()) for store in _stores(net).values()]

    def put_back(self) -> None:
        for parameter, data, grad in self.parameters:
            parameter.data, parameter.grad = data, grad
        for array, values in self.buffers:
            array[...] = values
        for store, state in self.stores:
            store.load_state(state)
