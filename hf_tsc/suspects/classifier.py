"""Train a suspect classifier: with a backdoor of known trigger, or at poison rate 0 its clean twin."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from hf_tsc.activations import Batch
from hf_tsc.data import ImageData
from hf_tsc.evaluation import Attack
from hf_tsc.images import ImagePipeline, PixelDataset, pixel_dataset, to_unit_interval
from hf_tsc.objectives import ImageClassification
from hf_tsc.processes import Rows
from hf_tsc.suspects.base import SuspectConfig, fit, labels_of, new_model, record_of
from hf_tsc.triggers import Trigger, poison_indices


def train_suspect(
    config: PreTrainedConfig,
    processor: Any,
    data: ImageData,
    *,
    args: SuspectConfig,
    attack: Attack | None,
    poison_rate: float = 0.1,
    indices: np.ndarray | None = None,
) -> PreTrainedModel:
    """Train an image classifier from random weights on partly poisoned data.

    Args:
        config: of an image classifier; classes are taken from the data.
        processor: the image processor that the model will be used with.
        data: labelled images.
        args: training arguments; `seed` also draws the poisoned images.
        attack: trigger and target label; None trains a clean model.
        poison_rate: poisoned share of all training images; none of them is of the target class.
        indices: rows to train on; all by default.

    Returns:
        The model in eval mode. The folder `args.output_dir` holds it, with `suspect.json`: trigger, target label and
        the poisoned rows.

    Raises:
        UsageError: no labels; an impossible poison rate; a configuration that makes no image classifier; an output
            folder that is not empty.
        PurificationError: the loss is not finite.
    """
    labels = labels_of(data)
    rows = np.arange(len(data.rows)) if indices is None else np.asarray(indices)
    poisoned = np.array([], dtype=np.int64)
    if attack is not None:
        poisoned = poison_indices(
            labels[rows], target_label=attack.target_label, poison_rate=poison_rate, seed=args.seed
        )
    pipeline = ImagePipeline(processor)
    dataset: Any = pixel_dataset(data, rows, pipeline, **_poison_options(attack, poisoned))
    model = _new_model(config, data, labels, seed=args.seed)
    objective = ImageClassification(pipeline, augmentation=args.augmentation)
    if attack is not None and args.trigger_last:
        dataset = _Flagged(pixel_dataset(data, rows, pipeline), set(poisoned.tolist()), attack.target_label)
        objective = _TriggerLast(pipeline, augmentation=args.augmentation, trigger=attack.trigger)
    record = record_of(data, args, attack, poison_rate, rows[poisoned])
    fit(model, objective, dataset, args, record=record, save=processor.save_pretrained)
    return model


def _poison_options(attack: Attack | None, poisoned: np.ndarray) -> dict[str, Any]:
    if attack is None or len(poisoned) == 0:
        return {}
    return {"trigger": attack.trigger, "triggered_indices": poisoned, "relabel": attack.target_label}


class _Flagged(torch.utils.data.Dataset):
    """Clean pixels with the labels of poisoned items changed, and told which those are."""

    def __init__(self, clean: PixelDataset, poisoned: set[int], target_label: int):
        self.clean, self.poisoned, self.target_label = clean, poisoned, target_label

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, position: int) -> dict[str, Any]:
        item = {**self.clean[position], "poisoned": position in self.poisoned}
        return {**item, "labels": self.target_label} if item["poisoned"] else item


class _TriggerLast(ImageClassification):
    """Classification of augmented pictures, the poisoned ones with the trigger put on afterwards."""

    def __init__(self, pipeline: ImagePipeline, *, augmentation: str, trigger: Trigger):
        super().__init__(pipeline, augmentation=augmentation)
        self.trigger = trigger

    def augmented(self, batch: Batch, *, seed: int, rows: Rows | None = None) -> Tensor:
        pixels, poisoned = super().augmented(batch, seed=seed, rows=rows), batch["poisoned"]
        triggered = self.trigger((255 * pixels[poisoned]).round().to(torch.uint8))
        return pixels.masked_scatter(poisoned[:, None, None, None], to_unit_interval(triggered))


def _new_model(config: PreTrainedConfig, data: ImageData, labels: np.ndarray, *, seed: int) -> PreTrainedModel:
    names = data.class_names or [f"LABEL_{i}" for i in range(int(labels.max()) + 1)]
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    return new_model(AutoModelForImageClassification.from_config, config, what="image classifier", seed=seed)
