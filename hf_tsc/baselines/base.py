"""What every baseline works on and leaves: clean images in, paths through weight space out; no trigger.

Letters: t a position on a path, in [0, 1].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel

from hf_tsc.activations import Batch
from hf_tsc.batch_norm import PASSES as STATISTICS_PASSES
from hf_tsc.errors import AccuracyBudgetError, PurificationError
from hf_tsc.functional import call_at, tensors_of
from hf_tsc.images import Batches, collate, in_order
from hf_tsc.objectives import ImageClassification, LossSettings, Objective
from hf_tsc.permutation import Params
from hf_tsc.processes import working_device
from hf_tsc.seeds import derived_seed
from hf_tsc.tsc_config import CLASSIFYING

MEASURED_BATCH = 128  # images a forward pass where nothing is trained
Point = Callable[[float], Params]
# called with a path's name, whether it is the last one, its points by t, and the point that is taken
Visit = Callable[[str, bool, Point, float], None]


@dataclass(frozen=True)
class Case:
    """What a method works on.

    Attributes:
        suspect: is not changed.
        processor: the suspect's image processor.
        train, held_out: the two parts of the clean images; the second is for choosing points alone.
        seed: of everything that is drawn.
        objective: makes what is trained for, of the method's settings; None for classifiers, which the methods know.
        objectives: names those that fit.
        use_cpu: work on the CPU, whatever there is.
    """

    suspect: PreTrainedModel
    processor: Any
    train: Any
    held_out: Any
    seed: int
    objective: Callable[[LossSettings], Objective] | None = None
    objectives: Collection[str] = CLASSIFYING
    use_cpu: bool = True

    @property
    def device(self) -> torch.device:
        """Where it is worked on."""
        return working_device(use_cpu=self.use_cpu)

    def objective_of(self, settings: LossSettings) -> Objective:
        """What is trained for; the suspect teaches where that is a distillation."""
        if self.objective is not None:
            return self.objective(settings)
        return ImageClassification.of(settings, self.train.pipeline, self.suspect)

    def clean_batches(self, objective: Objective) -> Iterator[Batch]:
        """All training images as model inputs, in fixed order and without augmentation."""
        return (objective.model_inputs(batch) for batch in self._batches(self.train))

    def statistics_batches(self, objective: Objective, images: str) -> Iterator[Batch]:
        """What BatchNorm statistics are computed of: `clean` images, or those of the `training`, drawn twice."""
        if images == "clean":
            yield from self.clean_batches(objective)
            return
        for number in range(STATISTICS_PASSES):
            shuffled = self.shuffled(MEASURED_BATCH, derived_seed(self.seed, number, 2))
            for place, batch in enumerate(shuffled):
                yield objective.training_inputs(batch, seed=derived_seed(self.seed, number, place, 3))

    def drawn_batches(self, batch_size: int, steps: int) -> Iterator[Batch]:
        """As many shuffled batches of the training images as there are steps; a function of the seed."""
        passes = (self.shuffled(batch_size, derived_seed(self.seed, number, 1)) for number in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(passes), steps)

    def shuffled(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """All training images once."""
        generator = torch.Generator().manual_seed(seed)
        batches = Batches(RandomSampler(self.train, generator=generator), batch_size)
        loader: Any = DataLoader(self.train, batch_sampler=batches, collate_fn=collate, generator=generator)
        return (self._here(batch) for batch in loader)

    def score(self, objective: Objective, params: Params) -> float:
        """The objective's score of a point on the held-out images, a fraction."""

        def forward(**inputs: Tensor) -> Any:
            return call_at(self.suspect, params, inputs)

        return objective.evaluate(forward, self.held_out_batches())["score"]

    def farthest_within(
        self, objective: Objective, point: Point, positions: Iterable[float], max_drop: float, *, until: bool = False
    ) -> float:
        """The last position whose held-out score is at most `max_drop` percentage points below the suspect's.

        Args:
            objective: gives the score.
            point: of a path.
            positions: to try, from the suspect on.
            max_drop: in percentage points.
            until: stop at the first one that is outside.

        Raises:
            AccuracyBudgetError: none is within.
        """
        baseline = self.score(objective, tensors_of(self.suspect))
        found, best = None, (-1.0, 0.0)
        for t in positions:
            score = self.score(objective, point(t))
            best = max(best, (score, t))
            if score >= baseline - max_drop / 100 - 1e-9:
                found = t
            elif until:
                break
        if found is None:
            raise AccuracyBudgetError(
                f"no point is within max_accuracy_drop={max_drop:g} points on the held-out images: "
                f"{100 * baseline:.1f} % before, at best {100 * best[0]:.1f} % at {best[1]:g}; allow a larger drop, "
                "give more clean images or another learning rate"
            )
        return found

    def held_out_batches(self) -> Iterator[Batch]:
        """All held-out images, in fixed order."""
        return self._batches(self.held_out)

    def _batches(self, dataset: Any) -> Iterator[Batch]:
        return (self._here(batch) for batch in in_order(dataset, MEASURED_BATCH))

    def _here(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.suspect.device) for name, tensor in batch.items()}


def check_finite(loss: Tensor, step: int, advice: str) -> None:
    """Raises PurificationError."""
    if not bool(torch.isfinite(loss).all()):
        raise PurificationError(f"the loss is not finite at step {step}; lower {advice}")
