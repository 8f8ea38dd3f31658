"""Learners by name: what each does before, during and after a task, on one interface.

All of them train the same network on the same batches. They differ in what they keep from earlier tasks, and in what
they do with the gradient.
"""

from __future__ import annotations

from lance_ref.continual.learner import Learner, Pass, Recipe, Stream
from lance_ref.continual.networks import heads_of
from lance_ref.continual.protecting import Gpm, LanceLearner, LanceNoBatch, Protecting
from lance_ref.continual.replay import Joint, Replay
from lance_ref.continual.scenario import Samples
from lance_ref.nn.selection import weighted_layers


class HeadOnly(Learner):
    """The whole network learns the first task; afterwards the heads alone train."""

    name = "head-only"

    def before_task(self, t: int, train: Samples) -> None:
        if t:
            own = heads_of(self.net)
            last = list(weighted_layers(self.net).values())[-1]
            self.net.requires_grad_(False)
            (last if own is None else own).requires_grad_()


LEARNERS: dict[str, type[Learner]] = {
    learner.name: learner for learner in (Learner, Gpm, LanceLearner, LanceNoBatch, HeadOnly, Joint, Replay)
}
"""Every learner by its name on the command line."""

__all__ = [
    "LEARNERS",
    "Gpm",
    "HeadOnly",
    "Joint",
    "LanceLearner",
    "LanceNoBatch",
    "Learner",
    "Pass",
    "Protecting",
    "Recipe",
    "Replay",
    "Stream",
]
