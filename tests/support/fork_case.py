"""What a parent and its children do in the tests of forks: ``python fork_case.py HOW ...`` prints "HOW: the same".

Children that hang are killed with the process group by the test that started this one.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from typing import Any

import numpy as np

from lance_ref import F, Tensor
from lance_ref.algebra.kernels import threads as kernels


def gradient(seed: int) -> float:
    """One number from a depthwise convolution that is large enough for the thread pool, forward and backward."""
    rng = np.random.default_rng(seed)
    x = Tensor(rng.standard_normal((4, 16, 40, 40)).astype(np.float32), requires_grad=True)
    weight = Tensor(rng.standard_normal((16, 1, 3, 3)).astype(np.float32), requires_grad=True)
    F.conv2d(x, weight, padding=1, groups=16).sum().backward()
    assert weight.grad is not None
    return float(weight.grad.sum())


def grandchild(seed: int) -> float:
    """The same in a child of this process, which has run it too."""
    assert gradient(seed) == gradient(seed)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(gradient, (seed,))


def with_a_lock(seeds: range) -> list[float]:
    """Fork while another thread compiles: the child compiles too, and needs the lock."""
    from numba.core.compiler_lock import global_compiler_lock as lock

    held, forked = threading.Event(), threading.Event()

    def compile_for_long() -> None:
        with lock:
            held.set()
            forked.wait(1)

    thread = threading.Thread(target=compile_for_long)
    thread.start()
    held.wait()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        forked.set()
        result = pool.map(in_double, seeds)
    thread.join()
    return result


def in_double(seed: int) -> float:
    """Compiles a loop that the parent has not run, and gives the number of the others."""
    kernels.offsets_first(np.ones((2,) * 6))
    return gradient(seed)


class Batches:
    """A data set as PyTorch's DataLoader takes them: each of its items is a result of our operations."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return gradient(index)


def run(how: str, seeds: range) -> list[Any]:
    if how == "multiprocessing":
        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(gradient, seeds)
    if how == "grandchild":
        return [grandchild(seed) for seed in seeds]
    if how == "compiling":
        return with_a_lock(seeds)
    if how == "os.fork":
        for seed in seeds:
            child = os.fork()
            if child == 0:
                os._exit(0 if gradient(seed) == EXPECTED[seed] else 1)
            assert os.waitpid(child, 0)[1] == 0
        return EXPECTED
    if how == "DataLoader":
        from torch.utils.data import DataLoader

        loader = DataLoader(Batches(), batch_size=None, num_workers=2, multiprocessing_context="fork")
        return list(loader)
    from joblib import Parallel, delayed, parallel_config

    with parallel_config(how.partition("-")[0]):
        return Parallel(2)(delayed(gradient)(seed) for seed in seeds)


if __name__ == "__main__":
    assert kernels._threads() > 1
    EXPECTED = [gradient(seed) for seed in range(4)]
    assert kernels._pool.cache_info().currsize == 1
    for how in sys.argv[1:]:
        found = run(how, range(4))
        print(f"{how}: the same" if found == EXPECTED else f"{how}: {found} in place of {EXPECTED}", flush=True)
