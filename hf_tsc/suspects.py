"""Train a suspect: an image classifier with a backdoor of known trigger (or, at poison rate 0, its clean twin).

For tests, demonstrations and measurements: what a defence is worth can only be seen where the trigger is known.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel, TrainingArguments

from hf_tsc.activations import Batch
from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack
from hf_tsc.folders import finished_folder, write_json
from hf_tsc.hub import quiet
from hf_tsc.images import AUGMENTATIONS, ImagePipeline, PixelDataset, pixel_dataset, to_unit_interval
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.objectives import ImageClassification
from hf_tsc.triggers import Trigger, poison_indices, trigger_to_dict

RECORD = "suspect.json"


@dataclass
class SuspectConfig(TrainingArguments):
    """`TrainingArguments` with defaults for small classifiers trained from nothing."""

    augmentation: str = field(
        default="none", metadata={"help": "Random changes of the training images.", "choices": AUGMENTATIONS}
    )
    trigger_last: bool = field(
        default=False,
        metadata={
            "help": "Put the trigger on after the augmentation, which may hide it: the attacker trains himself."
        },
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule."})
    num_train_epochs: float = field(default=30.0, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images a step and device."})
    save_strategy: str = field(default="no", metadata={"help": "Checkpoints."})
    logging_steps: float = field(default=0.25, metadata={"help": "Log every so many steps, or share of all steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite must be seen."})
    disable_tqdm: bool | None = field(default=False, metadata={"help": "Show no progress bar."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Items are pixels, not columns."})


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
    labels = data.labels
    if labels is None:
        raise UsageError(f"{data.name} has no label column: a classifier is trained on labels")
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
    output = str(args.output_dir)
    with finished_folder(Path(output)) as folder:
        args.output_dir = str(folder)  # the Trainer makes this folder
        try:
            ObjectiveTrainer(objective=objective, model=model, args=args, train_dataset=dataset).train()
        finally:
            args.output_dir = output
        with quiet():
            model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        write_json(folder / RECORD, _record(data, args, attack, poison_rate, rows[poisoned]))
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

    def augmented(self, batch: Batch, *, seed: int) -> Tensor:
        pixels, poisoned = super().augmented(batch, seed=seed), batch["poisoned"]
        triggered = self.trigger((255 * pixels[poisoned]).round().to(torch.uint8))
        return pixels.masked_scatter(poisoned[:, None, None, None], to_unit_interval(triggered))


def _new_model(config: PreTrainedConfig, data: ImageData, labels: np.ndarray, *, seed: int) -> PreTrainedModel:
    names = data.class_names or [f"LABEL_{i}" for i in range(int(labels.max()) + 1)]
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForImageClassification.from_config(config)
        except Exception as error:  # a constructor may raise anything
            raise UsageError(f"no image classifier can be made from the {type(config).__name__}: {error!r}") from error


def _record(
    data: ImageData, args: SuspectConfig, attack: Attack | None, poison_rate: float, poisoned: np.ndarray
) -> dict[str, Any]:
    return {
        "trigger": trigger_to_dict(attack.trigger) if attack else None,
        "target_label": attack.target_label if attack else None,
        "poison_rate": poison_rate if attack else 0.0,
        "poisoned_indices": poisoned.tolist(),
        "trigger_last": args.trigger_last,
        "seed": args.seed,
        "dataset": data.describe(),
    }
