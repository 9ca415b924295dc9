"""Classify clean images, from their labels or as the suspect does."""

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
from hf_tsc.objectives.base import Forward, LossSettings
from hf_tsc.objectives.hidden_states import HiddenStates, call_with_states
from hf_tsc.processes import Rows, across_processes, own_rows


@dataclass(frozen=True)
class Mixup:
    """x -> λ x + (1 - λ) x[partner], λ ~ Beta(alpha, alpha) for each image (hf.co/papers/1710.09412).

    Partners come from the whole batch, those rows included that other processes have.
    """

    alpha: float

    def __call__(self, pixels: Tensor, *, seed: int, rows: Rows | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mix each picture with another one.

        Args:
            pixels: (n, 3, H, W).
            seed: of partners and shares.
            rows: which rows of the whole batch these are; None where they are all.

        Returns:
            Mixed pixels, partner (n,) int64, a row of the whole batch, and λ (n,).
        """
        generator = torch.Generator().manual_seed(seed)
        n = rows.total if rows else pixels.shape[0]
        partner = torch.randperm(n, generator=generator)
        gammas = torch._standard_gamma(torch.full((2, n), self.alpha, dtype=torch.float64), generator=generator)
        share = gammas[0] / gammas.sum(0)
        if rows:
            partner, share = rows.of(partner), rows.of(share)
        partner, share = partner.to(pixels.device), share.to(pixels.device, pixels.dtype)
        weight, whole = share.view(-1, 1, 1, 1), across_processes(pixels) if rows else pixels
        return weight * pixels + (1 - weight) * whole[partner], partner, share


def augmented_and_mixed(
    batch: Batch, augmentation: Augmentation, mixup: Mixup | None, *, seed: int, rows: Rows | None
) -> Tensor:
    """The pictures of a batch in [0, 1], (n, 3, H, W), where it does not matter what they were mixed of."""
    pixels = augmentation(to_unit_interval(batch["pixels"]), seed=seed, rows=rows)
    return pixels if mixup is None else mixup(pixels, seed=seed, rows=rows)[0]


class ImageClassification:
    """Classify clean images: from their labels (cross-entropy), or as the suspect does (distillation, no labels).

    Distillation is T² · KL(suspect(x / T) || point(x / T)) on the augmented image (Hinton et al. 2015,
    hf.co/papers/1503.02531): on clean images the suspect behaves, so it can teach.

    Args:
        pipeline: makes model inputs of pixels.
        augmentation: applied to training batches.
        teacher: the suspect in eval mode, for distillation; None trains on labels.
        temperature: of the distillation.
        mixup_alpha: 0 for none.
        teacher_view: what the suspect answers to: `same`, the picture that the point sees, augmented and mixed; or
            `clean`, the picture as it is in the data set, its answers mixed as the pictures are. A suspect behaves on
            clean images; a shift or a rotation can make something like its trigger of them.
        teacher_errors: where the suspect's answer is not the label (with mixup: neither label), `keep` learns it all
            the same, `drop` leaves the item out of the loss, `correct` learns the labels instead. Without labels all
            answers are kept.
        feature_weight: of the distance to the teacher's hidden states, in a distillation; 0 for none.
        feature_states: which ones, `all` or the `last`.

    Attributes:
        hidden_states: that distance, or None.
    """

    head: nn.Module | None = None

    def __init__(
        self,
        pipeline: ImagePipeline,
        *,
        augmentation: str = "none",
        teacher: nn.Module | None = None,
        temperature: float = 2.0,
        mixup_alpha: float = 0.0,
        score_name: str = "accuracy",
        teacher_view: str = "same",
        teacher_errors: str = "keep",
        feature_weight: float = 0.0,
        feature_states: str = "all",
    ):
        self.pipeline = pipeline
        self.teacher_view, self.teacher_errors = teacher_view, teacher_errors
        self.augmentation = Augmentation(augmentation)
        self.teacher = teacher
        self.temperature = temperature
        self.mixup = Mixup(mixup_alpha) if mixup_alpha > 0 else None
        self.score_name = score_name
        following = teacher is not None and feature_weight > 0
        self.hidden_states = HiddenStates(feature_weight, feature_states) if following else None

    @classmethod
    def of(
        cls, settings: LossSettings, pipeline: ImagePipeline, suspect: nn.Module, *, score_name: str = "accuracy"
    ) -> ImageClassification:
        """What the settings of a training describe; the suspect teaches where that is a distillation."""
        return cls(
            pipeline,
            augmentation=settings.augmentation,
            teacher=suspect if settings.objective == "distillation" else None,
            temperature=settings.temperature,
            mixup_alpha=settings.mixup_alpha,
            teacher_view=settings.teacher_view,
            teacher_errors=settings.teacher_errors,
            feature_weight=settings.feature_weight,
            feature_states=settings.feature_states,
            score_name=score_name,
        )

    def loss(self, forward: Forward, batch: Batch, *, seed: int) -> Tensor:
        inputs, partner, share = self._drawn(batch, seed=seed, rows=own_rows(len(batch["pixels"])))
        if self.hidden_states is not None:
            return self._followed(self.hidden_states, forward, inputs, batch, partner, share)
        return self._answered(logits_of(forward, inputs), inputs, batch, partner, share)

    def _drawn(self, batch: Batch, *, seed: int, rows: Rows | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Augmented and mixed inputs, and with mixup partners and shares."""
        pixels = self.augmented(batch, seed=seed, rows=rows)
        if self.mixup is None:
            return self.pipeline.normalize(pixels), None, None
        pixels, partner, share = self.mixup(pixels, seed=seed, rows=rows)
        return self.pipeline.normalize(pixels), partner, share

    def _followed(
        self,
        hidden_states: HiddenStates,
        forward: Forward,
        inputs: Tensor,
        batch: Batch,
        partner: Tensor | None,
        share: Tensor | None,
    ) -> Tensor:
        """The distillation of the answers and of the hidden states."""
        assert self.teacher is not None, "hidden states are a teacher's"
        output = call_with_states(forward, inputs)
        with torch.no_grad():
            taught = call_with_states(self.teacher, inputs)
        answers = self._answered(_logits(output), inputs, batch, partner, share, taught=_logits(taught))
        return answers + hidden_states.term(output, taught)

    def _answered(
        self,
        logits: Tensor,
        inputs: Tensor,
        batch: Batch,
        partner: Tensor | None,
        share: Tensor | None,
        *,
        taught: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch's logits; `taught` are the teacher's for the same inputs, where they are known."""
        if self.teacher is not None:
            if taught is None or self.teacher_view != "same":
                taught = self._taught(batch, inputs, partner, share)
            if self.teacher_errors != "keep" and "labels" in batch:
                return self._checked(logits, taught, batch["labels"], partner, share)
            return distillation_loss(logits, taught, self.temperature)
        if "labels" not in batch:
            raise UsageError("the cross-entropy objective needs labels and the data set has none; use distillation")
        return mixed_cross_entropy(logits, batch["labels"], partner, share)

    @torch.no_grad()
    def _taught(self, batch: Batch, inputs: Tensor, partner: Tensor | None, share: Tensor | None) -> Tensor:
        """The suspect's answers as logits, (n, classes)."""
        assert self.teacher is not None
        if self.teacher_view == "same":
            return logits_of(self.teacher, inputs)
        clean = _wide(logits_of(self.teacher, self.pipeline.model_input(batch["pixels"])))
        if partner is None or share is None:
            return clean
        answers, weight = F.softmax(clean / self.temperature, dim=-1), share.to(clean.dtype)[:, None]
        mixed = weight * answers + (1 - weight) * across_processes(answers)[partner]
        return self.temperature * mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()

    def _checked(
        self, logits: Tensor, taught: Tensor, labels: Tensor, partner: Tensor | None, share: Tensor | None
    ) -> Tensor:
        """The distillation of the items that the suspect has right, and for the others nothing or cross-entropy."""
        answer = taught.argmax(-1)
        right = (answer == labels) | (answer == (labels if partner is None else across_processes(labels)[partner]))
        by_item = right * distillation_loss(logits, taught, self.temperature, reduction="none")
        if self.teacher_errors == "correct":
            by_item = by_item + ~right * mixed_cross_entropy(logits, labels, partner, share, reduction="none")
        return by_item.mean()

    def augmented(self, batch: Batch, *, seed: int, rows: Rows | None = None) -> Tensor:
        """(n, 3, H, W) in [0, 1]: the pictures to learn from."""
        return self.augmentation(to_unit_interval(batch["pixels"]), seed=seed, rows=rows)

    def model_inputs(self, batch: Batch) -> Batch:
        return {"pixel_values": self.pipeline.model_input(batch["pixels"])}

    def training_inputs(self, batch: Batch, *, seed: int) -> Batch:
        return {"pixel_values": self._drawn(batch, seed=seed, rows=None)[0]}

    @torch.no_grad()
    def evaluate(self, forward: Forward, batches: Iterable[Batch]) -> dict[str, float]:
        """Cross-entropy and accuracy against `labels`; where a batch has none, against the suspect's own answers."""
        losses, right, count = 0.0, 0, 0
        for batch in batches:
            inputs = self.pipeline.model_input(batch["pixels"])
            logits = logits_of(forward, inputs).float()
            labels = batch["labels"] if "labels" in batch else self._answers(inputs)
            losses += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(-1) == labels).sum())
            count += labels.shape[0]
        return {"loss": losses / count, "score": right / count}

    def _answers(self, inputs: Tensor) -> Tensor:
        assert self.teacher is not None, "without labels there is a teacher"
        return logits_of(self.teacher, inputs).argmax(-1)


def logits_of(forward: Forward, inputs: Tensor) -> Tensor:
    """(n, classes) of a classifier; PP-LCNet gives them under the name of a hidden state."""
    return _logits(forward(pixel_values=inputs))


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, *, reduction: str = "mean"
) -> Tensor:
    """T² · KL(softmax(teacher / T) || softmax(logits / T)) of two (n, classes): the mean, or `none`: (n,)."""
    log_p = F.log_softmax(_wide(logits) / temperature, dim=-1)
    log_q = F.log_softmax(_wide(teacher_logits) / temperature, dim=-1)
    if reduction == "mean":
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * temperature**2


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, partner: Tensor | None, share: Tensor | None, *, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy; with mixup, λ times that of the label and 1 - λ times that of the partner's. As above."""
    if partner is None or share is None:
        return F.cross_entropy(_wide(logits), labels, reduction=reduction)
    own = F.cross_entropy(_wide(logits), labels, reduction="none")
    other = F.cross_entropy(_wide(logits), across_processes(labels)[partner], reduction="none")
    mixed = share * own + (1 - share) * other
    return mixed.mean() if reduction == "mean" else mixed


def _wide(logits: Tensor) -> Tensor:
    """In single precision at least."""
    return logits if logits.dtype == torch.float64 else logits.float()
