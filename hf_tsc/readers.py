"""How classes are read off networks without a classifier: a linear probe for encoders, prompts for dual encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hf_tsc.errors import UsageError
from hf_tsc.evaluation import Predict, Reader, map_batches
from hf_tsc.images import PixelDataset
from hf_tsc.objectives import Captions, Forward, features_of


class LinearProbe:
    """Logistic regression on frozen, standardised features, fitted anew for every network.

    Args:
        dataset: labelled clean images to fit on: not those that are measured, nor those that the network was purified
            with.
        strength: inverse of the regularisation, C of scikit-learn's `LogisticRegression`.

    Raises:
        UsageError: no labels.
    """

    def __init__(self, dataset: PixelDataset, *, strength: float = 0.316):  # CLIP's README
        if dataset.labels is None:
            raise UsageError("a linear probe needs labelled images to be fitted on: name a label column")
        self.dataset, self.strength = dataset, strength

    def __call__(self, forward: Forward, device: str | torch.device) -> Predict:
        """Fit on the features of `forward`."""
        features = map_batches(lambda inputs: features_of(forward, inputs), self.dataset, device=device)
        probe: Any = make_pipeline(StandardScaler(), LogisticRegression(C=self.strength, max_iter=1000))
        probe.fit(features.double().numpy(), self.dataset.labels)

        def predict(inputs: Tensor) -> Tensor:
            found = probe.predict(features_of(forward, inputs).double().cpu().numpy())
            return torch.from_numpy(found).to(torch.int64)

        return predict


class ZeroShot:
    """The class whose prompts, on average, lie nearest to the image in a dual encoder's joint space.

    Args:
        captions: prompts of all classes.
        classes: the numbers of each class' prompts in `captions`.
        blank: (1, 3, H, W), any image of the right size: a dual encoder wants one beside its texts.
    """

    def __init__(self, captions: Captions, classes: Sequence[Sequence[int]], blank: Tensor):
        self.captions, self.classes, self.blank = captions, [torch.tensor(list(numbers)) for numbers in classes], blank

    @torch.no_grad()
    def __call__(self, forward: Forward, device: str | torch.device) -> Predict:
        """Embed the prompts with `forward`."""
        blank = self.blank.to(device)
        prompts = [text_embeddings(forward, numbers.to(device), self.captions, blank) for numbers in self.classes]
        classes = torch.stack([F.normalize(embeddings.mean(0), dim=-1) for embeddings in prompts])
        return lambda inputs: (image_embeddings(forward, inputs, self.captions) @ classes.T).argmax(-1)


class ReadOnce:
    """A reader that fits once for a network that is measured on several sets of images in a row.

    A probe takes longer to fit than to ask, and the weights of what is measured do not change meanwhile.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self.last: tuple[Forward, Predict] | None = None

    def __call__(self, forward: Forward, device: str | torch.device) -> Predict:
        if self.last is None or self.last[0] is not forward:
            self.last = (forward, self.reader(forward, device))
        return self.last[1]


def image_embeddings(forward: Forward, inputs: Tensor, captions: Captions) -> Tensor:
    """(n, d) unit vectors of images; a dual encoder wants a text beside them, any will do."""
    text = captions.inputs(torch.zeros(1, dtype=torch.int64, device=inputs.device))
    output: Any = forward(pixel_values=inputs, **text)
    return F.normalize(output.image_embeds, dim=-1)


def text_embeddings(forward: Forward, numbers: Tensor, captions: Captions, blank: Tensor) -> Tensor:
    """(n, d) unit vectors of captions, by their numbers (n,); `blank` (1, 3, H, W) is any image."""
    output: Any = forward(pixel_values=blank, **captions.inputs(numbers))
    return F.normalize(output.text_embeds, dim=-1)
