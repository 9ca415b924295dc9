"""The demonstration, with tiny models and a few steps: what it writes, prints and compares."""

import copy
import re
from concurrent.futures import Executor, Future

import numpy as np
import pytest
from suspects_and_digits import all_digits, classifier, digits, processor, read_json, same
from tiny import TRANSFORMER
from transformers import ResNetConfig, ViTConfig

from hf_tsc import PurificationReport, UsageError, demo
from hf_tsc.baselines import fine_tuning
from hf_tsc.cli import main
from hf_tsc.data import open_images
from hf_tsc.demo import DemoModel, best_fine_tuning, fine_tune_alike, run_demo, split_digits, table

QUICK = {"disable_tqdm": True, "logging_strategy": "no"}
RATES = (0.001, 0.01, 0.1)


class InThisProcess(Executor):
    """Stands in for the pool of processes, which would import everything anew."""

    def __init__(self, *args):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`hf-tsc demo` on 150 digits of 8 x 8 pixels: the output folder and what it printed."""
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    suspect, steps = {"num_train_epochs": 1, **QUICK}, {"curve_steps": 2, "sweep_points": 3, **QUICK}
    models = {
        "resnet": DemoModel(ResNetConfig(**sizes), suspect, steps, RATES),
        "vit": DemoModel(ViTConfig(**TRANSFORMER), suspect, steps, RATES),
    }
    output, printed = tmp_path_factory.mktemp("demo") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DEMO_MODELS", models)
        patch.setattr(demo, "ProcessPoolExecutor", InThisProcess)
        patch.setattr(demo, "digits", lambda: digits(0, 150))
        for name, value in (("SUSPECT_IMAGES", 60), ("CLEAN_IMAGES", 40), ("IMAGE_SIZE", 8)):
            patch.setattr(demo, name, value)
        patch.setattr("builtins.print", lambda *words, **options: printed.append(" ".join(map(str, words))))
        assert main(["demo", "--output_dir", str(output), "--seed", "4"]) == 0
    return output, "\n".join(printed)


def test_files(finished):
    output, _ = finished
    names = [f"{model}-{kind}" for model in ("resnet", "vit") for kind in ("suspect", "purified")]
    assert {path.name for path in output.iterdir()} == {*names, "demo.json"}


def test_numbers_are_those_of_the_reports(finished):
    output, _ = finished
    found = read_json(output / "demo.json")
    assert found["seed"] == 4
    assert [result["model"] for result in found["models"]] == ["vit", "resnet"]
    for result in found["models"]:
        report = PurificationReport.from_file(output / f"{result['model']}-purified" / "tsc_report.json")
        assert (result["before"], result["tsc"]) == (report.before["test"], report.after["test"])
        assert result["before"]["n"] == 50
        assert (report.arguments["seed"], report.attack["target_label"]) == (4, 0)
        assert result["fine_tuning"].keys() == {str(rate) for rate in RATES}
        assert all(entry.keys() == report.before["test"].keys() for entry in result["fine_tuning"].values())


def test_what_is_printed(finished):
    output, printed = finished
    assert table(read_json(output / "demo.json")["models"]) in printed
    for model in ("resnet", "vit"):
        (card, picture) = re.search(rf"{model}: card (\S+), picture (\S+)", printed).groups()
        assert card == str(output / f"{model}-purified" / "README.md")
        assert read_json(output / f"{model}-suspect" / "suspect.json")["target_label"] == 0
        assert (output / f"{model}-purified" / "README.md").is_file()
        assert picture == str(output / f"{model}-purified" / "tsc_curves.png")


def test_output_not_empty(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(UsageError, match="not empty"):
        run_demo(tmp_path, seed=0, names=["resnet"])


@pytest.mark.parametrize("seed", [0, 1])
def test_images_are_disjoint(monkeypatch, seed):
    numbered = all_digits().add_column("row", range(1797))
    monkeypatch.setattr(demo, "digits", lambda: numbered)
    rows = [data.rows["row"][:] for data in split_digits(seed)]
    assert [len(part) for part in rows] == [1200, 150, 447]
    assert sorted(rows[0] + rows[1] + rows[2]) == list(range(1797))


def test_digits_are_real():
    pixels = np.array(all_digits()[0]["image"])
    assert pixels.shape == (8, 8)
    assert pixels.max() > 200
    assert all_digits().features["label"].names == [str(i) for i in range(10)]


def test_fine_tuning(finished):
    """The images and steps of the purification; the suspect itself stays as it is."""
    report = PurificationReport.from_file(finished[0] / "vit-purified" / "tsc_report.json")
    suspect = classifier("vit")
    before = copy.deepcopy(suspect.state_dict())
    clean = open_images(digits(0, 40))
    seen = []

    train = fine_tuning.ObjectiveTrainer.train

    def recorded(self):
        result = train(self)
        seen.append((self.train_dataset.indices.tolist(), self.state.global_step, self.args.learning_rate))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tuning.ObjectiveTrainer, "train", recorded)
        tuned = fine_tune_alike(suspect, clean, processor(), report, rate=0.01, seed=0)
    steps = report.cost["gradient_evaluations"]
    assert seen == [(report.dataset["train_indices"], steps, 0.01)]
    assert same(suspect.state_dict(), before)
    assert not same(tuned.state_dict(), before)
    assert not tuned.training


def measured(acc: float, asr: float) -> dict[str, float]:
    return {"accuracy": acc, "attack_success_rate": asr}


@pytest.mark.parametrize(
    ("tuned", "best"),
    [
        # defense effectiveness: (drop of ASR - drop of ACC + 1) / 2; before: 0.95, 1.0
        ({"low": measured(0.95, 0.9), "mid": measured(0.93, 0.2), "high": measured(0.5, 0.0)}, "mid"),
        ({"low": measured(0.95, 0.9), "mid": measured(0.9, 0.5), "high": measured(0.85, 0.05)}, "high"),
        ({"low": measured(0.95, 1.0), "mid": measured(0.5, 1.0), "high": measured(0.1, 0.9)}, "low"),
    ],
)
def test_best_fine_tuning(tuned, best):
    result = {"model": "vit", "before": measured(0.95, 1.0), "fine_tuning": tuned, "tsc": measured(0.94, 0.01)}
    assert best_fine_tuning(result) == (best, tuned[best])
    lines = table([result]).splitlines()
    acc, asr = (f"{100 * tuned[best][name]:.1f}" for name in ("accuracy", "attack_success_rate"))
    assert [line.split()[-2:] for line in lines] == [["ACC", "ASR"], ["95.0", "100.0"], [acc, asr], ["94.0", "1.0"]]
    assert f"best rate, {best}" in lines[2]
