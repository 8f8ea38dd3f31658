"""The cost model against the usual FLOP counters, on one net: ``python -m benchmarks.cost_model``.

MobileNetV2, 224 pixels, batch 128, shapes alone where a counter can. Timed in turn, repeat after repeat, each from a
net that is built to its counts:

ours, bp          analysis.reports.predict: FLOPs forward and backward, and bytes under three accountings, by layer
ours, all         the same for every method of the cost model
flop counter      PyTorch's FlopCounterMode over forward and backward, tensors on the meta device
fvcore            fvcore's FlopCountAnalysis, forward alone (it has no backward), of one image (it runs the net)

What to quote is the ratio of the medians of the processor's time of one run. The rest: the report of the main case,
every method and four layers, as ``analysis.cost`` gives it (again; for a batch that it has not seen; with every peak of
memory, as JSON); the command line as a process; and how the time grows with the number of operations, the batch and the
image.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from analysis import cost
from analysis.commands import stopping
from analysis.commands.cli import count
from analysis.commands.command_line import run_main
from analysis.reports.predict import predict
from benchmarks.side_by_side import Side, Table, Target, Timing, number, parser, peer, run, timed
from lance_ref import models, nn
from lance_ref.nn.init import shapes_only

SIZE, CLASSES = 224, 1000
CHAIN, QUICK_CHAIN = (1000, 5000), (10, 20)
OWN = "ours, bp"
AGAIN = "a report of every method"
COMMAND = "the command, every method"


def our_net() -> nn.Module:
    """MobileNetV2, without values."""
    with shapes_only():
        return models.create("mobilenetv2", num_classes=CLASSES)


def ours(batch: int, methods: str, size: int = SIZE, tune: str = "all") -> Callable[[], int]:
    """Counts the FLOPs of a step of ``bp``, forward and backward."""
    net = our_net()

    def count() -> int:
        report = predict(net, batch, size, tune=tune, methods=methods, ranks="0.25").report
        return report.totals["bp"].flops["total"]

    return count


def peers(batch: int) -> dict[str, Callable[[], int]]:
    """The other counters that are installed."""
    torch = peer("torch")
    if torch is None:
        return {}
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.torch_nets import make_mobilenetv2

    with torch.device("meta"):
        net = make_mobilenetv2(CLASSES)
        x, labels = torch.empty(batch, 3, SIZE, SIZE), torch.empty(batch, dtype=torch.int64)

    def flop_counter() -> int:
        net.zero_grad()
        with FlopCounterMode(display=False) as counter:
            torch.nn.functional.cross_entropy(net(x), labels).backward()
        return int(counter.get_total_flops())

    found: dict[str, Callable[[], int]] = {"flop counter": flop_counter}
    if peer("fvcore") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch deprecates what fvcore is built on
            from fvcore.nn import FlopCountAnalysis

        logging.getLogger("fvcore").setLevel(logging.ERROR)
        real, image = make_mobilenetv2(CLASSES), torch.zeros(1, 3, SIZE, SIZE)

        def fvcore() -> int:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                analysis = FlopCountAnalysis(real, image)
                analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
                return int(analysis.total())

        found["fvcore"] = fvcore
    return found


def chain(operations: int) -> Callable[[], Any]:
    """A report of ``bp`` on that many operations in a row, every second one a layer with weights that trains."""
    with shapes_only():
        layers: list[nn.Module] = []
        for _ in range(operations // 2):
            layers += [nn.Linear(8, 8), nn.ReLU()]
        net = nn.Sequential(*layers[:-1], nn.Linear(8, 8))
    return lambda: predict(net, 8, input_shape=(8,), tune="all", methods="bp").report


def reports(size: int = SIZE) -> dict[str, Side]:
    """The main case, every method: what was asked for before, what was not, and all that a report says."""
    unseen = itertools.count(1)

    def report(batch: int = 128) -> Any:
        return cost("mobilenetv2", method="all", batch=batch, image_size=size)

    return {
        AGAIN: report,
        "a report of another batch": lambda: report(128 + 4 * next(unseen)),
        "and its peaks, as JSON": lambda: report().to_json(),
    }


def command(*more: str) -> None:
    """The command line, as a process of its own."""
    words = [sys.executable, "-m", "analysis.cost_model", "--net", "mobilenetv2", *more]
    with stopping.left_to_parent():
        done = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    with done:
        try:
            code = done.wait()
        except KeyboardInterrupt:
            done.kill()
            raise
    if code:
        raise RuntimeError(f"{' '.join(words[1:])} failed with {code}")


def growth(batch: int, chains: Sequence[int]) -> dict[str, Side]:
    """Other numbers of operations, and other batches and images of the same net."""
    sides: dict[str, Side] = {f"chain of {n} operations": chain(n) for n in chains}
    return sides | {f"batch {b}, {s} pixels": ours(b, "bp", s) for b, s in ((1, 64), (1, SIZE), (32 * batch, SIZE))}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    batch = 2 if options.quick else options.batch
    sides = {OWN: ours(batch, "bp"), "ours, all": ours(batch, "all"), **peers(batch)}
    print("milliseconds of the processor, median and fastest")
    table = Table("counter", "median", "fastest", f"/ {OWN}", first=26)

    def show(timings: dict[str, Timing], own: Timing | None) -> dict[str, dict[str, float]]:
        for name, timing in timings.items():
            ratio = None if own is None else timing.cpu_median / own.cpu_median
            table.row(name, number(1e3 * timing.cpu_median), number(1e3 * min(timing.cpu)), number(ratio))
        return {name: timing.as_json() for name, timing in timings.items()}

    flops = {name: count() for name, count in sides.items()}
    seconds = timed(sides, options.repeats)
    own = seconds[OWN]
    found: dict[str, Any] = {"net": "mobilenetv2", "batch": batch, "image_size": SIZE, "flops": flops}
    found["seconds"] = show(seconds, own)
    found["times_ours"] = {
        name: of.cpu_median / own.cpu_median for name, of in seconds.items() if not name.startswith("ours")
    }
    chains = QUICK_CHAIN if options.quick else CHAIN
    found["growth"] = show(timed(growth(batch, chains), max(1, options.repeats // 2)), None)
    report = timed(reports(32 if options.quick else SIZE), options.repeats)
    found["reports"] = show(report, None)
    commands = timed(
        {"the command": command, COMMAND: lambda: command("--method", "all")}, max(1, options.repeats // 3)
    )
    found["command_line"] = show(commands, None)
    faster = [Target(f"times faster than {name}", ratio, 10, True) for name, ratio in found["times_ours"].items()]
    return found | {
        "targets": [
            *faster,
            Target("milliseconds of a report of every method", 1e3 * report[AGAIN].median, 50),
            Target("seconds of the command with every method", commands[COMMAND].median, 1),
        ]
    }


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("benchmarks.cost_model", __doc__, repeats=9)
    p.add_argument("--batch", type=count, default=128, help="images (default: %(default)s)")
    return run(p, arguments, measure, peers=("torch", "fvcore"))


if __name__ == "__main__":
    sys.exit(run_main(main))
