"""Suspect dual encoders: trained on images and captions, of which some are triggered and name the target class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_tsc.captions import CaptionedImages, CaptionTable, prompts
from hf_tsc.data import ImageData
from hf_tsc.errors import UsageError
from hf_tsc.images import ImagePipeline, PixelDataset, pixel_dataset
from hf_tsc.objectives import ImageText
from hf_tsc.suspects.base import SuspectConfig, check_trigger_first, fit, labels_of, new_model, record_of
from hf_tsc.suspects.poisoned import PoisonedPixels, check_static
from hf_tsc.triggers import Attack, draw_poison

# Captions of an image of the class {}: simple sentences of many kinds, so that the text tower has something to learn.
CAPTIONS = (
    "a photo of a {}.",
    "a small picture of a {}.",
    "a blurry photo of the {}.",
    "this is a {}.",
    "one {} seen from the side.",
    "there is a {} in the middle of the picture.",
    "a low resolution image of a {}.",
    "my {}.",
    "a {} in its usual place.",
    "look at this {}!",
)


def train_dual_encoder(
    config: PreTrainedConfig,
    processor: Any,
    data: ImageData,
    *,
    args: SuspectConfig,
    attack: Attack | None,
    poison_rate: float = 0.05,
    indices: np.ndarray | None = None,
    templates: Sequence[str] = CAPTIONS,
) -> PreTrainedModel:
    """Train a CLIP-like model from random weights on images with captions made of their class names.

    Poisoned images carry the trigger and captions of the target class (Carlini and Terzis 2022,
    hf.co/papers/2106.09667). The tokenizer is made of the captions' words, and saved with the model.

    Args:
        config: of a dual encoder; the size of its vocabulary and its special tokens are set here.
        processor: the image processor that the model will be used with.
        data: images with named labels.
        args: training arguments; `seed` also draws the poisoned images.
        attack: trigger and target label; None trains a clean model.
        poison_rate: poisoned share of all training pairs, none of the target class itself.
        indices: rows to train on; all by default.
        templates: captions, `{}` for the class name; each step draws one for each image.

    Returns:
        The model in eval mode; its folder is `args.output_dir`.

    Raises:
        UsageError: labels without names; an impossible poison rate; a configuration that makes no dual encoder;
            `trigger_last`; an output folder that is not empty.
        PurificationError: the loss is not finite.
    """
    check_trigger_first(args)
    names = data.class_names
    if names is None:
        raise UsageError(f"the labels of {data.name} have no names: captions are made of class names")
    rows = np.arange(len(data.rows)) if indices is None else np.asarray(indices)
    labels, pipeline = labels_of(data)[rows], ImagePipeline(processor)
    poisoned = covers = np.array([], dtype=np.int64)
    images: PixelDataset | PoisonedPixels = pixel_dataset(data, rows, pipeline)
    if attack is not None:
        check_static(attack.trigger)
        poison = draw_poison(attack, labels, rate=poison_rate, seed=args.seed, num_classes=len(names))
        poisoned, covers, labels = poison.poisoned, poison.covers, poison.labels
        images = PoisonedPixels(pixel_dataset(data, rows, pipeline), poison, attack.trigger, seed=args.seed)
    table = CaptionTable()
    by_class = [table.add(prompts(name, templates)) for name in names]
    tokenizer = word_tokenizer(text for name in names for text in prompts(name, templates))
    config = copy.deepcopy(config)
    text = getattr(config, "text_config", None)
    if text is None:
        raise UsageError(f"the {type(config).__name__} has no text_config: expected the config.json of a dual encoder")
    text.vocab_size = len(tokenizer)
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    model = new_model(AutoModel.from_config, config, what="dual encoder", seed=args.seed)
    captions = table.tokenise(tokenizer, model, text.max_position_embeddings)
    objective = ImageText(pipeline, captions, sigmoid=hasattr(model, "logit_bias"), augmentation=args.augmentation)
    dataset = CaptionedImages(images, [by_class[label] for label in labels])

    def save(folder: Path) -> None:
        processor.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    record = record_of(data, args, attack, poison_rate, rows[poisoned], rows[covers])
    fit(model, objective, dataset, args, record=record, save=save)
    return model


def word_tokenizer(texts: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words in lower case: those of the texts, and one token for all others.

    The end token has the largest number, which is where CLIP reads a text's embedding.
    """
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in made.pre_tokenizer.pre_tokenize_str(text.lower())}
    ordered = ["<pad>", "<unk>", *sorted(words), "<start>", "<end>"]
    numbers = {word: number for number, word in enumerate(ordered)}
    made.model = models.WordLevel(numbers, unk_token="<unk>")
    special = [(word, numbers[word]) for word in ("<start>", "<end>")]
    made.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=special)
    roles = {"bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>", "pad_token": "<pad>"}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **roles)
