"""What the training of every kind of suspect shares: its arguments, its folder and its record."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Attack
from hf_tsc.folders import RECORD, check_output, finished_folder, write_json
from hf_tsc.hub import quiet
from hf_tsc.images import AUGMENTATIONS
from hf_tsc.in_memory import InMemory
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.objectives import Objective
from hf_tsc.tsc_config import NOT_REPORTED, WITHOUT_EFFECT
from hf_tsc.work_folder import work_folder

ITEMS = 64  # of a training set, by which it is told from another one


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
    channels_last: bool = field(
        default=False, metadata={"help": "Train with convolution weights in channels-last memory format."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule."})
    num_train_epochs: float = field(default=30.0, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images a step and device."})
    save_steps: float = field(default=0.1, metadata={"help": "Checkpoint every so many steps, or share of all steps."})
    save_strategy: str = field(default="steps", metadata={"help": "When to checkpoint; `no` for never."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint of an interrupted run."})
    hub_strategy: str = field(default="end", metadata={"help": "Never publish half-trained weights."})
    logging_steps: float = field(default=0.25, metadata={"help": "Log every so many steps, or share of all steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite must be seen."})
    disable_tqdm: bool | None = field(default=False, metadata={"help": "Show no progress bar."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Items are pixels, not columns."})


def fit(
    model: PreTrainedModel,
    objective: Objective,
    dataset: Dataset,
    args: SuspectConfig,
    *,
    record: dict[str, Any],
    save: Callable[[Path], None],
    stateful: list[TrainerCallback] | None = None,
) -> None:
    """Train a model, and write it with its record to `args.output_dir`, whole or not at all.

    Checkpoints are in `{output_dir}.work` until then. With `args.resume` the training goes on from the last one.

    Args:
        model: is trained in place, and left in eval mode.
        objective, dataset: what for, and on what.
        args: training arguments.
        record: the content of `suspect.json`.
        save: writes what else belongs to the model (processor, tokenizer) to a folder.
        stateful: callbacks with a part in the training that no checkpoint holds: with these no checkpoint is written,
            nor in several processes.

    Raises:
        UsageError: the output folder is not empty; a folder of checkpoints is there and not to be gone on from.
        OtherRequestError: it is of another training.
        PurificationError: the loss is not finite.
    """
    output = Path(str(args.output_dir))

    def write(folder: Path) -> None:
        with quiet():
            model.eval().save_pretrained(folder)
        save(folder)
        write_json(folder / RECORD, record)

    if stateful or args.world_size > 1 or args.save_strategy == SaveStrategy.NO:
        with finished_folder(output) as folder:
            _train(model, objective, dataset, args, folder, save_strategy=SaveStrategy.NO, callbacks=stateful)
            write(folder)
        return
    check_output(output)
    with work_folder(output, _request(model, dataset, record, args), resume=args.resume) as (work, checkpoint):
        _train(InMemory(model), objective, dataset, args, work, checkpoint=checkpoint, callbacks=[NoneAtTheEnd()])
        with finished_folder(output) as folder:
            write(folder)


def _train(
    model: nn.Module,
    objective: Objective,
    dataset: Dataset,
    args: SuspectConfig,
    folder: Path,
    *,
    checkpoint: str | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **changed: Any,
) -> None:
    """With the arguments as they are, but for the folder, which the Trainer makes, and for what is changed."""
    changed |= {"output_dir": str(folder)}
    before = {name: getattr(args, name) for name in changed}
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        vars(args).update(changed)
        options: dict[str, Any] = {"args": args, "train_dataset": dataset, "callbacks": callbacks}
        ObjectiveTrainer(objective=objective, model=model, **options).train(resume_from_checkpoint=checkpoint)
    finally:
        vars(args).update(before)
        if args.channels_last:
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


class NoneAtTheEnd(TrainerCallback):
    """No checkpoint after the last step: the result is written then, and who went on from it would go too far."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save &= state.global_step < state.max_steps

    on_epoch_end = on_step_end


def _request(model: PreTrainedModel, dataset: Any, record: dict[str, Any], args: SuspectConfig) -> dict[str, Any]:
    """What the training depends on: weights at the beginning, some of the items, poison, arguments."""
    weights, items = hashlib.sha256(), hashlib.sha256(str(len(dataset)).encode())
    for tensor in model.state_dict().values():
        weights.update(_bytes(tensor))
    for position in np.linspace(0, len(dataset) - 1, num=ITEMS, dtype=np.int64):
        for name, value in sorted(dataset[int(position)].items()):
            items.update(name.encode() + _bytes(torch.as_tensor(value)))
    apart = {*NOT_REPORTED, "resume"} - {"max_steps", "num_train_epochs"}
    values = {name: value for name, value in args.to_dict().items() if name not in apart}
    arguments = {name: value for name, value in values.items() if not name.startswith(WITHOUT_EFFECT)}
    return {"weights": weights.hexdigest(), "items": items.hexdigest(), "record": record, "arguments": arguments}


def _bytes(tensor: torch.Tensor) -> bytes:
    """Of what it holds, and of its shape."""
    return str(tuple(tensor.shape)).encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_trigger_first(args: SuspectConfig) -> None:
    """Raises UsageError: kinds of suspects whose images are poisoned before they are augmented, and only then."""
    if args.trigger_last:
        raise UsageError(
            "trigger_last is for classifiers: here the trigger comes before the augmentation; leave it out"
        )


def new_model(
    make: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig, *, what: str, seed: int
) -> Any:
    """A model with random weights, a function of the seed alone.

    Raises:
        UsageError: the configuration makes no model of this kind.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return make(copy.deepcopy(config))
        except Exception as error:  # a constructor may raise anything
            raise UsageError(f"no {what} can be made from the {type(config).__name__}: {error!r}") from error


def labels_of(data: ImageData) -> np.ndarray:
    """Raises UsageError where there are none."""
    labels = data.labels
    if labels is None:
        raise UsageError(f"{data.name} has no label column: a suspect is trained and poisoned by labels")
    return labels


def record_of(
    data: ImageData,
    args: SuspectConfig,
    attack: Attack | None,
    poison_rate: float,
    poisoned: np.ndarray,
    covers: np.ndarray | None = None,
) -> dict[str, Any]:
    """What is needed to measure the suspect: above all its trigger; and the rows that were changed."""
    return {
        **(attack.to_dict() if attack else {"trigger": None, "target_label": None}),
        "poison_rate": poison_rate if attack else 0.0,
        "poisoned_indices": poisoned.tolist(),
        **({"cover_indices": covers.tolist()} if covers is not None and len(covers) else {}),
        "trigger_last": args.trigger_last,
        "seed": args.seed,
        "dataset": data.describe(),
    }
