"""Loading local datasets, columns, classes and the clean subset."""

import hashlib

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from hf_tsc.data import (
    check_apart,
    check_classes,
    clean_subset,
    find_columns,
    indices_hash,
    load_images,
    open_images,
    parse_budget,
)
from hf_tsc.errors import UsageError

FEATURES = Features({"img": Image(), "label": ClassLabel(names=["cat", "dog"])})


def small_dataset(n: int) -> Dataset:
    pictures = [PILImage.new("RGB", (4, 4), (i, i, i)) for i in range(n)]
    return Dataset.from_dict({"img": pictures, "label": [i % 2 for i in range(n)]}, features=FEATURES)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    small_dataset(6).to_parquet(folder / "train.parquet")
    small_dataset(4).to_parquet(folder / "test.parquet")
    return str(folder)


class TestLoadImages:
    @pytest.mark.parametrize(("split", "rows"), [(None, 6), ("train", 6), ("test", 4), ("train[:3]", 3)])
    def test_parquet_folder(self, parquet, split, rows):
        dataset = load_images(parquet, split=split)
        assert len(dataset) == rows
        assert dataset[1]["img"].getpixel((0, 0)) == (1, 1, 1)

    def test_folder_of_images_by_class(self, tmp_path):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir()
            PILImage.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
        dataset = load_images(str(tmp_path))
        assert find_columns(dataset.features) == ("image", "label")
        assert dataset.features["label"].names == ["cat", "dog"]

    def test_saved_dataset(self, tmp_path):
        small_dataset(3).save_to_disk(tmp_path)
        assert len(load_images(str(tmp_path))) == 3
        with pytest.raises(UsageError, match=r"split='train', but .* is one dataset saved without splits"):
            load_images(str(tmp_path), split="train")
        with pytest.raises(UsageError, match="saved by save_to_disk: it has no config_name or revision"):
            load_images(str(tmp_path), revision="main")

    def test_saved_without_rows(self, tmp_path):
        small_dataset(3).select([]).save_to_disk(tmp_path / "empty")
        with pytest.raises(UsageError, match=r"empty has no rows: expected images\."):
            open_images(str(tmp_path / "empty"))

    def test_saved_splits(self, tmp_path):
        splits = DatasetDict({"validation": small_dataset(3), "test": small_dataset(5)})
        splits.save_to_disk(tmp_path / "both")
        with pytest.raises(
            UsageError, match=r"split=None, but .* has the splits \['validation', 'test'\]; choose one"
        ):
            load_images(str(tmp_path / "both"))
        with pytest.raises(UsageError, match=r"split=train, but .* has the splits"):
            load_images(str(tmp_path / "both"), split="train")
        assert len(load_images(str(tmp_path / "both"), split="test")) == 5
        DatasetDict({"test": small_dataset(5)}).save_to_disk(tmp_path / "one")
        assert len(load_images(str(tmp_path / "one"))) == 5
        DatasetDict(splits | {"train": small_dataset(7)}).save_to_disk(tmp_path / "train")
        assert len(load_images(str(tmp_path / "train"))) == 7

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"split": "nope"}, "Unknown split"), ({"config_name": "nope"}, "BuilderConfig 'nope' not found")],
    )
    def test_wrong_split_or_configuration(self, parquet, options, message):
        with pytest.raises(UsageError, match=f"cannot be loaded: {message}.*Expected a dataset id"):
            load_images(parquet, **options)

    def test_no_dataset_there(self, tmp_path):
        for missing in ("./no-such-folder", str(tmp_path / "none")):
            with pytest.raises(UsageError, match=f"The dataset '{missing}' cannot be loaded: there is no such folder"):
                load_images(missing)
        for missing in (str(tmp_path), "nobody/no-such-dataset"):
            with pytest.raises(UsageError, match=f"The dataset '{missing}' .* cannot be loaded"):
                load_images(missing)


class TestFindColumns:
    TWO_LABELS = Features(
        FEATURES | {"coarse": ClassLabel(num_classes=2), "number": Value("int64"), "text": Value("string")}
    )

    def test_by_type(self):
        assert find_columns(FEATURES) == ("img", "label")
        assert find_columns(Features({"number": Value("int64"), "picture": Image()})) == ("picture", None)

    @pytest.mark.parametrize("label_column", ["coarse", "label", "number"])
    def test_named_label_column(self, label_column):
        assert find_columns(self.TWO_LABELS, label_column=label_column) == ("img", label_column)

    def test_named_image_column(self):
        two = Features(FEATURES | {"depth": Image()})
        assert find_columns(two, image_column="depth") == ("depth", "label")
        with pytest.raises(UsageError, match=r"\['img', 'depth'\] are all of type Image; .* --image_column_name"):
            find_columns(two)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, r"\['label', 'coarse'\] are all of type ClassLabel; choose one with --label_column_name"),
            ({"label_column": "fine"}, r"--label_column_name fine, expected one of the columns \['img'"),
            ({"label_column": "text"}, "--label_column_name text, which is Value.*expected a ClassLabel, or integers"),
            ({"label_column": "img"}, "--label_column_name img, which is Image"),
            ({"image_column": "number", "label_column": "label"}, "--image_column_name number, .* the type Image"),
        ],
    )
    def test_wrong_columns_are_named(self, options, message):
        with pytest.raises(UsageError, match=message):
            find_columns(self.TWO_LABELS, **options)

    def test_no_image(self):
        with pytest.raises(UsageError, match=r"No column is of type Image, the columns are \['label'\]"):
            find_columns(Features({"label": ClassLabel(num_classes=2)}))


MODEL = {0: "great_white shark", 1: "Cat", 2: "dog"}


class TestCheckClasses:
    def test_equal_names_need_no_note(self):
        assert check_classes(["Great white shark", " cat", "dog"], 3, MODEL) is None
        shuffled = {2: "dog", 0: "great_white shark", 1: "Cat"}
        assert check_classes(["great white shark", "cat", "dog"], 2, shuffled) is None

    @pytest.mark.parametrize(
        ("names", "greatest", "message"),
        [
            (["great white shark", "dog", "cat"], 3, "Class 1 is 'dog' in the dataset and 'Cat' in the model"),
            (["cat", "dog"], 2, "The dataset has 2 classes, the model 3"),
            (None, 4, r"has the label 3, but the model's 3 labels are 0\.\.2"),
            (["great white shark", "cat", "dog"], 4, "has the label 3"),
        ],
    )
    def test_other_classes_are_refused(self, names, greatest, message):
        with pytest.raises(UsageError, match=message):
            check_classes(names, greatest, MODEL)

    def test_without_names_only_the_count_is_compared(self):
        nameless = {0: "LABEL_0", 1: "LABEL_1"}
        assert "only their number, 2, was checked" in check_classes(["cat", "dog"], 2, nameless)
        assert "labels have no names" in check_classes(None, 3, MODEL)
        assert "labels have no names" in check_classes(None, 1, nameless)
        with pytest.raises(UsageError, match="The dataset has 3 classes, the model 2"):
            check_classes(["cat", "dog", "cow"], 2, nameless)


class TestBudget:
    @pytest.mark.parametrize(
        ("text", "budget"),
        [("2500", 2500), ("5%", 0.05), ("0.05", 0.05), (" 100% ", 1.0), ("1", 1), ("1.0", 1.0), (".5", 0.5)],
    )
    def test_parse(self, text, budget):
        parsed = parse_budget(text)
        assert parsed == budget
        assert type(parsed) is type(budget)

    @pytest.mark.parametrize("text", ["", "some", "-5", "5 %%", "1e3", "%", ".", "nan"])
    def test_nonsense(self, text):
        with pytest.raises(UsageError, match="expected a number of images"):
            parse_budget(text)

    @pytest.mark.parametrize("text", ["0", "0%", "101%", "2500.5", "0.0"])
    def test_out_of_range(self, text):
        with pytest.raises(UsageError, match=r"expected a positive number of images or a share in \(0, 1\]"):
            parse_budget(text)


class TestCleanSubset:
    LABELS = load_digits().target  # 1,797 images, 174 to 183 a class

    @pytest.mark.parametrize(("budget", "total"), [(100, 100), (0.1, 180), (1.0, 1797), (13, 13), (1797, 1797)])
    @pytest.mark.parametrize("labelled", [True, False])
    def test_parts_are_sorted_unique_disjoint_and_of_the_right_size(self, budget, total, labelled):
        subset = clean_subset(self.LABELS if labelled else None, 1797, budget=budget, seed=0)
        together = np.concatenate([subset.train, subset.held_out])
        assert len(np.unique(together)) == len(together) == total
        assert len(subset.held_out) == round(0.2 * total)
        for part in (subset.train, subset.held_out):
            assert np.array_equal(part, np.sort(part))
            assert part.dtype == np.int64
        assert together.min() >= 0
        assert together.max() < 1797

    @pytest.mark.parametrize("budget", [50, 333, 0.5])
    def test_classes_are_in_proportion(self, budget):
        subset = clean_subset(self.LABELS, 1797, budget=budget, seed=0)
        total = len(subset.train) + len(subset.held_out)
        counts = np.bincount(self.LABELS)
        both = np.bincount(self.LABELS[np.concatenate([subset.train, subset.held_out])], minlength=10)
        train = np.bincount(self.LABELS[subset.train], minlength=10)
        assert (np.abs(both - counts * total / 1797) < 1).all()
        assert (np.abs(train - both * len(subset.train) / total) < 1).all()

    @pytest.mark.parametrize("held_out", [0.0, 0.1, 0.5])
    def test_the_sizes_are_exact_for_uneven_classes(self, held_out):
        labels = np.repeat(np.arange(6), [300, 7, 41, 1, 90, 2])
        for budget in range(12, 442, 13):
            subset = clean_subset(labels, 441, budget=budget, held_out=held_out, seed=budget)
            assert len(subset.held_out) == round(held_out * budget)
            assert len(subset.train) == budget - len(subset.held_out)
            assert len(np.unique(labels[subset.train])) == 6

    def test_largest_remainder_by_hand(self):
        labels = np.repeat([0, 1, 2], [50, 30, 20])  # quotas of 16: 8, 4.8, 3.2
        assert np.bincount(labels[clean_subset(labels, 100, budget=16, held_out=0.0, seed=0).train]).tolist() == [
            8,
            5,
            3,
        ]

    def test_a_rare_class_is_in_train(self):
        labels = np.repeat([0, 3, 5], [996, 3, 1])  # labels may have gaps
        for seed in range(3):
            subset = clean_subset(labels, 1000, budget=10, held_out=0.5, seed=seed)
            assert np.bincount(labels[subset.train]).tolist() == [3, 0, 0, 1, 0, 1]
            assert len(subset.held_out) == 5

    def test_many_rare_classes_take_from_the_great_one(self):
        labels = np.concatenate([np.zeros(1000, dtype=np.int64), np.arange(1, 51)])
        subset = clean_subset(labels, 1050, budget=60, held_out=0.0, seed=0)
        assert np.bincount(labels[subset.train]).tolist() == [10] + [1] * 50

    def test_the_seed_alone_decides(self):
        first, again, other = (clean_subset(self.LABELS, 1797, budget=100, seed=seed) for seed in (4, 4, 5))
        assert indices_hash(first.train) == indices_hash(again.train)
        assert indices_hash(first.held_out) == indices_hash(again.held_out)
        assert indices_hash(first.train) != indices_hash(other.train)

    def test_nothing_held_out(self):
        subset = clean_subset(None, 10, budget=1.0, held_out=0.0, seed=0)
        assert subset.train.tolist() == list(range(10))
        assert subset.held_out.tolist() == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"budget": 0}, "budget=0, expected a positive number"),
            ({"budget": 1.5}, r"budget=1.5, expected .* a share in \(0, 1\]"),
            ({"budget": 1798}, "budget=1798, expected at most the dataset's 1797 images"),
            ({"budget": 11}, "leaves 9 to train on, expected at least 10, one for each class"),
            ({"budget": 0.0001}, "leaves 0 to train on"),
            ({"held_out": 1.0}, r"held_out=1.0, expected a share of the clean subset in \[0, 1\)"),
            ({"n": 5}, r"labels of shape \(1797,\), expected \(5,\)"),
        ],
    )
    def test_impossible_subsets_are_refused(self, options, message):
        arguments = {"n": 1797, "budget": 100, "seed": 0} | options
        with pytest.raises(UsageError, match=message):
            clean_subset(self.LABELS, **arguments)

    def test_an_unlabelled_split_or_an_empty_subset_is_refused(self):
        with pytest.raises(UsageError, match=r"2 image.* have a negative label, the first at index 1"):
            clean_subset(np.array([0, -1, -1]), 3, budget=2, seed=0)
        with pytest.raises(UsageError, match="leaves 0 to train on"):
            clean_subset(None, 3, budget=0.1, seed=0)


def test_indices_hash_is_of_little_endian_int64():
    expected = hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in (1, 5, 300))).hexdigest()
    assert indices_hash([1, 5, 300]) == indices_hash(np.array([1, 5, 300], dtype=np.int32)) == expected


def test_a_folder_below_home(tmp_path, monkeypatch):
    """As a program names it; a shell would have put the whole name there."""
    small_dataset(3).save_to_disk(tmp_path / "private" / "imgs")
    monkeypatch.setenv("HOME", str(tmp_path))
    described = open_images("~/private/imgs").describe()
    assert (described["name"], described["place"], described["rows"]) == ("imgs", "folder", 3)


class TestCheckApart:
    def test_other_slices_of_one_data_set_are_apart(self, parquet):
        used = open_images(parquet, split="train[:3]")
        assert check_apart(open_images(parquet, split="train[3:]"), used, np.arange(3), "to purify") == []

    def test_rows_that_were_not_used_do_not_count(self, parquet):
        used = open_images(parquet, split="train")
        assert check_apart(open_images(parquet, split="train[:2]"), used, np.array([2, 5]), "to purify") == []

    def test_a_slice_that_was_used_is_refused(self, parquet):
        used = open_images(parquet, split="train")
        expected = "2 of the 3 images of .* that are measured on were used to purify: name a split"
        with pytest.raises(UsageError, match=expected):
            check_apart(open_images(parquet, split="train[:3]"), used, np.array([0, 1, 5]), "to purify")

    def test_a_few_are_told(self):
        """Data sets have copies of their own: one in a hundred is no error."""
        measured, used = open_images(small_dataset(100)), open_images(small_dataset(101).select([100, 7]))
        told = check_apart(measured, used, np.arange(2), "to purify")
        assert told == ["1 of the 100 images of dataset that are measured on were used to purify."]

    def test_files_of_a_folder(self, tmp_path):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir()
            for i in range(3):
                PILImage.new("RGB", (4, 4)).save(tmp_path / name / f"{i}.png")
        data = open_images(str(tmp_path))
        half = open_images(data.rows.select([3, 4, 5]))
        assert check_apart(half, data, np.arange(3), "to purify") == []  # alike to look at, but other files
        with pytest.raises(UsageError, match="1 of the 3 images"):
            check_apart(half, data, np.arange(4), "to purify")
