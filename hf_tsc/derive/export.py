"""A model's graph, by `torch.export` on a copy without weights, reduced to the outputs that must not change."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from hf_tsc.errors import PurificationError
from hf_tsc.functional import forget_caches

# The outputs that must not change, by what the model returns: the first line that is there in full.
FIXED_OUTPUTS = (
    ("logits",),
    ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"),
    ("logits_per_video", "logits_per_text", "video_embeds", "text_embeds"),
    ("itm_score",),
    ("last_hidden_state", "pooler_output"),
    ("last_hidden_state",),
    ("feature_maps",),
)

EXPORT_LOGGER = "torch._subclasses.fake_tensor"
SIZE_INPUTS = ("spatial_shapes",)  # shapes inside of the model depend on their values, which a tensor hides


class _FixedOutputs(nn.Module):
    """The model reduced to the outputs that must not change; inputs that set sizes are written into its graph."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]):
        super().__init__()
        self.model = model
        self.sizes = {name: inputs[name].cpu().numpy() for name in SIZE_INPUTS if name in inputs}

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        return fixed_outputs(self.model(**inputs, **self.sizes))


def fixed_outputs(output: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The tensors of a model's output that every permutation keeps.

    Raises:
        PurificationError: the output has none of the known kinds.
    """
    for names in FIXED_OUTPUTS:
        if all(isinstance(output.get(name), Tensor | tuple) for name in names):
            found = [output[name] for name in names]
            return tuple(tensor for one in found for tensor in (one if isinstance(one, tuple) else (one,)))
    raise PurificationError(
        f"the model returns {sorted(output)}: expected logits, image and text embeddings or a last hidden state"
    )


def export_graph(model: nn.Module, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    """The graph of a model's fixed outputs in float64; the names in it begin with `model.`.

    Raises:
        PurificationError: the graph cannot be exported.
    """
    wrapped = _FixedOutputs(_meta_copy(model), inputs).eval()
    meta = {name: _on_meta(tensor) for name, tensor in inputs.items() if name not in SIZE_INPUTS}
    try:
        with torch.no_grad(), _whole_attention(), _silent(EXPORT_LOGGER), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attributes? ")  # caches: they are forgotten
            return torch.export.export(wrapped, (), meta, strict=False)
    except Exception as error:  # torch.export raises many types; each means the same here
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PurificationError(
            f"the graph of {type(model).__name__} cannot be exported, so its symmetries are unknown: {line}; "
            f"a spec can be written by hand and registered with hf_tsc.register_spec"
        ) from error


def _meta_copy(model: nn.Module) -> nn.Module:
    """A float64 copy without weights: what is float32 in its graph has been cast."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(tensor): _on_meta(tensor) for tensor in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=False) for p in model.parameters()}
    duplicate = copy.deepcopy(model, memo)
    forget_caches(duplicate)
    return duplicate


def _on_meta(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, device="meta", dtype=dtype)


@contextmanager
def _whole_attention() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` from calling its fused kernel, whose axes cannot be followed."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep a logger from printing the pages that come before the exception, which says it all."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
