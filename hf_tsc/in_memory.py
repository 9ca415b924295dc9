"""A model as a plain module."""

from __future__ import annotations

from typing import Any

from torch import nn


class InMemory(nn.Module):
    """A model whose checkpoints have the names that it has in memory.

    transformers 5.23 writes a `PreTrainedModel`'s checkpoints with the names of the Hub, and does not find them again
    when a Trainer goes on from there.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As of the model."""
        self.model.activation_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]
