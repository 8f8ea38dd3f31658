"""The cost model against the usual FLOP counters, on one net: ``python -m benchmarks.cost_model``.

MobileNetV2, 224 pixels, batch 128, shapes alone where a counter can. Timed in turn, repeat after repeat, each from a
net that is built to its counts:

ours, bp          analysis.predict: FLOPs forward and backward, and bytes under three accountings, by layer
ours, all         the same for every method of the cost model
flop counter      PyTorch's FlopCounterMode over forward and backward, tensors on the meta device
fvcore            fvcore's FlopCountAnalysis, forward alone (it has no backward), of one image (it runs the net)

What to quote is the ratio of the medians of the processor's time of one run. The rest: the command line as a process,
and how the time grows with the number of operations, the batch and the image.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from analysis.cli import OneLineParser, check_counts, check_writable, one_line
from analysis.predict import predict
from analysis.provenance import provenance
from analysis.spectra_file import write_atomically
from lance_ref import models, nn
from lance_ref.nn.init import shapes_only

SIZE, CLASSES = 224, 1000
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Of MobileNetV2 (Sandler et al. 2018, table 2): expansion, channels, blocks, stride of the first."""
CHAIN = (1000, 5000)


def pytorch_net(torch: Any, device: str) -> Any:
    """MobileNetV2 in PyTorch."""

    def conv(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[Any]:
        body = torch.nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        return [body, torch.nn.BatchNorm2d(c_out)]

    class Block(torch.nn.Module):
        def __init__(self, c_in: int, c_out: int, expansion: int, stride: int) -> None:
            super().__init__()
            wide = c_in * expansion
            layers = [*conv(c_in, wide), torch.nn.ReLU6()] if expansion > 1 else []
            layers += [*conv(wide, wide, 3, stride, wide), torch.nn.ReLU6(), *conv(wide, c_out)]
            self.body, self.residual = torch.nn.Sequential(*layers), stride == 1 and c_in == c_out

        def forward(self, x: Any) -> Any:
            return x + self.body(x) if self.residual else self.body(x)

    with torch.device(device):
        layers, width = [*conv(3, 32, 3, 2), torch.nn.ReLU6()], 32
        for expansion, channels, blocks, stride in STAGES:
            for i in range(blocks):
                layers.append(Block(width, channels, expansion, stride if i == 0 else 1))
                width = channels
        layers += [*conv(width, 1280), torch.nn.ReLU6(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(1280, CLASSES))


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
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    net = pytorch_net(torch, "meta")
    x = torch.empty(batch, 3, SIZE, SIZE, device="meta")
    labels = torch.empty(batch, dtype=torch.int64, device="meta")

    def flop_counter() -> int:
        net.zero_grad()
        with FlopCounterMode(display=False) as counter:
            torch.nn.functional.cross_entropy(net(x), labels).backward()
        return int(counter.get_total_flops())

    found: dict[str, Callable[[], int]] = {"flop counter": flop_counter}
    if importlib.util.find_spec("fvcore") is not None:
        import logging
        import warnings

        from fvcore.nn import FlopCountAnalysis  # type: ignore[import-not-found]

        logging.getLogger("fvcore").setLevel(logging.ERROR)

        real, image = pytorch_net(torch, "cpu"), torch.zeros(1, 3, SIZE, SIZE)

        def fvcore() -> int:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch deprecates the tracing that fvcore is built on
                analysis = FlopCountAnalysis(real, image)
                analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
                return int(analysis.total())

        found["fvcore"] = fvcore
    return found


def timed(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and fastest seconds of each side, of the processor and of the clock; one turn before does not count."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            if repeat:
                spent[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    found = {}
    for name, pairs in spent.items():
        cpus, walls = zip(*pairs, strict=True)
        found[name] = {
            "cpu_median": statistics.median(cpus),
            "cpu_min": min(cpus),
            "wall_median": statistics.median(walls),
            "wall_min": min(walls),
        }
    return found


def chain(operations: int) -> Callable[[], Any]:
    """A report of ``bp`` on that many operations in a row, every second one a layer with weights that trains."""
    with shapes_only():
        layers: list[nn.Module] = []
        for _ in range(operations // 2):
            layers += [nn.Linear(8, 8), nn.ReLU()]
        net = nn.Sequential(*layers[:-1], nn.Linear(8, 8))
    return lambda: predict(net, 8, input_shape=(8,), tune="all", methods="bp").report


def command_seconds(repeats: int) -> dict[str, float]:
    """The command line with every method, as a process of its own: fastest, of the clock and of the processor."""
    words = [sys.executable, "-m", "analysis.cost_model", "--net", "mobilenetv2", "--method", "all"]
    walls, cpus = [], []
    for _ in range(repeats):
        before, start = os.times(), time.perf_counter()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        walls.append(time.perf_counter() - start)
        cpus.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return {"wall_min": min(walls), "cpu_min": min(cpus)}


def measure(batch: int, repeats: int) -> dict[str, Any]:
    """All of it, as it is written."""
    sides: dict[str, Callable[[], int]] = {"ours, bp": ours(batch, "bp"), "ours, all": ours(batch, "all")}
    sides |= peers(batch)
    counts = {name: run() for name, run in sides.items()}
    seconds = timed(sides, repeats)
    own = seconds["ours, bp"]["cpu_median"]
    growth = {f"chain of {n} operations": chain(n) for n in CHAIN}
    growth |= {f"batch {b}, {s} pixels": ours(b, "bp", s) for b, s in ((1, 64), (1, SIZE), (4096, SIZE))}
    return {
        "net": "mobilenetv2",
        "batch": batch,
        "image_size": SIZE,
        "flops": counts,
        "seconds": seconds,
        "times_ours": {name: of["cpu_median"] / own for name, of in seconds.items() if not name.startswith("ours")},
        "growth": timed(growth, max(1, repeats // 2)),
        "command_line": command_seconds(max(1, repeats // 3)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    p = OneLineParser(prog="python -m benchmarks.cost_model", description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--batch", type=int, default=128, help="images (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=9, help="counted repeats (default: %(default)s)")
    p.add_argument("--output", help="also write the figures as JSON")
    options = p.parse_args(arguments)
    try:
        check_counts(options, ("batch", "repeats"))
        if options.output:
            check_writable(options.output)
        found = measure(options.batch, options.repeats)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        p.error(one_line(error))
    for name, of in (found["seconds"] | found["growth"]).items():
        ratio = f"{found['times_ours'][name]:.1f} times ours, bp" if name in found["times_ours"] else ""
        print(f"{name:26} {1e3 * of['cpu_median']:9.1f} ms (fastest {1e3 * of['cpu_min']:.1f})  {ratio}".rstrip())
    command = found["command_line"]
    print(f"{'the command, all methods':26} {command['cpu_min']:9.2f} s of the processor, {command['wall_min']:.2f} s")
    if options.output:
        peer_versions = {name: _version(name) for name in ("torch", "fvcore")}
        document = {**provenance("benchmarks.cost_model", 0), "peers": peer_versions, **found}
        write_atomically(options.output, json.dumps(document, indent=1) + "\n")
    return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
