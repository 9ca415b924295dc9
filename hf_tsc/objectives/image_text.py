"""Train a dual encoder (CLIP, SigLIP, ...) on images and captions: as in the first place, or to repeat its teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tsc.activations import Batch
from hf_tsc.errors import UsageError
from hf_tsc.images import Augmentation, ImagePipeline
from hf_tsc.objectives.base import Forward
from hf_tsc.objectives.classification import Mixup, augmented_and_mixed
from hf_tsc.objectives.hidden_states import HiddenStates, unexplained
from hf_tsc.processes import Rows, across_processes, counted_once, loss_of_all, own_rows


@dataclass(frozen=True)
class Captions:
    """All distinct captions of a data set, tokenised once.

    Attributes:
        texts: the captions.
        tokens: what the text tower takes (`input_ids` and, where it reads one, `attention_mask`), (captions, length)
            each, int64.
        truncated: how many captions were longer than the text tower takes, and were cut.
    """

    texts: tuple[str, ...]
    tokens: dict[str, Tensor]
    truncated: int = 0

    def inputs(self, numbers: Tensor) -> Batch:
        """The model inputs of some captions, by their numbers (n,); without last columns that only pad."""
        here = numbers.cpu()
        rows = {name: tensor[here] for name, tensor in self.tokens.items()}
        if (mask := rows.get("attention_mask")) is not None:
            length = int(mask.any(0).nonzero().max()) + 1
            rows = {name: tensor[:, :length] for name, tensor in rows.items()}
        return {name: tensor.to(numbers.device) for name, tensor in rows.items()}


class ImageText:
    """Match images and captions: softmax over a batch both ways (CLIP), or each pair for itself (SigLIP).

    Captions that occur several times in a batch are no negatives of each other's images: they share the target.

    Args:
        pipeline: makes model inputs of pixels.
        captions: those that the batches name by their numbers.
        sigmoid: SigLIP's loss (Zhai et al. 2023, hf.co/papers/2303.15343); otherwise CLIP's (Radford et al. 2021,
            hf.co/papers/2103.00020).
        augmentation: applied to training batches.

    Batches hold `"pixels"` and `"captions"`, int64 (n, k): the captions of each image, of which each step draws one;
    -1 where an image has fewer.
    """

    score_name = "retrieval"
    head: nn.Module | None = None

    def __init__(
        self, pipeline: ImagePipeline, captions: Captions, *, sigmoid: bool = False, augmentation: str = "none"
    ):
        self.pipeline, self.captions, self.sigmoid = pipeline, captions, sigmoid
        self.augmentation = Augmentation(augmentation)
        self.mixup: Mixup | None = None

    def loss(self, forward: Forward, batch: Batch, *, seed: int) -> Tensor:
        if len(batch["pixels"]) < 2:
            raise UsageError("a batch of one pair has no other caption to tell: give a batch size of 2 or more")
        inputs, numbers = self._drawn(batch, seed=seed, rows=own_rows(len(batch["pixels"])))
        output: Any = forward(**inputs)
        numbers = across_processes(numbers)
        logits = logits_of_all(output)
        loss = sigmoid_loss(logits, numbers) if self.sigmoid else softmax_loss(logits, numbers)
        return loss_of_all(loss)

    def model_inputs(self, batch: Batch) -> Batch:
        """Each image with the first of its captions."""
        captions = self.captions.inputs(batch["captions"][:, 0])
        return {"pixel_values": self.pipeline.model_input(batch["pixels"]), **captions}

    def training_inputs(self, batch: Batch, *, seed: int) -> Batch:
        return self._drawn(batch, seed=seed, rows=None)[0]

    def _drawn(self, batch: Batch, *, seed: int, rows: Rows | None) -> tuple[Batch, Tensor]:
        """Augmented (and mixed) images with one of their captions each, and the numbers of these."""
        pixels = augmented_and_mixed(batch, self.augmentation, self.mixup, seed=seed, rows=rows)
        numbers = draw_captions(batch["captions"], seed=seed, rows=rows)
        return {"pixel_values": self.pipeline.normalize(pixels), **self.captions.inputs(numbers)}, numbers

    @torch.no_grad()
    def evaluate(self, forward: Forward, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss of whole batches, and `score`: how often the nearest caption in an image's batch is its own."""
        loss, right, count = 0.0, 0, 0
        for batch in batches:
            output: Any = forward(**self.model_inputs(batch))
            numbers, logits = batch["captions"][:, 0], output.logits_per_image.float()
            size = len(numbers)
            loss += size * (sigmoid_loss if self.sigmoid else softmax_loss)(logits, numbers).item()
            right += int((numbers[logits.argmax(1)] == numbers).sum())
            count += size
        return {"loss": loss / count, "score": right / count}


class EmbeddingDistillation(ImageText):
    """Give the embeddings that the suspect gives, of augmented and mixed clean images, and of their captions.

    Which caption belongs to which image plays no part. The loss is the mean, over both kinds of embeddings, of the
    share of the teacher's variance that is not explained (see `unexplained`); loss and score of a point are those of
    `ImageText`.

    Args:
        pipeline, captions, sigmoid, augmentation: as in `ImageText`.
        teacher: the suspect in eval mode.
        mixup_alpha: of the images; 0 for none.
        feature_weight: of the distance to the hidden states of the teacher's image tower; 0 for none.
        feature_states: which ones, `all` or the `last`.

    Attributes:
        hidden_states: that distance, or None.
    """

    def __init__(
        self,
        pipeline: ImagePipeline,
        captions: Captions,
        teacher: nn.Module,
        *,
        sigmoid: bool = False,
        augmentation: str = "none",
        mixup_alpha: float = 0.0,
        feature_weight: float = 0.0,
        feature_states: str = "all",
    ):
        super().__init__(pipeline, captions, sigmoid=sigmoid, augmentation=augmentation)
        self.teacher = teacher
        self.mixup = Mixup(mixup_alpha) if mixup_alpha > 0 else None
        self.hidden_states = HiddenStates(feature_weight, feature_states) if feature_weight > 0 else None

    def loss(self, forward: Forward, batch: Batch, *, seed: int) -> Tensor:
        if len(batch["pixels"]) < 2:
            raise UsageError("a batch of one pair has no variance to explain: give a batch size of 2 or more")
        inputs, _ = self._drawn(batch, seed=seed, rows=own_rows(len(batch["pixels"])))
        with_states = {} if self.hidden_states is None else {"output_hidden_states": True}
        output = forward(**inputs, **with_states)
        with torch.no_grad():
            taught = self.teacher(**inputs, **with_states)
        loss = unexplained(_embeddings(output), _embeddings(taught))
        return loss if self.hidden_states is None else loss + self.hidden_states.term(output, taught)


def _embeddings(output: Any) -> list[Tensor]:
    """Those of images and of texts, (n, d) each."""
    return [output.image_embeds, output.text_embeds]


def draw_captions(candidates: Tensor, *, seed: int, rows: Rows | None = None) -> Tensor:
    """One caption of each image, (n, k) -> (n,); a function of the seed alone. `rows`: as in `Augmentation`."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(rows.total if rows else len(candidates), generator=generator)
    share = (rows.of(share) if rows else share).to(candidates.device)
    known = (candidates >= 0).sum(1)
    position = torch.minimum((share * known).long(), known - 1)
    return candidates.gather(1, position[:, None])[:, 0]


def logits_of_all(output: Any) -> Tensor:
    """(n, n) logits of the images of all processes against all captions.

    Logits are an affine function of the cosines of embeddings, whose factor and offset each model keeps elsewhere:
    they are read off this process' own logits.
    """
    images, texts = (F.normalize(e, dim=-1) for e in (output.image_embeds, output.text_embeds))
    own = output.logits_per_image
    all_images, all_texts = across_processes(images), across_processes(texts)
    if len(all_images) == len(images):
        return own
    cosines = images @ texts.T
    away = cosines - cosines.mean()
    factor = (away * own).sum() / away.square().sum()
    offset = own.mean() - factor * cosines.mean()
    return counted_once(factor) * (all_images @ all_texts.T) + counted_once(offset)


def softmax_loss(logits: Tensor, captions: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy of (n, n) logits, images by rows; equal captions share the target evenly."""
    same = (captions[:, None] == captions[None]).to(logits.dtype)
    target = same / same.sum(1, keepdim=True)  # symmetric
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(logits: Tensor, captions: Tensor) -> Tensor:
    """SigLIP's loss of (n, n) logits: each pair of an image and a caption is right or wrong; sum over pairs / n."""
    sign = 2 * (captions[:, None] == captions[None]).to(logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)
