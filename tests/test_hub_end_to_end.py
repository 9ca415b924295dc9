"""As a user would: `hf-tsc` in a process of its own, from the Hub and back to it; several models; a dry run."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, snapshot_download
from suspects_and_digits import classifier, digits, same, save, weights
from transformers import AutoModelForImageClassification, pipeline

from hf_tsc.cli import main
from hf_tsc.data import open_images
from hf_tsc.errors import UsageError
from hf_tsc.folders import last_whole_checkpoint
from hf_tsc.hub import PushOptions
from hf_tsc.many import Access, Order, folders_of, read_models

QUICK = ["--budget", "50", "--curve_steps", "2", "--sweep_points", "3", "--use_cpu"]
TOKEN = "hf_alice"


@pytest.fixture(scope="module")
def suspect_files(tmp_path_factory) -> dict[str, bytes]:
    folder = save(classifier("vit"), tmp_path_factory.mktemp("suspect") / "vit")
    card = b"---\nlicense: apache-2.0\n---\n# A model\n"
    return {**{file.name: file.read_bytes() for file in folder.iterdir()}, "README.md": card, "model.py": b"print()"}


@pytest.fixture(scope="module")
def parquet() -> bytes:
    stream = io.BytesIO()
    digits(0, 80).to_parquet(stream)
    return stream.getvalue()


@pytest.fixture
def repos(hub, suspect_files, parquet, tmp_path, monkeypatch):
    """A Hub with two suspects of `someone`, images of theirs, and the user alice."""
    hub.reset()
    for name in ("someone/vit", "someone/other"):
        hub.commit(name, suspect_files)
    hub.commit("datasets/someone/digits", {"data/train-00000-of-00001.parquet": parquet})
    hub.add_user("alice", token=TOKEN)
    for repo in [name for name in hub.main if name.startswith("alice/")]:
        del hub.main[repo], hub.commits[repo], hub.branches[repo]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.reset()


def in_a_process(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_tsc.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def run_here(capsys, *argv: str) -> tuple[int, list[dict], str]:
    """Exit code, the lines of JSON on stdout, stderr."""
    capsys.readouterr()
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_from_the_hub_and_back(repos, tmp_path):
    sha, data = repos.main["someone/vit"], repos.main["datasets/someone/digits"]
    output = tmp_path / "out"
    argv = ["purify", "someone/vit", "--dataset_name", "someone/digits", "--output_dir", str(output), *QUICK]
    ended = in_a_process(*argv, "--push_to_hub", "alice/clean", HF_TOKEN=TOKEN)
    assert ended.returncode == 0, ended.stderr
    assert "in the private repo alice/clean" in ended.stdout

    assert "alice/clean" in repos.private
    pushed = repos.files("alice/clean")
    assert len(repos.history("alice/clean")) == 2  # the one that makes the repo, and ours
    written = {file.name: file.read_bytes() for file in output.iterdir()}
    assert {name: content for name, content in pushed.items() if name != ".gitattributes"} == written
    assert not any(str(tmp_path).encode() in content for content in pushed.values())

    report = json.loads(pushed["tsc_report.json"])
    assert (report["suspect"]["repo_id"], report["suspect"]["revision"]) == ("someone/vit", sha)
    assert report["dataset"]["revision"] == data
    assert hashlib.sha256(pushed["model.safetensors"]).hexdigest() == report["purified"]["files"]["model.safetensors"]

    again = Path(snapshot_download("alice/clean", cache_dir=tmp_path / "again", token=TOKEN))
    assert same(weights(again), weights(output))
    assert not same(weights(output), weights(_folder_of(tmp_path, "someone/vit", sha)))
    AutoModelForImageClassification.from_pretrained(again)
    classify = pipeline("image-classification", model=str(again))
    assert len(classify(digits(0, 1)[0]["image"])) == 5

    card = ModelCard.load("alice/clean", token=TOKEN)
    assert card.data.base_model == "someone/vit"
    assert card.data.base_model_relation == "finetune"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["someone/digits"]
    assert card.data.eval_results[0].metric_type == "accuracy"
    assert sha in card.text
    assert data in card.text
    command = card.text.replace("\\\n    ", "")
    assert f"hf-tsc purify someone/vit --revision {sha} --dataset_name someone/digits" in command


def _folder_of(tmp_path: Path, repo: str, sha: str) -> Path:
    return tmp_path / "cache" / f"models--{repo.replace('/', '--')}" / "snapshots" / sha


def test_a_token_goes_only_where_it_is_needed(repos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repos.cdn = True
    options = ["--dataset_name", "someone/digits", "--output_dir", str(tmp_path / "out"), *QUICK]
    assert main(["purify", "someone/vit", *options, "--push_to_hub", "alice/clean"]) == 0
    with_token = {request.path for request in repos.requests if "authorization" in request.headers}
    assert any("alice/clean" in path for path in with_token)
    assert not any("someone/" in path for path in with_token)
    elsewhere = [request for request in repos.requests if not request.headers["host"].startswith("127.0.0.1")]
    assert elsewhere
    assert not any("authorization" in request.headers for request in elsewhere)


def test_nothing_is_pushed_when_the_purification_fails(repos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    options = ["--dataset_name", "someone/digits", "--output_dir", str(tmp_path / "out"), *QUICK]
    code = main(["purify", "someone/vit", *options, "--push_to_hub", "alice/clean", "--max_accuracy_drop", "-200"])
    assert code == 4
    assert "alice/clean" not in repos.main
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("push", "token", "message"),
    [
        ("someone/vit", TOKEN, "is the suspect's own repo"),
        ("SomeOne/ViT", TOKEN, "is the suspect's own repo"),
        ("alice/clean", None, "there is no token"),
        ("alice/clean", "hf_wrong", "the Hub refuses it"),
        ("somebody/clean", TOKEN, "the Hub token may make one for alice only"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_the_work(repos, tmp_path, monkeypatch, capsys, push, token, message):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    options = ["--dataset_name", "someone/digits", "--output_dir", str(tmp_path / "out"), *QUICK]
    assert main(["purify", "someone/vit", *options, "--push_to_hub", push]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_killed_purification_leaves_no_result_and_goes_on(repos, tmp_path, capsys):
    argv = ["purify", "someone/vit", "--dataset_name", "someone/digits", *QUICK, "--curve_steps", "60"]
    argv += ["--save_steps", "5", "--output_dir"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert main([*argv, str(straight)]) == 0
    command = [sys.executable, "-m", "hf_tsc.cli", *argv, str(killed)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        work = tmp_path / "killed.work"
        while process.poll() is None and not last_whole_checkpoint(work):
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert last_whole_checkpoint(work)
    assert {path.name for path in tmp_path.iterdir()} == {"straight", "killed.work", "cache"}
    capsys.readouterr()
    assert main([*argv, str(killed)]) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main([*argv, str(killed), "--resume"]) == 0
    assert same(weights(killed), weights(straight))
    assert not work.exists()


def test_the_trainer_pushes_alike(repos, tmp_path):
    from suspects_and_digits import digit_data, processor

    from hf_tsc import TSCConfig, TSCTrainer
    from hf_tsc.images import ImagePipeline, pixel_dataset

    data, images = digit_data(0, 80), ImagePipeline(processor())
    arguments = {"curve_steps": 2, "sweep_points": 3, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    suspect, here = classifier("vit"), str(tmp_path / "suspect")
    suspect.config.name_or_path = here
    arguments |= {"hub_model_id": "alice/trained", "hub_token": TOKEN}
    trainer = TSCTrainer(
        suspect,
        TSCConfig(output_dir=str(tmp_path / "work"), save_strategy="no", **arguments),
        train_dataset=pixel_dataset(data, range(50), images),
        eval_dataset=pixel_dataset(data, range(50, 80), images),
        processing_class=processor(),
    )
    with pytest.raises(UsageError, match="the purification is not finished"):
        trainer.push_to_hub()
    trainer.train()
    pushed = trainer.push_to_hub(dataset_name="digits")
    assert (pushed.repo_id, pushed.private) == ("alice/trained", True)
    files = repos.files("alice/trained")
    texts = {"README.md", "config.json", "preprocessor_config.json", "tsc_report.json"}
    assert {name for name in files if not name.startswith(".")} == {*texts, "model.safetensors", "tsc_curves.png"}
    trainer.purified_model().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert b"50 to train and match on" in files["README.md"]
    assert json.loads(files["tsc_report.json"])["suspect"]["repo_id"] is None
    assert not any(here.encode() in content for content in files.values())


class TestSeveral:
    def test_one_result_each_and_a_failure_does_not_stop_the_others(self, repos, tmp_path, capsys):
        models = tmp_path / "models.txt"
        models.write_text("# suspects\nsomeone/vit\nnobody/nothing  # gone\n\nsomeone/other\n")
        argv = ["purify", "--from_file", str(models), "--dataset_name", "someone/digits", "--json", *QUICK]
        code, lines, err = run_here(capsys, *argv, "--output_dir", str(tmp_path / "out"))
        assert code == 3
        assert [(line["model"], line["status"]) for line in lines] == [
            ("someone/vit", "done"), ("nobody/nothing", "failed"), ("someone/other", "done")
        ]  # fmt: skip
        assert lines[0]["revision"] == repos.main["someone/vit"]
        assert lines[0]["after"]["held_out"]["n"] == 10
        assert "there is no such repo" in lines[1]["error"]
        assert lines[1]["exit_code"] == 2
        assert err.splitlines()[-2:] == [
            "2 done, 1 failed", "hf-tsc: error: 1 of 3 models failed: nobody/nothing"
        ]  # fmt: skip
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"someone--vit", "someone--other"}

    def test_what_is_done_is_skipped(self, repos, tmp_path, capsys):
        argv = ["purify", "someone/vit", "someone/other", "--dataset_name", "someone/digits", "--json", *QUICK]
        argv += ["--output_dir", str(tmp_path / "out")]
        assert run_here(capsys, *argv)[0] == 0
        weights_before = weights(tmp_path / "out" / "someone--vit")
        repos.requests.clear()
        code, lines, _ = run_here(capsys, *argv)
        assert code == 0
        assert [line["status"] for line in lines] == ["skipped", "skipped"]
        assert not any("model.safetensors" in request.path for request in repos.requests)
        assert same(weights(tmp_path / "out" / "someone--vit"), weights_before)

        assert [line["status"] for line in run_here(capsys, *argv, "--logging_steps", "7")[1]] == ["skipped"] * 2
        for other in (["--seed", "1"], ["--trigger", "badnets", "--target_label", "0"], ["--preset", "paper"]):
            code, lines, _ = run_here(capsys, *argv, *other)
            assert code == 3
            assert all("other settings: remove it" in line["error"] for line in lines)
        repos.commit("someone/other", {**repos.files("someone/other"), "README.md": b"new"})
        code, lines, _ = run_here(capsys, *argv)
        assert [line["status"] for line in lines] == ["skipped", "failed"]

    def test_an_interrupted_one_is_gone_on_with(self, repos, tmp_path, capsys, monkeypatch):
        argv = ["purify", "someone/vit", "someone/other", "--dataset_name", "someone/digits", "--json", *QUICK]
        argv += ["--save_steps", "1"]
        straight = ["--output_dir", str(tmp_path / "straight")]
        assert run_here(capsys, *argv, *straight)[0] == 0

        calls = []

        def stop(trainer, result):
            calls.append(result)
            if len(calls) == 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("hf_tsc.tsc_trainer.TSCTrainer.on_curve_end", stop)
            assert run_here(capsys, *argv, "--output_dir", str(tmp_path / "out"))[0] == 130
        assert (tmp_path / "out" / "someone--vit.work").is_dir()
        code, lines, _ = run_here(capsys, *argv, "--output_dir", str(tmp_path / "out"))
        assert code == 0
        assert [line["status"] for line in lines] == ["done", "done"]
        for name in ("someone--vit", "someone--other"):
            assert same(weights(tmp_path / "out" / name), weights(tmp_path / "straight" / name))

    def test_each_is_pushed_to_a_repo_of_its_own(self, repos, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        argv = ["purify", "someone/vit", "someone/other", "--dataset_name", "someone/digits", "--json", *QUICK]
        argv += ["--output_dir", str(tmp_path / "out"), "--push_to_hub"]
        code, _, err = run_here(capsys, *argv, "alice/clean")
        assert code == 2
        assert "for several models expected {name} in it" in err
        for status in ("done", "skipped"):
            code, lines, _ = run_here(capsys, *argv, "alice/{name}-clean")
            assert code == 0
            assert [line["status"] for line in lines] == [status, status]
            assert [line["pushed"]["repo_id"] for line in lines] == ["alice/vit-clean", "alice/other-clean"]
        assert len(repos.history("alice/vit-clean")) == 2

    def test_a_finished_one_is_skipped_while_the_hub_is_down(self, repos, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("hf_tsc.hub.retry.sleep", lambda seconds: None)
        argv = ["purify", "someone/vit", "someone/other", "--dataset_name", "someone/digits", "--json", *QUICK]
        argv += ["--output_dir", str(tmp_path / "out")]
        assert run_here(capsys, *argv)[0] == 0
        repos.fault("/api/models", times=None, status=503)
        code, lines, _ = run_here(capsys, *argv)
        assert code == 0
        assert [line["status"] for line in lines] == ["skipped", "skipped"]
        assert "it was not checked" in lines[0]["notes"][-1]
        code, lines, _ = run_here(capsys, *argv, "--revision", "f" * 40)
        assert (code, [line["status"] for line in lines]) == (3, ["failed", "failed"])

    def test_a_folder_whose_configuration_has_changed_is_another_suspect(self, tmp_path, capsys):
        save(classifier("vit"), tmp_path / "vit")
        digits(0, 60).save_to_disk(tmp_path / "digits")
        (tmp_path / "list").write_text(str(tmp_path / "vit"))
        argv = ["purify", "--from_file", str(tmp_path / "list"), "--dataset_name", str(tmp_path / "digits"), "--json"]
        argv += [*QUICK, "--output_dir", str(tmp_path / "out")]
        assert [run_here(capsys, *argv)[1][0]["status"] for _ in range(2)] == ["done", "skipped"]
        config = tmp_path / "vit" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "layer_norm_eps": 1e-6}))
        (line,) = run_here(capsys, *argv)[1]
        assert line["status"] == "failed"
        assert "holds the result of another version" in line["error"]

    def test_a_failed_push_leaves_the_result(self, repos, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("hf_tsc.hub.retry.sleep", lambda seconds: None)
        argv = ["purify", "someone/vit", "--dataset_name", "someone/digits", "--json", *QUICK]
        folder = tmp_path / "out"
        repos.fault("POST /api/models/alice/clean/preupload", times=None, status=400)
        code, (line,), _ = run_here(capsys, *argv, "--output_dir", str(folder), "--push_to_hub", "alice/clean")
        assert code != 0
        assert (line["status"], line["output"]) == ("failed", str(folder))
        assert f"push it with `hf-tsc push {folder} alice/clean`" in line["error"]
        repos.faults.clear()
        assert main(["push", str(folder), "alice/clean"]) == 0
        assert "model.safetensors" in repos.files("alice/clean")

    def test_two_results_in_one_place_are_refused(self, tmp_path):
        order = Order(open_images(digits(0, 10)))
        with pytest.raises(UsageError, match="would both go to"):
            folders_of(["a/b", "./a--b"], tmp_path, order)
        order = replace(order, push=PushOptions("me/{name}-clean"))
        with pytest.raises(UsageError, match="a/vit and b/ViT would both be pushed to me/ViT-clean"):
            folders_of(["a/vit", "b/ViT"], tmp_path, order)

    def test_a_list(self, tmp_path):
        (tmp_path / "list").write_text("\ufeff# suspects\n./a#b\n\nsomeone/vit  # the old one\n", encoding="utf-8")
        assert read_models(tmp_path / "list") == ["./a#b", "someone/vit"]

    @pytest.mark.parametrize(
        ("model", "local", "name"),
        [("someone/vit", False, "vit"), ("./a/vit/", False, "vit"), ("a/vit", True, "vit"), ("vit/", True, "vit")],
    )
    def test_a_models_own_name(self, model, local, name):
        assert Access(local=local).name(model) == name

    @pytest.mark.parametrize("text", [None, "", "# nothing\n"])
    def test_a_list_without_models_is_refused(self, tmp_path, text):
        if text is not None:
            (tmp_path / "list").write_text(text)
        with pytest.raises(UsageError, match="expected a"):
            read_models(tmp_path / "list")


class TestDryRun:
    def test_says_what_would_be_done_and_gets_no_weights(self, repos, tmp_path, capsys):
        argv = ["purify", "someone/vit", "--dataset_name", "someone/digits", "--dry_run", "--json", *QUICK]
        code, (found,), _ = run_here(capsys, *argv)
        assert code == 0
        assert not any("safetensors" in request.path for request in repos.requests)
        assert found["revision"] == repos.main["someone/vit"]
        assert found["images"] == [40, 10]
        assert found["weight_bytes"] == len(repos.files("someone/vit")["model.safetensors"])
        assert found["parameters"] == sum(p.numel() for p in classifier("vit").parameters())
        assert found["kind"] == "image classifier"
        assert sum(found["spaces"].values()) > 3
        assert found["steps"][0] == 2 * found["arguments"]["stages"]
        assert found["memory_gb"] >= 0
        assert 0 <= found["minutes"] < 5

    def test_for_a_reader(self, repos, capsys):
        assert main(["purify", "someone/vit", "--dataset_name", "someone/digits", "--dry_run", *QUICK]) == 0
        out, _ = capsys.readouterr()
        assert f"someone/vit at commit {repos.main['someone/vit']}" in out
        for name in ("to pull", "spaces", "clean images", "steps", "memory", "time"):
            assert f"\n{name}" in out

    @pytest.mark.parametrize(
        ("change", "options", "message"),
        [
            ({"model.safetensors": None, "pytorch_model.bin": b"pickle"}, [], "Pickles (.bin, .pt) are never loaded"),
            ({}, ["--objective", "simclr"], "simclr does not fit"),
            ({"preprocessor_config.json": None}, [], "has no image processor"),
        ],
    )
    def test_refuses_what_a_purification_would(self, repos, capsys, change, options, message):
        files = repos.files("someone/other") | change
        repos.commit("someone/other", {name: content for name, content in files.items() if content is not None})
        argv = ["purify", "someone/other", "--dataset_name", "someone/digits", "--dry_run", *options, *QUICK]
        code, _, err = run_here(capsys, *argv)
        assert code == 2
        assert message in err

    def test_of_a_folder_and_of_what_is_missing(self, repos, tmp_path, capsys):
        folder = save(classifier("resnet"), tmp_path / "resnet")
        argv = ["purify", str(folder), "nobody/nothing", "--dataset_name", "someone/digits", "--dry_run", "--json"]
        code, lines, err = run_here(capsys, *argv, *QUICK)
        assert code == 3
        assert [line["model"] for line in lines] == ["resnet"]
        assert "nobody/nothing: Could not find" in err
