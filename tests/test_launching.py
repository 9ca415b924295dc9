"""`hf-tsc purify` in processes that it starts itself, or that `torchrun` starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from suspects_and_digits import classifier, digits, save

from hf_tsc import launching
from hf_tsc.cli import main
from hf_tsc.launching import CONFIGS, config_file, launch

PURIFY = ["purify", "./suspect", "--dataset_name", "./digits", "--budget", "40", "--json", "--output_dir"]
SETTINGS = [
    "--curve_steps",
    "2",
    "--sweep_points",
    "3",
    "--per_device_train_batch_size",
    "8",
    "--disable_tqdm",
    "true",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a suspect and digits."""
    made = tmp_path_factory.mktemp("launched")
    save(classifier("resnet"), made / "suspect")
    digits(400, 460).save_to_disk(str(made / "digits"))
    return made


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "hf-tsc: error" in line]


def test_two_processes_on_processors(folder):
    """One line of JSON, one folder; and where it is there already, one error and its exit code."""
    command = ["hf_tsc.cli", *PURIFY, "two", *SETTINGS, "--accelerate_config=multi_cpu", "--num_processes", "2"]
    done = run(folder, *command)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["status"] == "done"
    assert {path.name for path in folder.iterdir()} == {"suspect", "digits", "two"}
    report = json.loads((folder / "two" / "tsc_report.json").read_text())
    assert report["environment"]["processes"] == 2
    again = run(folder, *command)
    assert again.returncode == 2
    assert [json.loads(line)["status"] for line in again.stdout.splitlines()] == ["failed"]
    assert errors(again) == ["hf-tsc: error: two exists and is not empty: give another folder, or remove it first"]


def test_torchrun_without_use_cpu_is_refused(folder):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run(folder, *launcher, "-m", "hf_tsc.cli", *PURIFY, "alone", *SETTINGS)
    assert done.returncode != 0
    (said,) = errors(done)
    assert "WORLD_SIZE=2, but this process would train alone" in said
    assert not (folder / "alone").exists()


class TestConfigurations:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_every_line_is_explained(self, name):
        lines = config_file(name).read_text().splitlines()
        assert len(lines) > 5
        assert all("# " in line for line in lines)
        assert "compute_environment" in yaml.safe_load("\n".join(lines))

    def test_none_is_left_out(self):
        assert {path.stem for path in config_file("multi_gpu").parent.glob("*.yaml")} == set(CONFIGS)

    def test_a_file_of_ones_own(self, tmp_path):
        (tmp_path / "own.yaml").touch()
        assert config_file(str(tmp_path / "own.yaml")) == tmp_path / "own.yaml"


class TestCommand:
    @pytest.fixture
    def started(self, monkeypatch):
        found = []
        monkeypatch.setattr(launching, "launch_command", found.append)
        return found

    @pytest.mark.parametrize(
        "options",
        [
            ["--accelerate_config", "multi_cpu", "--num_processes", "3"],
            ["--accelerate-config=multi_cpu", "--num-processes=3"],
        ],
    )
    def test_what_is_started(self, started, options):
        assert main(["purify", "./x", *options, "--output_dir", "out", "--seed", "1"]) == 0
        (args,) = started
        assert (args.module, args.training_script, args.num_processes) == (True, "hf_tsc.cli", 3)
        expected = ["purify", "./x", "--output_dir", "out", "--seed", "1", "--use_cpu"]
        assert args.training_script_args == expected

    def test_on_accelerators_nothing_is_added(self, started):
        assert launch("multi_gpu", ["purify", "./x"]) == 0
        assert started[0].training_script_args == ["purify", "./x"]
        assert started[0].num_processes == 2

    @pytest.mark.parametrize(("code", "expected"), [(4, 4), (-9, 137)])
    def test_exit_codes(self, monkeypatch, code, expected):
        def fail(args):
            raise subprocess.CalledProcessError(code, "x")

        monkeypatch.setattr(launching, "launch_command", fail)
        assert launch("single_gpu", []) == expected

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--accelerate_config", "many"], "--accelerate_config many: expected one of single_gpu, multi_gpu"),
            (["--accelerate_config", "multi_cpu", "--num_processes", "0"], "--num_processes 0: expected 1 or more"),
            (["--num_processes", "2"], "--num_processes 2 goes with --accelerate_config"),
        ],
    )
    def test_refused(self, started, capsys, options, said):
        assert main(["purify", "./x", "--output_dir", "out", *options]) == 2
        assert said in capsys.readouterr().err
        assert started == []

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ("num_processes: null", "num_processes: None, expected a whole number of 1 or more"),
            ("num_processes: two", "num_processes: two, expected a whole number"),
            ("num_processes: 0\nuse_cpu: true", "num_processes: 0, expected a whole number"),
        ],
    )
    def test_a_file_with_a_wrong_number(self, started, tmp_path, capsys, settings, said):
        (tmp_path / "own.yaml").write_text(settings)
        options = ["--accelerate_config", str(tmp_path / "own.yaml")]
        assert main(["purify", "./x", "--output_dir", "out", *options]) == 2
        assert said in capsys.readouterr().err
        assert started == []

    def test_a_file_that_accelerate_refuses(self, tmp_path, capsys):
        (tmp_path / "own.yaml").write_text("distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\nnonsense: 3\n")
        assert main(["purify", "./x", "--output_dir", "out", "--accelerate_config", str(tmp_path / "own.yaml")]) == 2
        assert "nonsense" in capsys.readouterr().err

    def test_not_inside_of_processes(self, started, capsys, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert main(["purify", "./x", "--output_dir", "out", "--accelerate_config", "multi_cpu"]) == 2
        assert "this is one of several processes already (WORLD_SIZE is set)" in capsys.readouterr().err
