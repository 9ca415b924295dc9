"""Train an image encoder without labels: to know two views of an image apart from others, or to repeat its teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tsc.activations import Batch
from hf_tsc.errors import UsageError
from hf_tsc.images import Augmentation, ImagePipeline, to_unit_interval
from hf_tsc.in_memory import InMemory
from hf_tsc.objectives.base import Forward
from hf_tsc.objectives.classification import Mixup, augmented_and_mixed
from hf_tsc.objectives.hidden_states import HiddenStates, call_with_states
from hf_tsc.processes import Rows, across_processes, loss_of_all, own_rows


def features_of(forward: Forward, inputs: Tensor) -> Tensor:
    """(n, d): the pooled output of an image encoder.

    Raises:
        UsageError: it has none.
    """
    return pooled(forward(pixel_values=inputs))


def pooled(output: Any) -> Tensor:
    """(n, d) of what an image encoder gives; raises as `features_of`."""
    features = getattr(output, "image_embeds", None)
    features = getattr(output, "pooler_output", None) if features is None else features
    if features is None:
        raise UsageError(
            f"the encoder gives {type(output).__name__} without a pooled output: expected pooler_output or "
            "image_embeds; load the model with its pooling layer"
        )
    return features.flatten(1)


@dataclass(frozen=True)
class Projected:
    """What an encoder gives with its head: (n, k)."""

    projected: Tensor


class WithHead(InMemory):
    """An encoder and a head that is trained along: one module, as distributed training and checkpoints want it.

    The head is called in here, as distributed training has to see where each parameter is used.
    """

    def __init__(self, model: nn.Module, head: nn.Module):
        super().__init__(model)
        self.head = head

    def forward(self, *args: Any, **kwargs: Any) -> Projected:
        return Projected(self.head(pooled(super().forward(*args, **kwargs))))


class ProjectionHead(nn.Sequential):
    """SimCLR's head: linear, ReLU, linear, (n, d) -> (n, 128) (hf.co/papers/2002.05709)."""

    def __init__(self, features: int, *, out: int = 128, seed: int = 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, out))


class SimCLR:
    """Find the second view of an image among the views of the batch (Chen et al. 2020, hf.co/papers/2002.05709).

    The loss is of what the head makes of the features; the score is of the features, which are what remains.

    Args:
        pipeline: makes model inputs of pixels.
        head: between features and loss; trained along, and not part of the model. None: the features themselves.
        augmentation: makes the views.
        temperature: of the similarities.
    """

    score_name = "view_retrieval"

    def __init__(
        self,
        pipeline: ImagePipeline,
        *,
        head: nn.Module | None = None,
        augmentation: str = "simclr",
        temperature: float = 0.5,
    ):
        self.pipeline, self.head, self.temperature = pipeline, head, temperature
        self.augmentation = Augmentation(augmentation)

    def loss(self, forward: Forward, batch: Batch, *, seed: int) -> Tensor:
        if len(batch["pixels"]) < 2:
            raise UsageError("a batch of one image has nothing to tell it apart from: give a batch size of 2 or more")
        views = self._views(batch, seed=seed, rows=own_rows(len(batch["pixels"])))
        output: Any = forward(pixel_values=views)  # both views in one forward, as BatchNorm shall see both
        first, second = (output.projected if isinstance(output, Projected) else self._projected(pooled(output))).chunk(
            2
        )
        whole = nt_xent(across_processes(first), across_processes(second), self.temperature)
        return loss_of_all(whole)

    def model_inputs(self, batch: Batch) -> Batch:
        return {"pixel_values": self.pipeline.model_input(batch["pixels"])}

    def training_inputs(self, batch: Batch, *, seed: int) -> Batch:
        return {"pixel_values": self._views(batch, seed=seed, rows=None)}

    @torch.no_grad()
    def evaluate(self, forward: Forward, batches: Iterable[Batch]) -> dict[str, float]:
        """`loss` and `score`, the share of images whose second view is the nearest of all: two fixed views each."""
        features = [
            features_of(forward, self._views(batch, seed=number, rows=None)).chunk(2)
            for number, batch in enumerate(batches)
        ]
        first, second = (torch.cat(part) for part in zip(*features, strict=True))
        nearest = (F.normalize(first) @ F.normalize(second).T).argmax(1)
        right = nearest == torch.arange(len(first), device=first.device)
        return {
            "loss": nt_xent(self._projected(first), self._projected(second), self.temperature).item(),
            "score": right.double().mean().item(),
        }

    def _projected(self, features: Tensor) -> Tensor:
        return features if self.head is None else self.head.to(features.device)(features)

    def _views(self, batch: Batch, *, seed: int, rows: Rows | None) -> Tensor:
        """Two views of each image, (2n, 3, H, W)."""
        pixels = to_unit_interval(batch["pixels"]).repeat(2, 1, 1, 1)
        return self.pipeline.normalize(
            self.augmentation(pixels, seed=seed, rows=None if rows is None else rows.twice())
        )


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The normalised, temperature-scaled cross-entropy of two views, (n, d) each: mean over all 2n views.

    Each view has its other one for a positive, and the 2n - 2 views of other images for negatives.
    """
    views = F.normalize(torch.cat([first, second]), dim=-1)
    similarity = views @ views.T / temperature
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    count = len(first)
    other = torch.arange(2 * count, device=views.device).roll(count)
    return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), other)


class FeatureDistillation:
    """Give the features that the suspect gives, on augmented and mixed clean images; for image encoders.

    The loss is the share of the teacher's variance that is not explained, Σ |f - g|² / Σ |g - mean g|², sums over the
    images of a batch: features that hardly vary between images count as little as they mean.

    Args:
        pipeline: makes model inputs of pixels.
        teacher: the suspect in eval mode.
        augmentation: applied to training batches.
        mixup_alpha: 0 for none.
        feature_weight: of the distance to the teacher's hidden states; 0 for none.
        feature_states: which ones, `all` or the `last`.

    Attributes:
        hidden_states: that distance, or None.
    """

    score_name = "explained_variance"
    head: nn.Module | None = None

    def __init__(
        self,
        pipeline: ImagePipeline,
        teacher: nn.Module,
        *,
        augmentation: str = "none",
        mixup_alpha: float = 0.0,
        feature_weight: float = 0.0,
        feature_states: str = "all",
    ):
        self.pipeline, self.teacher = pipeline, teacher
        self.augmentation = Augmentation(augmentation)
        self.mixup = Mixup(mixup_alpha) if mixup_alpha > 0 else None
        self.hidden_states = HiddenStates(feature_weight, feature_states) if feature_weight > 0 else None

    def loss(self, forward: Forward, batch: Batch, *, seed: int) -> Tensor:
        if len(batch["pixels"]) < 2:
            raise UsageError("a batch of one image has no variance to explain: give a batch size of 2 or more")
        inputs = self._drawn(batch, seed=seed, rows=own_rows(len(batch["pixels"])))
        if self.hidden_states is None:
            found = features_of(forward, inputs)
            with torch.no_grad():
                target = features_of(self.teacher, inputs)
            return self._missed(found, target)
        output = call_with_states(forward, inputs)
        with torch.no_grad():
            taught = call_with_states(self.teacher, inputs)
        return self._missed(pooled(output), pooled(taught)) + self.hidden_states.term(output, taught)

    @staticmethod
    def _missed(found: Tensor, target: Tensor) -> Tensor:
        return loss_of_all(unexplained_variance(across_processes(found), across_processes(target)))

    def model_inputs(self, batch: Batch) -> Batch:
        return {"pixel_values": self.pipeline.model_input(batch["pixels"])}

    def training_inputs(self, batch: Batch, *, seed: int) -> Batch:
        return {"pixel_values": self._drawn(batch, seed=seed, rows=None)}

    def _drawn(self, batch: Batch, *, seed: int, rows: Rows | None) -> Tensor:
        """Augmented and mixed inputs."""
        pixels = augmented_and_mixed(batch, self.augmentation, self.mixup, seed=seed, rows=rows)
        return self.pipeline.normalize(pixels)

    @torch.no_grad()
    def evaluate(self, forward: Forward, batches: Iterable[Batch]) -> dict[str, float]:
        """`loss`, and `score`: the share that is explained, at least 0."""
        found, target = [], []
        for batch in batches:
            inputs = self.pipeline.model_input(batch["pixels"])
            found.append(features_of(forward, inputs))
            target.append(features_of(self.teacher, inputs))
        loss = unexplained_variance(torch.cat(found), torch.cat(target)).item()
        return {"loss": loss, "score": max(0.0, 1 - loss)}


def unexplained_variance(found: Tensor, target: Tensor) -> Tensor:
    """Σ |found - target|² / Σ |target - mean target|²; both (n, d)."""
    spread = (target - target.mean(0)).square().sum()
    return (found - target).square().sum() / spread
