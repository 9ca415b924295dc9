"""The clean images: loading a dataset, finding its columns, checking its classes and drawing the clean subset."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets.config
import numpy as np
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx

from hf_tsc.errors import UsageError
from hf_tsc.hub.retry import WAITS, HubUnavailableError, ask_hub, seconds_asked, wait_for_another
from hf_tsc.hub.source import is_folder

SAVED_DATASET, SAVED_DATASET_DICT = "state.json", "dataset_dict.json"  # what `save_to_disk` leaves
MOST_SHARED = 0.01  # of the measured images, with those that were used otherwise
# Of `datasets` and of the Hub's client, for what is missing or wrong; an IndexError for a saved dataset without rows.
LOADING_ERRORS = (
    DatasetsError,
    FileNotFoundError,
    ConnectionError,
    ValueError,
    IndexError,
    RuntimeError,  # for a script; a RecursionError
    yaml.YAMLError,  # in a card
    hub_errors.HfHubHTTPError,
    httpx.TransportError,
)


@dataclass(frozen=True)
class CleanSubset:
    """Sorted, disjoint rows of a dataset: `train` to purify with, `held_out` to choose the curve point with."""

    train: np.ndarray
    held_out: np.ndarray

    @property
    def used(self) -> np.ndarray:
        """Both, one after the other."""
        return np.concatenate([self.train, self.held_out])


def load_images(
    name_or_path: str,
    *,
    config_name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    token: str | bool | None = False,
) -> Dataset:
    """Load one split of a dataset of images.

    Args:
        name_or_path: an id on the Hub, a local folder (images by class, parquet, ...) or a `save_to_disk` folder.
        config_name: the dataset's configuration, for an id with several.
        split: a split or slice, such as `"train"` or `"train[:500]"` (the **first** 500); None takes `"train"`, else
            the only split.
        revision: branch, tag or commit of the id.
        token: sent to the Hub; False sends none, None or True the saved one.

    Raises:
        UsageError: there is no such dataset, configuration, revision or split, or None leaves a choice.
        HubUnavailableError: the Hub did not answer, and the cache does not hold the dataset.
    """
    path = Path(name_or_path)
    if is_folder(name_or_path) and not path.exists():
        raise UsageError(
            f"The dataset {name_or_path!r} cannot be loaded: there is no such folder. Expected a folder of images, "
            "parquet or save_to_disk; a dataset of the Hub goes by its id."
        )
    saved = (path / SAVED_DATASET).is_file() or (path / SAVED_DATASET_DICT).is_file()
    if saved and (config_name is not None or revision is not None):
        raise UsageError(f"{name_or_path} was saved by save_to_disk: it has no config_name or revision to choose.")
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # at a server that is not the Hub
    asked = f"(config_name={config_name}, split={split}, revision={revision})"
    for wait in (*WAITS, None):
        try:
            if saved:
                return _choose_split(load_from_disk(name_or_path), split, name_or_path)
            loaded = load_dataset(name_or_path, config_name, split=split, revision=revision, token=token)
            break
        except LOADING_ERRORS as error:
            if saved and isinstance(error, IndexError):
                raise _without_rows(name_or_path) from error
            reason = " ".join(str(error).split())[:300]
            passing = None if path.exists() else _passing(error)
            if passing is None:
                raise UsageError(
                    f"The dataset {name_or_path!r} {asked} cannot be loaded: {reason}. Expected a dataset id of the "
                    "Hub, or a folder of images, parquet or save_to_disk."
                ) from error
            if not wait_for_another(passing, wait):
                raise HubUnavailableError(
                    f"The dataset {name_or_path!r} {asked} could not be loaded: {reason}. Try again later; for a "
                    f"folder of that name write ./{name_or_path}."
                ) from error
    return loaded if split is not None else _choose_split(loaded, split, name_or_path)


def _passing(error: BaseException) -> Exception | None:
    """The error of the Hub's client behind one of `datasets`, if it may pass."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, hub_errors.HfHubHTTPError | httpx.TransportError) and seconds_asked(seen) is not None:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def pin_dataset(name: str, revision: str | None = None, *, token: str | bool | None = False) -> str | None:
    """The commit of a dataset on the Hub; None for a folder, and for what the Hub does not know under that name.

    Raises:
        HubUnavailableError: the Hub did not answer.
    """
    if Path(name).exists():
        return None
    try:
        info = ask_hub(f"find {name}", name, lambda: HfApi(token=token).dataset_info(name, revision=revision))
    except UsageError:  # `load_images` says more of it
        return None
    return info.sha


def _without_rows(name: str) -> UsageError:
    return UsageError(f"{name} has no rows: expected images.")


def find_columns(
    features: Features, *, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str | None]:
    """Find the column of pictures and the column of classes by their types, unless they are named.

    Args:
        features: of the dataset.
        image_column: name of a column of type `Image`.
        label_column: name of a column of type `ClassLabel`, or of integers.

    Returns:
        The names of both columns; None for the second if no column is a `ClassLabel`.

    Raises:
        UsageError: a named column is missing or of another type, several columns fit, or none is an image.
    """
    image = _find_column(features, Image, named=image_column, option="image_column_name")
    if image is None:
        raise UsageError(
            f"No column is of type Image, the columns are {list(features)}; cast one: "
            "dataset.cast_column(name, datasets.Image())."
        )
    return image, _find_column(features, ClassLabel, named=label_column, option="label_column_name")


def check_classes(names: list[str] | None, num_classes_in_labels: int, id2label: dict[int, str]) -> str | None:
    """Check that label i means the same class in the dataset and in the model.

    Args:
        names: the dataset's class names in order; None if its labels are bare integers.
        num_classes_in_labels: the greatest label + 1.
        id2label: the model's class names.

    Returns:
        None if the names agree, up to case, outer blanks and `_` for a blank; a note if there were none to compare.

    Raises:
        UsageError: the names or the number of classes differ, or a label is none of the model's.
    """
    if num_classes_in_labels > len(id2label):
        raise UsageError(
            f"The dataset has the label {num_classes_in_labels - 1}, but the model's {len(id2label)} labels are "
            f"0..{len(id2label) - 1}; use the dataset that the model was trained for."
        )
    if names is None:
        return f"The dataset's labels have no names: not checked that they mean the model's {len(id2label)} classes."
    if len(names) != len(id2label):
        raise UsageError(
            f"The dataset has {len(names)} classes, the model {len(id2label)}; use the dataset that the model was "
            "trained for."
        )
    model_names = [id2label[label] for label in sorted(id2label)]
    if all(re.fullmatch(r"LABEL_\d+", name) for name in model_names):
        return f"The model's classes have no names: only their number, {len(names)}, was checked."
    for label, (ours, theirs) in enumerate(zip(names, model_names, strict=True)):
        if _plain(ours) != _plain(theirs):
            raise UsageError(
                f"Class {label} is {ours!r} in the dataset and {theirs!r} in the model; bring the labels into the "
                "model's order: dataset.align_labels_with_mapping(model.config.label2id, label_column)."
            )
    return None


def parse_budget(text: str) -> int | float:
    """Read `"2500"` as 2500 images, `"0.05"` and `"5%"` as the share 0.05.

    Raises:
        UsageError: anything else, or a number out of range.
    """
    match = re.fullmatch(r"(?P<number>\d+|\d*\.\d+|\d+\.)(?P<percent>%?)", text.strip())
    if match is None:
        raise UsageError(f"Got budget={text!r}, expected a number of images (2500) or a share (5% or 0.05).")
    number = match["number"]
    if match["percent"]:
        budget: int | float = float(number) / 100
    else:
        budget = float(number) if "." in number else int(number)
    _check_budget(budget)
    return budget


def clean_subset(
    labels: np.ndarray | None, n: int, *, budget: int | float, held_out: float = 0.2, seed: int
) -> CleanSubset:
    """Draw the clean subset of n images and set a part of it aside; by class, in proportion, if there are labels.

    Args:
        labels: (n,) class of each image, or None.
        n: number of images to draw from.
        budget: an integer is a number of images, a float in (0, 1] a share of n; both parts together.
        held_out: share of the subset that is set aside, in [0, 1).
        seed: of the draw.

    Returns:
        The rows of both parts. With labels, each class has its proportional share of them by largest remainder, and at
        least one image in `train`.

    Raises:
        UsageError: the budget is out of range, more than n, or too small for one training image a class.
    """
    _check_budget(budget)
    if not 0 <= held_out < 1:
        raise UsageError(f"Got held_out={held_out}, expected a share of the clean subset in [0, 1).")
    total = round(budget * n) if isinstance(budget, float) else int(budget)
    num_train = total - round(held_out * total)
    classes = [np.arange(n)] if labels is None else _rows_by_class(labels, n)
    if total > n:
        raise UsageError(f"Got budget={budget}, expected at most the dataset's {n} images.")
    if num_train < len(classes):
        raise UsageError(
            f"budget={budget} of {n} images, with held_out={held_out}, leaves {num_train} to train on, expected at "
            f"least {len(classes)}, one for each class in the dataset; raise the budget."
        )
    return _draw(classes, total, num_train, np.random.default_rng(seed))


def indices_hash(indices: Sequence[int] | np.ndarray) -> str:
    """Return the sha256 (hex) of the indices in their order, as little-endian int64: names a subset in a card."""
    return hashlib.sha256(np.asarray(indices, dtype="<i8").tobytes()).hexdigest()


def _choose_split(loaded: Dataset | DatasetDict, split: str | None, name_or_path: str) -> Dataset:
    if isinstance(loaded, Dataset):
        if split is None or split == str(loaded.split):
            return loaded
        raise UsageError(f"Got split={split!r}, but {name_or_path} is one dataset saved without splits; leave it out.")
    wanted = split or ("train" if "train" in loaded else next(iter(loaded)))
    if wanted not in loaded or (split is None and wanted != "train" and len(loaded) > 1):
        raise UsageError(f"Got split={split}, but {name_or_path} has the splits {list(loaded)}; choose one.")
    return loaded[wanted]


def _find_column(features: Features, kind: type, *, named: str | None, option: str) -> str | None:
    if named is not None:
        return _check_column(features, kind, named, option)
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) > 1:
        raise UsageError(f"The columns {found} are all of type {kind.__name__}; choose one with --{option}.")
    return found[0] if found else None


def _check_column(features: Features, kind: type, named: str, option: str) -> str:
    if named not in features:
        raise UsageError(f"Got --{option} {named}, expected one of the columns {list(features)}.")
    feature = features[named]
    is_integer = isinstance(feature, Value) and "int" in feature.dtype
    if not isinstance(feature, kind) and not (kind is ClassLabel and is_integer):
        wanted = "a ClassLabel, or integers" if kind is ClassLabel else f"the type {kind.__name__}"
        raise UsageError(f"Got --{option} {named}, which is {feature}, expected {wanted}.")
    return named


def _plain(name: str) -> str:
    return name.strip().replace("_", " ").casefold()


def _check_budget(budget: int | float) -> None:
    if budget <= 0 or (isinstance(budget, float) and budget > 1):
        raise UsageError(f"Got budget={budget}, expected a positive number of images or a share in (0, 1].")


def _rows_by_class(labels: np.ndarray, n: int) -> list[np.ndarray]:
    if labels.shape != (n,):
        raise UsageError(f"Got labels of shape {labels.shape}, expected ({n},), one for each image.")
    if (missing := np.flatnonzero(labels < 0)).size:
        raise UsageError(
            f"{missing.size} image(s) have a negative label, the first at index {missing[0]}; choose a split with "
            "labels, or leave the label column out."
        )
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def _draw(classes: list[np.ndarray], total: int, num_train: int, rng: np.random.Generator) -> CleanSubset:
    in_subset = _apportion(np.array([len(rows) for rows in classes]), total)
    in_train = _apportion(in_subset, num_train)
    train, held_out = [], []
    for rows, subset_size, train_size in zip(classes, in_subset, in_train, strict=True):
        drawn = rng.permutation(rows)[:subset_size]
        train.append(drawn[:train_size])
        held_out.append(drawn[train_size:])
    return CleanSubset(train=np.sort(np.concatenate(train)), held_out=np.sort(np.concatenate(held_out)))


def _apportion(sizes: np.ndarray, total: int) -> np.ndarray:
    """Share `total` out in proportion to `sizes` (k,), at least 1 each, by largest remainder.

    Expects k <= total <= sum(sizes). Each gets its quota rounded down, then one more goes to whoever is farthest below
    its quota until all is given out; where raising the small ones to 1 gave out too much, it is taken one by one from
    whoever is farthest above its quota.
    """
    quota = sizes * (total / sizes.sum())
    shares = np.maximum(1, np.floor(quota)).astype(np.int64)
    while (missing := total - shares.sum()) != 0:
        if missing > 0:
            shares[np.argmax(np.where(shares < sizes, quota - shares, -np.inf))] += 1
        else:
            shares[np.argmax(np.where(shares > 1, shares - quota, -np.inf))] -= 1
    return shares


@dataclass(frozen=True)
class ImageData:
    """One split of a dataset whose columns are known.

    Attributes:
        name: how the user named it.
        rows: the split.
        image_column, label_column: `label_column` is None for unlabelled data.
        caption_column: where it was named.
        config_name: its configuration, where one was named.
        place: `hub`, `folder`, or `memory` for a loaded dataset.
        revision: its commit on the Hub; None for other places.
        notes: what a reader of the report should know of how it came.
    """

    name: str
    rows: Dataset
    image_column: str
    label_column: str | None
    caption_column: str | None = None
    config_name: str | None = None
    place: str = "memory"
    revision: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (n,), or None.

        Raises:
            UsageError: a row has no label.
        """
        if self.label_column is None:
            return None
        values = self.rows[self.label_column][:]
        if any(value is None for value in values):
            raise UsageError(f"Column {self.label_column!r} of {self.name} has rows without a label; remove them.")
        return np.asarray(values, dtype=np.int64)

    @property
    def class_names(self) -> list[str] | None:
        """The names of a `ClassLabel` column; None for plain integers or unlabelled data."""
        feature = self.rows.features[self.label_column] if self.label_column else None
        return feature.names if isinstance(feature, ClassLabel) else None

    def describe(self) -> dict[str, str | int | None]:
        """What identifies the rows, for a report: never the place of a local folder."""
        return {
            "name": Path(self.name).resolve().name if Path(self.name).exists() else self.name,
            "place": self.place,
            "config_name": self.config_name,
            "revision": self.revision,
            "split": str(self.rows.split) if self.rows.split else None,
            "fingerprint": self.rows._fingerprint,
            "rows": len(self.rows),
            "image_column": self.image_column,
            "label_column": self.label_column,
            "caption_column": self.caption_column,
        }


def open_images(
    dataset: str | Dataset,
    *,
    config_name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    token: str | bool | None = False,
) -> ImageData:
    """Load a dataset, unless it is one already, and find its columns; see `load_images` and `find_columns`.

    A dataset of the Hub is pinned to one commit first. A `caption_column` is only looked at by who needs captions.
    """
    commit: str | None = None
    notes: tuple[str, ...] = ()
    place = "memory"
    if isinstance(dataset, str):
        dataset = str(Path(dataset).expanduser()) if dataset.startswith("~") else dataset
        try:
            commit = pin_dataset(dataset, revision, token=token)
        except HubUnavailableError:
            notes = (f"The Hub did not answer: a copy of {dataset} in the cache was used, of an unknown commit.",)
        name, where = dataset, {"config_name": config_name, "split": split, "revision": commit or revision}
        rows = load_images(dataset, token=token, **where)
        place = "folder" if Path(dataset).exists() else "hub"
    else:
        rows = dataset if dataset.format["type"] is None else dataset.with_format(None)
        name = rows.info.dataset_name or "dataset"
    if len(rows) == 0:
        raise _without_rows(name)
    image, label = find_columns(rows.features, image_column=image_column, label_column=label_column)
    return ImageData(name, rows, image, label, caption_column, config_name, place, commit, notes)


def check_apart(measured: ImageData, used: ImageData, rows: np.ndarray, purpose: str) -> list[str]:
    """See that images a model is measured on were not used for something else: to purify it, to fit a probe.

    Images are compared as they are stored, byte by byte, or by the path of their file where a folder holds them:
    copies in another format, size or folder are not seen.

    Args:
        measured: the images that are measured on, all of them.
        used: where the others come from.
        rows: which of them were used.
        purpose: what for, as a message says it.

    Returns:
        A note for the report where there are some, as data sets have copies of their own; or nothing.

    Raises:
        UsageError: both are the same images, or those used are more than 1 % of those measured.
    """
    if measured.rows._fingerprint == used.rows._fingerprint:
        raise UsageError(
            f"the images of {measured.name} that are measured on are those used {purpose}: name another split"
        )
    known = set(_stored_images(used, rows))
    shared = sum(image in known for image in _stored_images(measured))
    told = f"{shared} of the {len(measured.rows)} images of {measured.name} that are measured on were used {purpose}"
    if shared > MOST_SHARED * len(measured.rows):
        raise UsageError(f"{told}: name a split, or a part of it, without them")
    return [f"{told}."] if shared else []


def _stored_images(data: ImageData, rows: np.ndarray | None = None) -> Iterator[bytes | str]:
    """A hash of each image's file, or the path of one that is not in the data set itself."""
    column = data.rows.select_columns([data.image_column]).cast_column(data.image_column, Image(decode=False))
    for row in column if rows is None else column.select(rows):
        if (stored := row[data.image_column]) is None:
            continue  # refused where it is read
        yield stored["path"] if stored["bytes"] is None else hashlib.sha256(stored["bytes"]).digest()
