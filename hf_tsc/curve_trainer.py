"""CurveTrainer: trains one curve after the other, as segments of one step counter.

Checkpoints hold start, bend and end of the curve that is being trained, so that resuming is the Trainer's own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, SchedulerType, TrainerCallback

from hf_tsc.activations import Batch
from hf_tsc.batch_norm import PASSES as STATISTICS_PASSES
from hf_tsc.batch_norm import recompute_statistics
from hf_tsc.curve import CurveModel
from hf_tsc.derive import example_inputs
from hf_tsc.errors import PurificationError, UsageError
from hf_tsc.functional import call_at
from hf_tsc.images import Batches
from hf_tsc.objective_trainer import ObjectiveTrainer
from hf_tsc.objectives import Forward, Objective
from hf_tsc.permutation import Params
from hf_tsc.processes import number_of_processes, rank
from hf_tsc.relative_rate import rate_factor, scale_rate, weights_before_batch_norm
from hf_tsc.seeds import derived_seed
from hf_tsc.synced_batch_norm import SyncedBatchNorm
from hf_tsc.tsc_config import SCHEDULES, TSCConfig


class CurveTrainer(ObjectiveTrainer):
    """Minimises an objective along a curve: at each step at a t drawn from the window of the segment's stage.

    Args:
        network: of the curve's architecture; what points are called with. Not changed, but for its device.
        curve: its bend is trained.
        args: the configuration.
        objective, train_dataset, eval_dataset, processing_class, callbacks: as in `TSCTrainer`.

    Attributes:
        seconds_before: what a resumed training had taken until its checkpoint was written.
        rate_factor: of the rate of the weights before a BatchNorm; 1 without `relative_rate` or such weights.

    Raises:
        UsageError: the model would be sharded in a way that curves do not know.
        PurificationError: a loss or a weight is not finite.
    """

    args: TSCConfig

    def __init__(
        self,
        network: PreTrainedModel,
        curve: CurveModel,
        args: TSCConfig,
        *,
        objective: Objective,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        processing_class: Any,
        callbacks: list[TrainerCallback] | None = None,
    ):
        if args.activation_checkpointing:
            curve.activation_checkpointing_enable()  # so that it is refused here, and not after all preparations
        if args.channels_last:
            curve.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(
            objective=objective,
            model=curve,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        check_sharding(self.accelerator, args, objective)
        found = weights_before_batch_norm(network, example_inputs(network)) if args.relative_rate else {}
        self._scaled = [name for name in found if curve.bend[name].requires_grad]
        self.rate_factor = rate_factor([network.get_parameter(name).movedim(found[name], 0) for name in self._scaled])
        network.to(args.device)  # type: ignore[arg-type]
        self.suspect = network
        self.segment_steps = args.segment_steps(len(train_dataset))  # type: ignore[arg-type]
        self.args.max_steps = self.segment_steps * args.stages * args.rounds
        self.seconds_before, self._since = 0.0, time.monotonic()

    def _segment(self, step: int) -> tuple[int, int]:
        """(round, stage), both from 1, of the segment that optimisation step `step` (from 0) belongs to."""
        number = step // self.segment_steps
        return number // self.args.stages + 1, number % self.args.stages + 1

    @property
    def curve(self) -> CurveModel:
        """The curve itself, without the objective's head and without the wrappers of a distributed run."""
        curve = self.bare_model
        assert isinstance(curve, CurveModel)
        return curve

    def _lay_curve(self, start: Params, end: Params) -> None:
        """A fresh curve: ends and bend in place, no momentum from the one before."""
        for name in self.curve.names:
            if not (torch.isfinite(start[name]).all() and torch.isfinite(end[name]).all()):
                rate = self.args.learning_rate
                raise PurificationError(f"the weights of {name} are not finite; lower learning_rate={rate}")
        self.curve.set_ends(start, end)
        assert self.optimizer is not None, "curves are laid while training"
        self.optimizer.state.clear()

    def point(self, t: float) -> Params:
        """γ(t) of the current curve: parameters, and buffers with recomputed BatchNorm statistics.

        Every process has to call it, as each reads its share of the images for the statistics.
        """
        params, buffers = self.curve.point(t), dict(self.suspect.named_buffers())
        return {**params, **recompute_statistics(self.suspect, params, self._statistics_batches(), buffers)}

    def _batches(self, dataset: Any, *, divided: bool = False, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """In fixed order; `divided` among the processes: of W, process r has the batches r, r + W, ..."""
        rows = range(len(dataset)) if order is None else order
        batches = list(Batches(rows, self.args.statistics_batch_size))
        if divided:
            batches = batches[rank() :: number_of_processes()]
        loader: Any = DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator)
        for batch in loader:
            yield self._prepare_inputs(batch)

    def _clean_batches(self) -> Iterator[Batch]:
        """This process' share of the training part, without augmentation."""
        return (self.objective.model_inputs(batch) for batch in self._batches(self.train_dataset, divided=True))

    def _statistics_batches(self) -> Iterator[Batch]:
        """This process' share of the images that BatchNorm statistics are computed of."""
        if self.args.batch_norm_images == "clean":
            yield from self._clean_batches()
            return
        seed, count = self.args.seed, len(self.train_dataset)  # type: ignore[arg-type]
        for number in range(STATISTICS_PASSES):
            order = np.random.default_rng([seed, number, 5]).permutation(count).tolist()
            for place, batch in enumerate(self._batches(self.train_dataset, divided=True, order=order)):
                place_of_all = rank() + place * number_of_processes()
                yield self.objective.training_inputs(batch, seed=derived_seed(seed, number, place_of_all, 6))

    def measure(self, tensors: Params) -> dict[str, float]:
        """`loss` and `score` of a point on the held-out images, all of which this process reads."""
        return self.objective.evaluate(self._forward_at(tensors), self._batches(self.eval_dataset))

    def _forward_at(self, tensors: Params) -> Forward:
        def forward(**inputs: Tensor) -> Any:
            return call_at(self.suspect, tensors, inputs)

        return forward

    # --- the Trainer's methods that have to differ ----------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss at a random t, the same t for all processes and micro-batches of a step."""
        self.curve.t = self._draw_t(self.state.global_step)
        synced = self.args.sync_batch_norm and number_of_processes() > 1
        with SyncedBatchNorm() if synced else contextlib.nullcontext():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _draw_t(self, step: int) -> float:
        """t ~ U(window), a function of seed and step."""
        low, high = self.args.curve1_window if self._segment(step)[1] == 1 else self.args.curve2_window
        return low + (high - low) * float(np.random.default_rng([self.args.seed, step]).random())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All trained ones, as in the paper; the Trainer would leave out biases and norms, by their names."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """With `relative_rate`, the weights before a BatchNorm have a group with a rate of their own."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self._scaled:
            bend = self.curve.bend
            scale_rate(optimizer, [bend[name] for name in self._scaled], self.rate_factor)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """The schedule starts anew at every segment and reaches 0 at its end."""
        if self.lr_scheduler is None:
            shape = SCHEDULES[str(SchedulerType(self.args.lr_scheduler_type).value)]
            steps, warmup = self.segment_steps, self.args.get_warmup_steps(self.segment_steps)

            def factor(step: int) -> float:
                k = step % steps if step < num_training_steps else steps
                return (k + 1) / (warmup + 1) if k < warmup else shape((k - warmup) / max(steps - warmup, 1))

            trained: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(trained, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        seconds = self.seconds_before + time.monotonic() - self._since
        self.state.log_history.append({"step": self.state.global_step, "seconds": seconds})
        super()._save_checkpoint(model, trial)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._write_checkpoint(model, trial)
        self._forget_between_curves()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        taken = [entry["seconds"] for entry in self.state.log_history if "seconds" in entry]
        self.seconds_before = taken[-1] if taken else 0.0
        self._forget_between_curves()

    def _forget_between_curves(self) -> None:
        """Saving the optimizer of a sharded model gives it a state, by a step without gradients, if it has none."""
        if self.optimizer is not None and self.state.global_step % self.segment_steps == 0:
            self.optimizer.state.clear()


def check_sharding(accelerator: Accelerator, args: TSCConfig, objective: Objective) -> None:
    """Raises UsageError where the model would be sharded in a way that curves do not know."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UsageError(f"{kind.value} is not supported: start with --accelerate_config fsdp2, or multi_gpu")
    if kind != DistributedType.FSDP:
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            raise UsageError(
                f"FSDP was asked for, and accelerate would train as {kind.value}: it shards over several accelerators "
                "alone. Start with --accelerate_config multi_cpu on processors, or single_gpu"
            )
        return
    if not accelerator.is_fsdp2:
        raise UsageError("fsdp_version 1 is not supported: expected fsdp_version: 2, as in --accelerate_config fsdp2")
    if accelerator.state.fsdp_plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
        raise UsageError("expected fsdp_state_dict_type: SHARDED_STATE_DICT, as in --accelerate_config fsdp2")
    if objective.head is not None:
        raise UsageError(
            f"objective={args.objective} trains a projection head, which cannot be sharded with the curve: start "
            "with --accelerate_config multi_gpu"
        )
    if args.channels_last:
        raise UsageError("channels_last does not go with FSDP2, which shards tensors in their usual memory format")
