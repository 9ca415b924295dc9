"""What an objective is; the trainer knows nothing of images, labels, captions or teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor, nn

from hf_tsc.activations import Batch

Forward = Callable[..., object]


class LossSettings(Protocol):
    """What an objective takes of the settings of a training, named as in `TSCConfig`."""

    @property
    def objective(self) -> str: ...
    @property
    def augmentation(self) -> str: ...
    @property
    def temperature(self) -> float: ...
    @property
    def mixup_alpha(self) -> float: ...
    @property
    def teacher_view(self) -> str: ...
    @property
    def teacher_errors(self) -> str: ...
    @property
    def feature_weight(self) -> float: ...
    @property
    def feature_states(self) -> str: ...


class Objective(Protocol):
    """A training loss, clean model inputs, and the measures of a point.

    `score_name` names the fraction that `evaluate` reports as `score`: what `max_accuracy_drop` is about. `head` is
    what is trained beside the model and not saved with it, or None.
    """

    score_name: str
    head: nn.Module | None

    def loss(self, forward: Forward, batch: Batch, *, seed: int) -> Tensor:
        """Mean loss of one training batch; all randomness is a function of `seed`.

        In several processes, each gives its rows of the batch, equally many, and takes its rows of what is drawn for
        the whole batch; the mean over the processes has the gradient of the whole batch.
        """

    def model_inputs(self, batch: Batch) -> Batch:
        """The batch as the model takes it, without augmentation."""

    def training_inputs(self, batch: Batch, *, seed: int) -> Batch:
        """The batch as the loss shows it to the model, augmented and mixed; drawn for these rows alone."""

    def evaluate(self, forward: Forward, batches: Iterable[Batch]) -> dict[str, float]:
        """`loss` (mean, nats) and `score` (a fraction) on clean data."""
