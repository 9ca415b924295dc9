"""The two towers of a dual encoder: what embeds images, and what embeds texts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hf_tsc.errors import UsageError
from hf_tsc.permutation import PermutationSpec

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = get_args(Tower)


@torch.enable_grad()
def parameters_by_tower(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[Tower, set[str]]:
    """The names of the parameters that the embeddings of one tower depend on, and those of the other do not.

    What both or neither depend on (a temperature) is in no tower.

    Args:
        model: a dual encoder; its parameters require gradients.
        inputs: for which it gives `image_embeds` and `text_embeds`.

    Raises:
        UsageError: it gives none.
    """
    output: Any = model(**inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    reached = dict[Tower, set[str]]()
    for tower in TOWERS:
        embeddings = getattr(output, f"{tower}_embeds", None)
        if embeddings is None:
            raise UsageError(
                f"{type(model).__name__} has no {tower} tower: leave move_towers and train_towers out, which are for "
                "image-text dual encoders"
            )
        gradients = torch.autograd.grad(embeddings.sum(), parameters, allow_unused=True, retain_graph=True)
        reached[tower] = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    return {"image": reached["image"] - reached["text"], "text": reached["text"] - reached["image"]}


def spaces_clear_of(spec: PermutationSpec, tensors: Collection[str]) -> set[str]:
    """The names of the spaces that act on none of these tensors."""
    return {space for space in spec.spaces if not any(name in tensors for name, _ in spec.members(space))}
