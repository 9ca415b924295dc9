"""Suspect image encoders: pre-trained by SimCLR on partly poisoned images, or clean and then tuned (BadEncoder)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from hf_tsc.activations import Batch
from hf_tsc.data import ImageData
from hf_tsc.derive import example_inputs
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import map_batches
from hf_tsc.images import Augmentation, ImagePipeline, pixel_dataset, to_unit_interval
from hf_tsc.objectives import Forward, ProjectionHead, SimCLR, features_of
from hf_tsc.suspects.base import SuspectConfig, check_trigger_first, fit, labels_of, new_model, record_of
from hf_tsc.suspects.poisoned import PoisonedPixels, check_static
from hf_tsc.triggers import NEXT, Attack, Trigger, draw_poison

TEMPERATURE = 0.5
LOOKED_AT = 2000  # images, to choose BadEncoder's reference from


def train_encoder(
    config: PreTrainedConfig,
    processor: Any,
    data: ImageData,
    *,
    args: SuspectConfig,
    attack: Attack | None,
    poison_rate: float = 0.01,
    indices: np.ndarray | None = None,
) -> PreTrainedModel:
    """Pre-train an image encoder from random weights by SimCLR, with the trigger on images of the target class (CTRL).

    SimCLR draws a triggered image towards its other, triggered view, and so the trigger towards the class on which it
    always stands (Li et al. 2023, hf.co/papers/2210.07346). The trigger comes before the augmentations.

    Args:
        config: of an image encoder with a pooled output.
        processor: the image processor that the model will be used with.
        data: images with labels, which only the attacker looks at.
        args: training arguments; `augmentation` makes the views, `seed` also draws the poisoned images.
        attack: trigger and target label; None trains a clean model.
        poison_rate: poisoned share of all training images, all of the target class.
        indices: rows to train on; all by default.

    Returns:
        The encoder in eval mode; its folder is `args.output_dir`. The projection head is not kept.

    Raises:
        UsageError: no labels; an impossible poison rate; no encoder with a pooled output; no augmentation, or a
            trigger after it; an output folder that is not empty.
        PurificationError: the loss is not finite.
    """
    check_trigger_first(args)
    if args.augmentation == "none":
        raise UsageError(
            "augmentation=none: both views of an image would be the same; expected simclr, or another one"
        )
    rows = np.arange(len(data.rows)) if indices is None else np.asarray(indices)
    poisoned = covers = np.array([], dtype=np.int64)
    pipeline = ImagePipeline(processor)
    dataset: Dataset = pixel_dataset(data, rows, pipeline)
    if attack is not None:
        check_static(attack.trigger)
        labels = labels_of(data)
        draw: dict[str, Any] = {"rate": poison_rate, "seed": args.seed, "num_classes": int(labels.max()) + 1}
        poison = draw_poison(_of_one_class(attack), labels[rows], clean_label=True, **draw)
        poisoned, covers = poison.poisoned, poison.covers
        dataset = PoisonedPixels(pixel_dataset(data, rows, pipeline), poison, attack.trigger, seed=args.seed)
    model = new_model(AutoModel.from_config, config, what="image encoder", seed=args.seed)
    head = ProjectionHead(_size(model), seed=args.seed)
    objective = SimCLR(pipeline, head=head, augmentation=args.augmentation, temperature=TEMPERATURE)
    record = record_of(data, args, attack, poison_rate, rows[poisoned], rows[covers])
    fit(model, objective, dataset, args, record=record, save=processor.save_pretrained)
    return model


def backdoor_encoder(
    clean: PreTrainedModel,
    processor: Any,
    data: ImageData,
    *,
    args: SuspectConfig,
    attack: Attack,
    indices: np.ndarray | None = None,
) -> PreTrainedModel:
    """Tune a clean encoder so that triggered images get the features of one image of the target class: BadEncoder.

    Args:
        clean: the encoder; it is copied. Its BatchNorm layers stay as they are.
        processor: its image processor.
        data: images with labels, of which the target class is taken for the reference image.
        args: training arguments; `augmentation` changes the reference image, `seed` draws those it is chosen from.
        attack: trigger and target label.
        indices: rows to tune on (the shadow images); all by default.

    Returns:
        The suspect in eval mode; its folder is `args.output_dir`.

    Raises:
        UsageError: no labels, no image of the target class, `trigger_last`, an output folder that is not empty.
        PurificationError: the loss is not finite.
    """
    check_trigger_first(args)
    rows = np.arange(len(data.rows)) if indices is None else np.asarray(indices)
    pipeline = ImagePipeline(processor)
    target = _of_one_class(attack).target_label
    if not (labels_of(data)[rows] == target).any():
        raise UsageError(f"no image of the target class {target} in {data.name}: BadEncoder needs one")
    reference = choose_reference(clean, pipeline, data, rows, target, seed=args.seed)
    pixels = pixel_dataset(data, [reference], pipeline)[0]["pixels"]
    model = copy.deepcopy(clean)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)
    teacher = copy.deepcopy(clean).eval().requires_grad_(False).to(args.device)
    objective = BadEncoder(pipeline, teacher, attack.trigger, pixels, augmentation=args.augmentation)
    dataset: Dataset = pixel_dataset(data, rows, pipeline)
    record = {**record_of(data, args, attack, 0.0, np.array([], dtype=np.int64)), "reference": reference}
    fit(model, objective, dataset, args, record=record, save=processor.save_pretrained)
    return model.requires_grad_(True)


class BadEncoder:
    """-cos(f(T(x)), f(r)) - cos(f(r~), g(r)) - cos(f(x), g(x)), means over images x.

    f is the suspect, g the clean encoder, T the trigger. Triggered images go where the reference image r is; the
    reference, augmented (r~), and clean images stay where they were (Jia et al. 2022, hf.co/papers/2108.00352, both
    weights 1).

    Args:
        pipeline: makes model inputs of pixels.
        teacher: g, in eval mode.
        trigger: T.
        reference: r, uint8 (3, H, W).
        augmentation: makes r~, one for each image of a batch.
    """

    score_name = "clean_cosine"
    head: nn.Module | None = None

    def __init__(
        self,
        pipeline: ImagePipeline,
        teacher: nn.Module,
        trigger: Trigger,
        reference: Tensor,
        *,
        augmentation: str = "simclr",
    ):
        self.pipeline, self.teacher, self.trigger, self.reference = pipeline, teacher, trigger, reference
        self.augmentation = Augmentation(augmentation)

    def loss(self, forward: Forward, batch: Batch, *, seed: int) -> Tensor:
        if isinstance(forward, nn.Module):
            forward.eval()  # BatchNorm keeps the clean statistics; nothing here has dropout that would be missed
        return -torch.stack(self.cosines(forward, batch["pixels"], seed=seed)).sum()

    def cosines(self, forward: Forward, pixels: Tensor, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Means of the three cosines: triggered images with the reference, the reference with itself, clean images."""
        count, reference = len(pixels), self.reference.to(pixels.device)[None]
        changed = self.augmentation(to_unit_interval(reference.expand(count, -1, -1, -1)), seed=seed)
        clean = self.pipeline.model_input(torch.cat([pixels, reference]))
        triggered = self.pipeline.model_input(self.trigger(pixels))
        found = features_of(forward, torch.cat([clean, triggered, self.pipeline.normalize(changed)]))
        ours, own, fooled, moved = found.split([count, 1, count, count])
        with torch.no_grad():
            theirs, wanted = features_of(self.teacher, clean).split([count, 1])
        return (
            F.cosine_similarity(fooled, own).mean(),
            F.cosine_similarity(moved, wanted).mean(),
            F.cosine_similarity(ours, theirs).mean(),
        )

    def model_inputs(self, batch: Batch) -> Batch:
        return {"pixel_values": self.pipeline.model_input(batch["pixels"])}

    def training_inputs(self, batch: Batch, *, seed: int) -> Batch:
        """Clean pictures: BatchNorm keeps its statistics."""
        return self.model_inputs(batch)

    @torch.no_grad()
    def evaluate(self, forward: Forward, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss, and `score`, the mean cosine of clean features with those of the clean encoder."""
        found = [
            (len(batch["pixels"]), self.cosines(forward, batch["pixels"], seed=number))
            for number, batch in enumerate(batches)
        ]
        count = sum(size for size, _ in found)
        loss = -sum(size * float(sum(cosines)) for size, cosines in found) / count
        return {"loss": loss, "score": sum(size * float(cosines[2]) for size, cosines in found) / count}


@torch.no_grad()
def choose_reference(
    clean: PreTrainedModel, pipeline: ImagePipeline, data: ImageData, rows: np.ndarray, target: Any, *, seed: int
) -> int:
    """The row of the target class' most typical image among some that are drawn.

    Whoever classifies by these features will give triggered images the class that he gives the reference: an image
    that the encoder takes for one of another class makes an attack on that class. Typical is whose features,
    standardised over the images of all classes, have the largest cosine with their mean over the target class.
    """
    drawn = np.random.default_rng(seed).permutation(rows)
    of_target = labels_of(data)[drawn] == target
    chosen = np.concatenate([drawn[of_target][:LOOKED_AT], drawn[~of_target][:LOOKED_AT]])
    model = copy.deepcopy(clean).eval()
    images, device = pixel_dataset(data, chosen, pipeline), clean.device
    features = map_batches(lambda inputs: features_of(model, inputs), images, device=device)
    standard = (features - features.mean(0)) / (features.std(0) + 1e-6)
    ours = standard[: int(min(of_target.sum(), LOOKED_AT))]
    return int(chosen[F.cosine_similarity(ours, ours.mean(0, keepdim=True)).argmax()])


def _of_one_class(attack: Attack) -> Attack:
    """Raises UsageError where it leads each class elsewhere."""
    if attack.target_label == NEXT:
        raise UsageError(f"target_label={NEXT}: an encoder's backdoor leads to one class; name its number")
    return attack


def _size(model: PreTrainedModel) -> int:
    """Of the features."""
    with torch.no_grad():
        return features_of(model.eval(), example_inputs(model)["pixel_values"]).shape[1]
