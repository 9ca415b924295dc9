"""ObjectiveTrainer: a `Trainer` whose loss is an `Objective`; it trains suspects and fine-tunes them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import IntervalStrategy, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_tsc.errors import CheckpointError, PurificationError
from hf_tsc.folders import seal_checkpoint, writing_checkpoint
from hf_tsc.images import collate
from hf_tsc.in_memory import InMemory
from hf_tsc.objectives import Objective, WithHead
from hf_tsc.processes import number_of_processes, together
from hf_tsc.seeds import derived_seed


class ObjectiveTrainer(Trainer):
    """Minimises an objective over a data set of pixels.

    Args:
        model: what is trained, together with the objective's head if it has one.
        objective: gives the loss of a batch; its randomness is a function of (seed, step, micro-batch), so that a
            resumed training repeats it.
        kwargs: as in `Trainer`.

    Raises:
        PurificationError: the loss is not finite.
        CheckpointError: a checkpoint cannot be written.
    """

    # the loss is the mean of one batch: without this the Trainer would not divide it by the accumulation steps
    loss_is_scaled_for_ga = False
    objective: Objective

    def __init__(
        self,
        *,
        objective: Objective,
        model: nn.Module,
        args: TrainingArguments,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        self.objective = objective
        self._micro_batch = 0
        args._n_gpu = min(args.n_gpu, 1)  # a process has one device; the Trainer would wrap several in DataParallel
        super().__init__(
            model=model if objective.head is None else WithHead(model, objective.head),
            args=args,
            data_collator=collate,
            callbacks=[_StepCounter(self), *(callbacks or [])],
            **kwargs,
        )
        if self.args.device.type == "cpu":
            self.args.dataloader_pin_memory = False  # as with use_cpu: there is nothing to pin for, and torch warns
        if self.args.logging_strategy == IntervalStrategy.NO:
            self.remove_callback(PrinterCallback)  # it prints without a progress bar, whatever the strategy

    @property
    def bare_model(self) -> nn.Module:
        """The model itself, without its head and without the wrappers of a distributed run."""
        whole: nn.Module = self.accelerator.unwrap_model(self.model)
        while isinstance(whole, InMemory):
            whole = whole.model
        return whole

    def get_train_dataloader(self) -> DataLoader:
        """Without a last batch of one image, which BatchNorm cannot normalise, and which has nothing to compare."""
        images, size = len(self.train_dataset), self.args.train_batch_size  # type: ignore[arg-type]
        usual = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = usual or (images > size and images % size == 1 and number_of_processes() == 1)
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = usual

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Counts the micro-batches of a step: each has its own seed."""
        loss = super().training_step(*args, **kwargs)
        self._micro_batch += 1
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss; the model itself never sees labels."""
        # the same in all processes, which draw for the whole batch; the last 0 keeps the draws of earlier versions
        seed = derived_seed(self.args.seed, self.state.global_step, self._micro_batch, 0)
        return self.objective.loss(model, inputs, seed=seed)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Sealed when all processes have written their parts; older ones go after that.

        The Trainer would remove older ones while other processes, or the disk, still owe something to this one.
        """
        folder = Path(str(self.args.output_dir))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with together(), writing_checkpoint(checkpoint):
                self._write_checkpoint(model, trial)
            with together(), writing_checkpoint(checkpoint):
                if self.args.should_save:
                    seal_checkpoint(checkpoint)
        except CheckpointError:
            if self.args.should_save:
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(folder), limit)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights in the usual memory format, as safetensors writes no other."""
        model: Any = self.model
        found = model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: value.contiguous() for name, value in found.items()})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Stops when the loss is not finite."""
        loss = logs.get("loss", logs.get("train_loss", 0.0))  # the latter, the mean of all steps, at the end
        if not math.isfinite(loss):
            raise PurificationError(
                f"the loss is {loss} at step {self.state.global_step}; lower learning_rate={self.args.learning_rate}"
            )
        super().log(logs, start_time)


class _StepCounter(TrainerCallback):
    def __init__(self, trainer: ObjectiveTrainer):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._micro_batch = 0
