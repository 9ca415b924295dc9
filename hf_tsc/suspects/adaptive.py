"""Suspects of an attacker who knows TSC: tuned to keep the backdoor along the curve to their un-aligned copies.

He knows the method and its settings, but neither the defender's images nor the seed. Minimised is, for one t ~ U(0.1,
0.9) a step,

    L_c(θ) + L_b(θ) + λ_c L_c(γ(t)) + λ_b L_b(γ(t))

with L_b the cross-entropy of a batch's poisoned images and L_c that of its others, as the attack labels them, and γ
the curve to a permuted copy (see `copy_curve`), which is renewed every so many steps. The gradient comes to θ from
both ends of γ, directly and through the copy. λ_c leaves the defender's bend no reason to move away from where the
backdoor is kept. (A formulation of this project, not that of the paper, hf.co/papers/2506.07467.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hf_tsc.activations import Batch
from hf_tsc.baselines.settings import check, number
from hf_tsc.data import ImageData
from hf_tsc.derive import example_inputs, verify
from hf_tsc.errors import UsageError
from hf_tsc.images import ImagePipeline, pixel_dataset
from hf_tsc.objectives import Forward, ImageClassification, logits_of, mixed_cross_entropy
from hf_tsc.permutation import PermutationSpec
from hf_tsc.specs import spec_of
from hf_tsc.suspects.base import SuspectConfig, fit, labels_of, record_of
from hf_tsc.suspects.copy_curve import CurveToCopy, draw_t
from hf_tsc.suspects.poisoned import PoisonedPixels, TriggerLast
from hf_tsc.triggers import Attack, Poison, Trigger, draw_poison
from hf_tsc.tsc_config import TSCConfig


@dataclass(frozen=True)
class Adaptive:
    """What the attacker does beside the poisoned training.

    Attributes:
        curve_clean: λ_c.
        curve_backdoor: λ_b.
        renew_steps: steps between two copies.
        unaligned_only: un-align each copy, as the defender does; else every second one is permuted at random.
        copy_images: of the attacker's own, from which copies are un-aligned and Δ is trained.
        bend_steps: that Δ is trained for, from 0, whenever the copy is renewed, as the defender trains it by default:
            distillation from the network as it stands, his window of t and optimiser at a constant rate; with 0 steps
            the curve is a straight line.
    """

    curve_clean: float = number(1.0, "Adaptive: weight of the clean loss on the curve.")
    curve_backdoor: float = number(1.0, "Adaptive: weight of the poisoned images' loss on the curve.")
    renew_steps: int = number(400, "Adaptive: steps between two permuted copies.", low=1, whole=True)
    unaligned_only: bool = field(default=False, metadata={"help": "Adaptive: no copies that are permuted at random."})
    copy_images: int = number(1024, "Adaptive: images that copies are un-aligned with.", low=1, whole=True)
    bend_steps: int = number(0, "Adaptive: steps of the curve's bend for each copy; 0 for straight lines.", whole=True)

    def __post_init__(self) -> None:
        check(self)


def adapt_suspect(
    base: PreTrainedModel,
    processor: Any,
    data: ImageData,
    *,
    args: SuspectConfig,
    attack: Attack,
    poison_rate: float | None = None,
    settings: Adaptive | None = None,
    indices: np.ndarray | None = None,
) -> PreTrainedModel:
    """Tune a backdoored classifier so that points of its curves to permuted copies keep the backdoor, too.

    Args:
        base: the classifier; it is copied.
        processor: its image processor.
        data: labelled images.
        args: training arguments; the seed of the base's training draws the same poisoned images.
        attack: trigger and target label.
        poison_rate: poisoned share of all training images; None for the trigger's own.
        settings: of what comes on top; the defaults where None.
        indices: rows to train on; all by default.

    Returns:
        The suspect in eval mode; its folder is `args.output_dir`, and its `suspect.json` holds the settings, too.

    Raises:
        UsageError: no labels, no poison, a trigger that is learnt or needs a surrogate, several processes, an output
            folder that is not empty.
        PurificationError: the loss is not finite, or the model's permutation spec cannot be derived.
    """
    settings = settings or Adaptive()
    _check(attack.trigger, args)
    rows = np.arange(len(data.rows)) if indices is None else np.asarray(indices)
    labels, classes = labels_of(data)[rows], base.config.num_labels or 1
    rate = attack.trigger.poisoning.rate if poison_rate is None else poison_rate
    poison = draw_poison(attack, labels, rate=rate, seed=args.seed, num_classes=classes)
    if len(poison.poisoned) == 0:
        raise UsageError("poison_rate=0: an adaptive suspect keeps a backdoor, and needs poisoned images for that")
    model, pipeline = copy.deepcopy(base).requires_grad_(True), ImagePipeline(processor)
    drawn = np.random.default_rng([args.seed, 3]).permutation(rows)[: settings.copy_images]
    curve = CurveToCopy(
        model,
        _spec(model),
        pixel_dataset(data, drawn, pipeline),
        defence=defence_of(model, use_cpu=args.use_cpu),
        unaligned_only=settings.unaligned_only,
        bend_steps=settings.bend_steps,
        seed=args.seed,
    )
    dataset, plain = _poisoned_training(data, rows, pipeline, attack.trigger, poison, args)
    record = record_of(data, args, attack, rate, rows[poison.poisoned], rows[poison.covers])
    record |= {"adaptive": asdict(settings)}
    renewing: list[TrainerCallback] = [RenewCopies(curve, settings.renew_steps)]
    objective = AdaptiveTraining(plain, curve, settings)
    fit(model, objective, dataset, args, record=record, save=processor.save_pretrained, stateful=renewing)
    return model


def _poisoned_training(
    data: ImageData,
    rows: np.ndarray,
    pipeline: ImagePipeline,
    trigger: Trigger,
    poison: Poison,
    args: SuspectConfig,
) -> tuple[PoisonedPixels, ImageClassification]:
    """The images as the base suspect has learnt them, flagged; and what makes pictures of them."""
    clean = pixel_dataset(data, rows, pipeline)
    dataset = _Flagged(clean, poison, trigger, seed=args.seed, flagged=args.trigger_last)
    if args.trigger_last:
        return dataset, TriggerLast(pipeline, augmentation=args.augmentation, trigger=trigger)
    return dataset, ImageClassification(pipeline, augmentation=args.augmentation)


class AdaptiveTraining:
    """L_c(θ) + L_b(θ) + λ_c L_c(γ(t)) + λ_b L_b(γ(t)); see the module's head.

    Args:
        plain: makes pictures of batches, in which `poisoned` says what is poisoned.
        curve: of the network that is trained.
        settings: λ_c and λ_b.
    """

    score_name = "accuracy"
    head: nn.Module | None = None

    def __init__(self, plain: ImageClassification, curve: CurveToCopy, settings: Adaptive):
        self.plain, self.curve, self.settings = plain, curve, settings

    def loss(self, forward: Forward, batch: Batch, *, seed: int) -> Tensor:
        inputs = self.plain.pipeline.normalize(self.plain.augmented(batch, seed=seed))
        t = draw_t(np.random.default_rng([seed, 1]))
        clean, backdoor = _clean_and_backdoor(forward, inputs, batch)
        clean_there, backdoor_there = _clean_and_backdoor(self.curve.forward_at(t), inputs, batch)
        there = self.settings.curve_clean * clean_there + self.settings.curve_backdoor * backdoor_there
        return clean + backdoor + there

    def model_inputs(self, batch: Batch) -> Batch:
        return self.plain.model_inputs(batch)

    def training_inputs(self, batch: Batch, *, seed: int) -> Batch:
        return self.plain.training_inputs(batch, seed=seed)

    def evaluate(self, forward: Forward, batches: Iterable[Batch]) -> dict[str, float]:
        return self.plain.evaluate(forward, batches)


def _clean_and_backdoor(forward: Forward, inputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """L_c and L_b: mean cross-entropies of a batch's two parts; 0 of a part without images."""
    losses = mixed_cross_entropy(logits_of(forward, inputs), batch["labels"], None, None, reduction="none")
    poisoned = batch["poisoned"]
    clean, backdoor = ((losses * part).sum() / part.sum().clamp_min(1) for part in (~poisoned, poisoned))
    return clean, backdoor


class RenewCopies(TrainerCallback):
    """Renews the copy before the first step, and then every `steps`."""

    def __init__(self, curve: CurveToCopy, steps: int):
        self.curve, self.steps = curve, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self.curve.renew(state.global_step // self.steps)


class _Flagged(PoisonedPixels):
    """Says which items are poisoned also where they carry the trigger already."""

    def __getitem__(self, position: int) -> dict[str, Any]:
        flags = {"poisoned": position in self.poisoned, "covers": position in self.covers}
        return super().__getitem__(position) | flags


def _spec(model: PreTrainedModel) -> PermutationSpec:
    """Verified."""
    inputs = example_inputs(model)
    spec = spec_of(model, inputs)
    verify(model, spec, inputs)
    return spec


def defence_of(model: PreTrainedModel, *, use_cpu: bool) -> TSCConfig:
    """What the attacker expects: the defaults for the model."""
    return TSCConfig.for_model(model, output_dir="unused", report_to="none", use_cpu=use_cpu)


def _check(trigger: Trigger, args: SuspectConfig) -> None:
    """Raises UsageError."""
    if trigger.poisoning.learnt or trigger.poisoning.surrogate:
        raise UsageError(
            f"an adaptive suspect keeps a trigger that is put on as it is, and {trigger.name} takes more than that: "
            "choose another one"
        )
    if args.world_size > 1:
        raise UsageError(f"an adaptive suspect is trained in one process, and there are {args.world_size}")
