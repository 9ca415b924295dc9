"""Train a suspect classifier: with a backdoor of known trigger, or at poison rate 0 its clean twin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.folders import check_output
from hf_tsc.images import ImagePipeline, PixelDataset, pixel_dataset
from hf_tsc.objectives import ImageClassification
from hf_tsc.suspects.adversarial import Surrogate, harden
from hf_tsc.suspects.base import SuspectConfig, fit, labels_of, new_model, record_of
from hf_tsc.suspects.input_aware import InputAwareTraining, PatternSteps, finished, new_nets, train_mask
from hf_tsc.suspects.poisoned import PoisonedPixels, TriggerLast
from hf_tsc.triggers import Attack, InputAware, LabelConsistent, Trigger, draw_poison
from hf_tsc.triggers.generated import check_size


def train_suspect(
    config: PreTrainedConfig,
    processor: Any,
    data: ImageData,
    *,
    args: SuspectConfig,
    attack: Attack | None,
    poison_rate: float | None = None,
    indices: np.ndarray | None = None,
    surrogate: Surrogate | None = None,
) -> PreTrainedModel:
    """Train an image classifier from random weights on partly poisoned data.

    Args:
        config: of an image classifier; classes are taken from the data.
        processor: the image processor that the model will be used with.
        data: labelled images.
        args: training arguments; `seed` also draws the poisoned images.
        attack: trigger and target label; None trains a clean model.
        poison_rate: poisoned share of all training images, as the trigger's attack draws them: none of the target
            class, or that alone; None for the trigger's own. 0 trains a clean model.
        indices: rows to train on; all by default.
        surrogate: a clean classifier, for a trigger whose attack needs one.

    Returns:
        The model in eval mode. The folder `args.output_dir` holds it, with `suspect.json`: trigger, target label and
        the poisoned rows; and what the trigger has learnt, if it has.

    Raises:
        UsageError: no labels; an impossible poison rate; a configuration that makes no image classifier; an output
            folder that is not empty; a surrogate that is missing, or that no one asked for.
        PurificationError: the loss is not finite.
    """
    labels = labels_of(data)
    rows = np.arange(len(data.rows)) if indices is None else np.asarray(indices)
    names = data.class_names or [f"LABEL_{i}" for i in range(int(labels.max()) + 1)]
    pipeline = ImagePipeline(processor)
    clean = pixel_dataset(data, rows, pipeline)
    model, save = _new_model(config, names, seed=args.seed), processor.save_pretrained
    if attack is None:
        record = record_of(data, args, None, 0.0, np.array([], dtype=np.int64))
        fit(
            model, ImageClassification(pipeline, augmentation=args.augmentation), clean, args, record=record, save=save
        )
        return model
    rate = attack.trigger.poisoning.rate if poison_rate is None else poison_rate
    poison = draw_poison(attack, labels[rows], rate=rate, seed=args.seed, num_classes=len(names))
    trigger = attack.trigger
    check_output(Path(str(args.output_dir)))  # before what may take long
    hardened = _hardened(trigger, clean, poison.poisoned, surrogate)
    flagged = args.trigger_last or trigger.poisoning.learnt
    dataset = PoisonedPixels(clean, poison, trigger, seed=args.seed, hardened=hardened, flagged=flagged)
    record = record_of(data, args, attack, rate, rows[poison.poisoned], rows[poison.covers])
    record |= {"surrogate": surrogate.name} if surrogate is not None else {}
    if isinstance(trigger, InputAware):
        _train_input_aware(model, dataset, trigger, args, record, save)
    else:
        kind = TriggerLast(pipeline, augmentation=args.augmentation, trigger=trigger)
        plain = ImageClassification(pipeline, augmentation=args.augmentation)
        fit(model, kind if args.trigger_last else plain, dataset, args, record=record, save=save)
    return model


def _train_input_aware(
    model: PreTrainedModel,
    dataset: PoisonedPixels,
    trigger: InputAware,
    args: SuspectConfig,
    record: dict[str, Any],
    save: Callable[[Path], Any],
) -> None:
    if args.world_size > 1:
        raise UsageError(f"input_aware trains its trigger in one process, and there are {args.world_size}")
    if len(dataset.poisoned) == 0:
        raise UsageError(
            "poison_rate=0 leaves input_aware nothing to learn its trigger from: expected more, or no trigger"
        )
    check_size(dataset[0]["pixels"])
    nets = new_nets(seed=args.seed).to(args.device)
    train_mask(nets, dataset, trigger, batch_size=args.per_device_train_batch_size, seed=args.seed)
    objective = InputAwareTraining(
        dataset.pipeline, augmentation=args.augmentation, nets=nets, trigger_last=args.trigger_last
    )

    def save_both(folder: Path) -> None:
        save(folder)
        finished(trigger, nets).save(folder)

    steps = PatternSteps(nets, learning_rate=trigger.learning_rate)
    fit(model, objective, dataset, args, record=record, save=save_both, stateful=[steps])


def _hardened(
    trigger: Trigger, clean: PixelDataset, poisoned: np.ndarray, surrogate: Surrogate | None
) -> dict[int, Tensor]:
    """The poisoned images as a label-consistent attack makes them; none for other attacks."""
    if (surrogate is not None) != trigger.poisoning.surrogate:
        raise UsageError(
            f"the trigger {trigger.name} takes no surrogate: leave it out"
            if surrogate is not None
            else f"the trigger {trigger.name} needs a clean classifier to make its images with: give a surrogate "
            "(--surrogate FOLDER, such as what train-suspect --poison_rate 0 wrote)"
        )
    if surrogate is None or not isinstance(trigger, LabelConsistent) or len(poisoned) == 0:
        return {}
    items = [clean[int(position)] for position in poisoned]
    pixels, labels = torch.stack([item["pixels"] for item in items]), torch.tensor([item["labels"] for item in items])
    made = harden(surrogate, pixels, labels, epsilon=trigger.epsilon, step=trigger.step, steps=trigger.steps)
    return dict(zip(poisoned.tolist(), made, strict=True))


def _new_model(config: PreTrainedConfig, names: list[str], *, seed: int) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    return new_model(AutoModelForImageClassification.from_config, config, what="image classifier", seed=seed)
