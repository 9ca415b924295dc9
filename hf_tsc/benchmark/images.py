"""The images of a benchmark: one dataset with a train and a test split, opened once a process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import ViTImageProcessorPil

from hf_tsc.benchmark.plan import Cell
from hf_tsc.benchmark.suspect_plan import SuspectPlan
from hf_tsc.data import CleanSubset, ImageData, clean_subset
from hf_tsc.errors import UsageError
from hf_tsc.images import to_rgb
from hf_tsc.job import DataArguments

HASHED_IMAGES = 16


@dataclass(frozen=True)
class BenchmarkImages:
    """Where the images are; splits are opened when they are first needed."""

    arguments: DataArguments
    test_split: str = "test"

    @cached_property
    def train(self) -> ImageData:
        return _labelled(self.arguments.open())

    @cached_property
    def test(self) -> ImageData:
        return _labelled(self.arguments.open(self.test_split))

    @cached_property
    def hash(self) -> str:
        """Names the images, wherever they lie: of all labels, and of the pixels of some images of each split."""
        digest = hashlib.sha256()
        for data in (self.train, self.test):
            digest.update(np.asarray(data.labels, dtype="<i8").tobytes())
            for row in np.linspace(0, len(data.rows) - 1, HASHED_IMAGES).astype(int).tolist():
                digest.update(np.asarray(to_rgb(data.rows[row][data.image_column])).tobytes())
        return digest.hexdigest()[:10]

    def check(self, cell: Cell) -> None:
        """Raises UsageError where the dataset has fewer rows than the plan names."""
        for name, rows in cell.rows.items():
            data = self.train if name in ("suspect", "clean") else self.test
            if rows[1] > len(data.rows):
                raise UsageError(
                    f"the plan's rows of {name} end at {rows[1]}, and {data.name} has {len(data.rows)} in that split"
                )

    def clean_rows(self, cell: Cell) -> CleanSubset:
        """Rows of the train split to purify with and to measure on, as the cell's seed draws them."""
        first, last = cell.rows["clean"]
        labels = self.train.labels
        assert labels is not None
        drawn = clean_subset(
            labels[first:last], last - first, budget=cell.budget, held_out=cell.held_out, seed=cell.seed
        )
        return CleanSubset(train=drawn.train + first, held_out=drawn.held_out + first)


def _labelled(data: ImageData) -> ImageData:
    if data.label_column is None:
        raise UsageError(f"{data.name} has no label column: name one with --label_column_name")
    return data


def processor(plan: SuspectPlan) -> ViTImageProcessorPil:
    """The image processor that a suspect is trained and saved with."""
    return ViTImageProcessorPil(size={"height": plan.image_size, "width": plan.image_size})


def rows_of(bounds: tuple[int, int]) -> np.ndarray:
    """All rows of a range."""
    return np.arange(*bounds)
