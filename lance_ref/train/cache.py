"""Whether training runs the frozen part of the network once, and why or why not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lance_ref.datasets import Dataset
from lance_ref.engine.autograd import no_grad
from lance_ref.nn.module import Module
from lance_ref.train.features import Features, Part, extract, frozen_stages, in_mode, sample_of, stages_of
from lance_ref.train.run import Source

MAX_FEATURE_BYTES = 2 * 1024**3
"""Most bytes that :func:`lance_ref.fit` takes in memory for the outputs of the frozen part."""

SAMPLE = 32  # images on which `normalise` has to do the same twice


def cache_decision(net: Module, sources: Sequence[Source], wanted: bool | None) -> tuple[bool, str]:
    """Whether features are to stand for the data sets (the training data first), and a sentence on that for reports.

    ``wanted`` is ``cache_frozen`` of :func:`lance_ref.fit`; ValueError if it is True and cannot be.
    """

    def repeats(source: Source) -> bool:
        """Whether ``normalise`` does the same twice; what draws random numbers is augmentation."""
        assert isinstance(source.data, Dataset)
        first, second = (sample_of(source.data, source.normalise, source.image_size, SAMPLE) for _ in range(2))
        return np.array_equal(first, second, equal_nan=True)

    given, stages = sources[0].data, len(stages_of(net))
    note = ""
    if isinstance(given, Features):
        note = f"The outputs of the first {given.stage} of {stages} stages were given."
    images = [source for source in sources if isinstance(source.data, Dataset)]
    if not images:
        return False, note
    stage, why = frozen_stages(net)
    total = 0
    if wanted is False:
        stage, why = 0, "this was asked for"
    elif stage and not all(repeats(source) for source in images):
        stage, why = 0, "normalise gives something else at each call"
    elif stage:
        with in_mode(net, training=False), no_grad():
            body = Part(net, stages_of(net)[:stage])
            total = sum(len(source) * body(source.batch(np.arange(1))[0]).data.nbytes for source in images)
        if total > MAX_FEATURE_BYTES:
            stage, why = 0, f"the outputs take {total:,} bytes, more than {MAX_FEATURE_BYTES:,}"
    if wanted and not stage:
        raise ValueError(f"cache_frozen is True, but the frozen part cannot be run once: {why}")
    if not stage:
        return False, note or f"The whole network ran at every step: {why}."
    ran = f"are frozen and ran once over all images ({total:,} bytes of outputs)"
    return True, note or f"The first {stage} of {stages} stages {ran}."


def cache(source: Source, net: Module, batch_size: int, progress: bool | None) -> Source:
    """The same data as features of the frozen part, in memory."""
    if isinstance(source.data, Features):
        return source
    features = extract(net, source.data, source.normalise, source.image_size, batch_size, progress=progress)
    return Source(source.name, net, features, None, None)
