"""Suspect models: what is refused before loading, what loading guarantees, and the pull through a real client."""

import io
import json
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_tsc.errors import HfTscError, UsageError
from hf_tsc.hub import Source, check_folder, load_image_processor, load_model, resolve_model
from hf_tsc.hub.folder import kept

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TOWER = {**TINY, "projection_dim": 8}


def tiny_vit() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**TINY, image_size=8, patch_size=4, num_labels=3))


def tiny_resnet() -> ResNetForImageClassification:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


def tiny_clip() -> CLIPModel:
    text = {**TOWER, "vocab_size": 30, "max_position_embeddings": 8}
    vision = {**TOWER, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


MODELS = {
    "vit": (tiny_vit, AutoModelForImageClassification, "sdpa"),
    "resnet": (tiny_resnet, AutoModelForImageClassification, "eager"),
    "clip": (tiny_clip, AutoModel, "sdpa"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """One saved folder per model, not to be written to."""
    torch.manual_seed(0)
    folders = {}
    for name, (make, _, _) in MODELS.items():
        folders[name] = tmp_path_factory.mktemp("saved") / name
        make().save_pretrained(folders[name])
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folders["vit"])
    return folders


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A ViT to tamper with."""
    return Path(shutil.copytree(saved["vit"], tmp_path / "suspect"))


def source_of(path: Path) -> Source:
    return Source(path, None, None, {})


def load_classifier(path: Path):
    return load_model(source_of(path), auto_class=AutoModelForImageClassification)


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> Path:
    """Split the weights into two shards; returns the index."""
    tensors = list(load_file(folder / "model.safetensors").items())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {}
    for name, part in zip(names, (tensors[::2], tensors[1::2]), strict=True):
        save_file(dict(part), folder / name, metadata={"format": "pt"})
        weight_map |= {key: name for key, _ in part}
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


# Folders


@pytest.fixture
def noise(monkeypatch):
    """What transformers logs, as for a user who silenced nothing; the environment of the tests would hide it."""
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    transformers.logging.add_handler(handler)
    transformers.logging.set_verbosity_warning()
    yield stream
    assert transformers.logging.get_verbosity() == transformers.logging.WARNING
    assert transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.remove_handler(handler)


@pytest.mark.parametrize("name", MODELS)
def test_healthy_model_loads_bit_exactly_and_silently(saved, name, capfd, noise):
    make, auto_class, attention = MODELS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, dtype = load_model(resolve_model(str(saved[name])), auto_class=auto_class)
    assert caught == []
    assert capfd.readouterr() == ("", "")
    assert noise.getvalue() == ""
    assert isinstance(model, make().__class__)
    assert not model.training
    assert dtype == torch.float32
    assert model.config._attn_implementation == attention
    assert model.config.name_or_path == ""
    stored = load_file(saved[name] / "model.safetensors")
    state = model.state_dict()
    assert len(stored) > 10
    assert sorted(tensor.double().sum().item() for tensor in stored.values()) == sorted(
        tensor.double().sum().item() for tensor in state.values()
    )


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_loaded_in_float32_and_the_stored_dtype_is_told(folder, stored):
    model, dtype = load_classifier(_with_dtype(folder, stored))
    assert dtype == stored
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def _with_dtype(folder: Path, dtype: torch.dtype) -> Path:
    def cast_most(tensors):
        for key in sorted(tensors)[1:]:
            tensors[key] = tensors[key].to(dtype)

    edit_weights(folder, cast_most)
    edit_json(folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    return folder


def test_other_dtype_on_request(saved):
    model, _ = load_model(source_of(saved["vit"]), auto_class=AutoModelForImageClassification, dtype=torch.float64)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64}


def test_shards_load_like_one_file(saved, folder):
    whole, _ = load_classifier(saved["vit"])
    index = shard(folder)
    sharded, _ = load_classifier(folder)
    assert index.exists()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))


def test_source_of_a_folder(folder, monkeypatch):
    shard(folder)
    monkeypatch.chdir(folder.parent)
    source = resolve_model("./suspect")
    assert (source.path, source.repo_id, source.revision) == (Path("suspect"), None, None)
    assert sorted(source.file_hashes) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert all(len(digest) == 64 for digest in source.file_hashes.values())
    assert resolve_model("suspect", local=True).file_hashes == source.file_hashes
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/suspect").path == folder


FOLDER_FAULTS = {
    "missing folder": (shutil.rmtree, "does not exist: give a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json is not JSON"),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list: expected a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"Pickles \(.bin, .pt\) are never loaded"),
    "only a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "convert them with `save_pretrained`",
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge the adapter first"),
    "distributed checkpoint": (
        lambda f: (f / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b""),
        "distributed checkpoint",
    ),
}


@pytest.mark.parametrize("name", FOLDER_FAULTS)
def test_folder_refused(folder, name):
    break_it, message = FOLDER_FAULTS[name]
    break_it(folder)
    with pytest.raises(UsageError, match=message) as caught:
        resolve_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "auto_map",
        "transformers_weights",
        "configuration_files",
        "quantization_config",
        "fusion_config",
        "experts_implementation",
        "_experts_implementation",
        "checkpoint_path",
    ],
)
@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("config.json", lambda item: item),
        ("config.json", lambda item: {"vision_config": item}),
        ("config.json", lambda item: {"parts": [[{"deep": item}]]}),
        ("preprocessor_config.json", lambda item: item),
        ("processor_config.json", lambda item: {"image_processor": item}),
    ],
)
def test_forbidden_key_refused_at_any_depth(folder, file, wrap, key):
    (folder / file).touch()
    content = json.loads((folder / file).read_text() or "{}")
    (folder / file).write_text(json.dumps(content | wrap({key: {"x": "y"}})))
    with pytest.raises(UsageError, match=f"{file} has the key `{key}`: "):
        check_folder(folder)


@pytest.mark.parametrize("architecture", ["hf-hub:evil/model", "local-dir:/somewhere"])
def test_timm_architecture_elsewhere_refused(folder, architecture):
    edit_json(folder / "config.json", architecture=architecture)
    with pytest.raises(UsageError, match="names another model"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../stolen.safetensors", "expected plain names"),
        ("{parent}/stolen.safetensors", "expected plain names"),
        ("sub/stolen.safetensors", "expected plain names"),
        ("..", "expected plain names"),
        ("weights.bin", "expected plain names"),
        (7, "expected plain names"),
        ("absent.safetensors", "is not in"),
    ],
)
def test_index_that_leaves_the_folder_refused(folder, name, message):
    index = shard(folder)
    first = sorted(folder.glob("model-*.safetensors"))[0]
    (folder / "sub").mkdir()
    for place in (folder.parent / "stolen.safetensors", folder / "sub" / "stolen.safetensors", folder / "weights.bin"):
        shutil.copy(first, place)
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map[min(weight_map)] = name.format(parent=folder.parent) if isinstance(name, str) else name
    edit_json(index, weight_map=weight_map)
    with pytest.raises(UsageError, match=message):
        check_folder(folder)


@pytest.mark.parametrize("weight_map", [None, {}, ["model.safetensors"]])
def test_index_without_weight_map_refused(folder, weight_map):
    edit_json(shard(folder), weight_map=weight_map)
    with pytest.raises(UsageError, match="no `weight_map`"):
        check_folder(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_link_out_of_the_folder_refused(folder, sharded):
    if sharded:
        shard(folder)
    weights = sorted(folder.glob("*.safetensors"))[0]
    outside = weights.rename(folder.parent / "outside.safetensors")
    weights.symlink_to(outside)
    with pytest.raises(UsageError, match="outside the folder"):
        check_folder(folder)


def test_broken_link_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"has no model\.safetensors"):
        check_folder(folder)


def test_link_within_the_folder_is_fine(folder):
    (folder / "model.safetensors").rename(folder / "weights.data")
    (folder / "model.safetensors").symlink_to("weights.data")
    check_folder(folder)


# Loading


def test_what_does_not_pass_into_a_purified_model():
    own = {"hidden_size": 8, "layers": [{"kernel": 3}]}
    nested = {"_attn_implementation": "evil/kernel", "_name_or_path": "/place", **own}
    config = {**own, "custom_pipelines": {"x": {"impl": "evil.Evil"}}, "vision_config": nested, "towers": [nested]}
    assert kept(config) == {**own, "vision_config": own, "towers": [own]}


@pytest.mark.parametrize("where", ["attn_implementation", "_attn_implementation", "vision_config"])
def test_hub_kernel_in_the_config_is_overridden(saved, tmp_path, where):
    folder = Path(shutil.copytree(saved["clip"], tmp_path / "clip"))
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    kernel = "evil/kernel"
    value = {**vision, "attn_implementation": kernel} if where == "vision_config" else kernel
    edit_json(folder / "config.json", **{where: value})
    check_folder(folder)
    model, _ = load_model(source_of(folder), auto_class=AutoModel)
    used = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert used == {"sdpa"}


def _drop_bias(tensors):
    del tensors["classifier.bias"]


def _drop_many(tensors):
    for key in sorted(tensors)[:5]:
        del tensors[key]


def _add_extra(tensors):
    tensors["backdoor.weight"] = torch.zeros(2)


def _reshape_bias(tensors):
    tensors["classifier.bias"] = torch.zeros(4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop_bias, r"missing_keys: classifier\.bias\)"),
        (_drop_many, r"missing_keys: \S+, \S+, \S+ and 2 more\)"),
        (_add_extra, r"unexpected_keys: backdoor\.weight\)"),
        (_reshape_bias, r"mismatched_keys: classifier\.bias\)"),
    ],
)
def test_weights_that_do_not_fit_refused(folder, edit, message):
    edit_weights(folder, edit)
    with pytest.raises(UsageError, match=message):
        load_classifier(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "key"),
    [("vit", "classifier.bias"), ("resnet", "resnet.embedder.embedder.normalization.running_var")],
)
def test_not_finite_refused(saved, tmp_path, name, key, value):
    folder = Path(shutil.copytree(saved[name], tmp_path / name))
    edit_weights(folder, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
    with pytest.raises(UsageError, match=f"`{key}` .* holds NaN or infinity"):
        load_classifier(folder)


def test_integer_weights_refused(folder):
    edit_weights(folder, lambda tensors: tensors.update({key: t.to(torch.int64) for key, t in tensors.items()}))
    with pytest.raises(UsageError, match="stores I64: expected one of F64, F32, F16, BF16"):
        load_classifier(folder)


def test_damaged_safetensors_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04not safetensors at all")
    with pytest.raises(UsageError, match="is not a safetensors file"):
        load_classifier(folder)


@pytest.mark.parametrize("model_type", ["no_such_model", None, 7])
def test_unknown_model_type_refused(folder, model_type):
    edit_json(folder / "config.json", model_type=model_type)
    with pytest.raises(UsageError, match=f"model type {model_type!r}: expected an image classifier that"):
        load_classifier(folder)


def test_model_of_another_kind_refused(folder):
    BertConfig().save_pretrained(folder)
    with pytest.raises(
        UsageError, match=r"model type 'bert': expected an image classifier that transformers defines\.$"
    ):
        load_classifier(folder)


def test_config_with_a_wrong_field_refused(folder):
    edit_json(folder / "config.json", hidden_size="wide")
    with pytest.raises(UsageError, match=r"model type 'vit'.*hidden_size") as caught:
        load_classifier(folder)
    assert "\n" not in str(caught.value)


def test_image_processor(saved):
    assert load_image_processor(source_of(saved["vit"])).size["height"] == 8


@pytest.mark.parametrize(
    "declared",
    [
        {"image_processor_type": "PoolFormerImageProcessor"},  # each used nowhere else: some lines are logged once
        {"image_processor_type": "LevitImageProcessorFast"},
        {"feature_extractor_type": "ConvNextFeatureExtractor"},
        {},
    ],
    ids=str,
)
def test_image_processor_loads_silently(folder, noise, declared):
    (folder / "preprocessor_config.json").write_text(json.dumps(declared))
    load_image_processor(source_of(folder))
    assert noise.getvalue() == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no image processor that transformers knows"),
        ('{"image_processor_type": "NoSuchImageProcessor"}', "has no image processor that transformers knows"),
        ('{"image_processor_type": "BertModel"}', "`image_processor_type` 'BertModel': expected"),
        ('{"feature_extractor_type": "Trainer"}', "`feature_extractor_type` 'Trainer': expected"),
    ],
)
def test_image_processor_refused(folder, content, message):
    for file in folder.glob("*processor_config.json"):
        file.unlink()
    edit_json(folder / "config.json", model_type="bert")
    if content is not None:
        (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        load_image_processor(source_of(folder))


# The Hub


@pytest.fixture
def repo(hub, saved, request, tmp_path, monkeypatch):
    """A fresh repo with the tiny ViT (and a pickle and code, never to be fetched); returns its name and `pull`."""
    monkeypatch.setattr("hf_tsc.hub.retry.sleep", lambda seconds: waits.append(seconds))
    waits: list[float] = []
    # The client waits between tries of its own.
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    )
    name = f"someone/{request.node.originalname}"
    files = {file.name: file.read_bytes() for file in saved["vit"].iterdir()}
    extra = {
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"print()",
        "sub/model.safetensors": b"x",
        "README.md": b"# x",
    }
    hub.reset()
    hub.commit(name, files | extra)
    yield Repo(hub, name, files | extra, tmp_path / "cache", waits)
    hub.reset()


class Repo:
    def __init__(self, hub, name, files, cache, waits):
        self.hub, self.name, self.files, self.cache, self.waits = hub, name, files, cache, waits

    def pull(self, **kwargs) -> Source:
        return resolve_model(self.name, cache_dir=self.cache, **kwargs)

    def asked(self, text: str) -> int:
        return sum(text in request.path for request in self.hub.requests)


def test_pull_is_pinned_verified_and_bit_exact(repo, saved):
    source = repo.pull()
    assert (source.repo_id, source.revision) == (repo.name, repo.hub.main[repo.name])
    fetched = {
        str(file.relative_to(source.path)): file.read_bytes() for file in source.path.rglob("*") if file.is_file()
    }
    assert fetched == {n: d for n, d in repo.files.items() if n.endswith((".json", ".md")) or n == "model.safetensors"}
    assert source.file_hashes == resolve_model(str(saved["vit"])).file_hashes
    assert len(source.file_hashes) == 1
    repo.hub.reset()
    model, _ = load_model(source, auto_class=AutoModelForImageClassification)
    load_image_processor(source)
    assert repo.hub.requests == []
    assert model.config.name_or_path == repo.name
    expected, _ = load_classifier(saved["vit"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_revision_is_honoured(repo):
    first = repo.hub.main[repo.name]
    repo.hub.commit(repo.name, {"config.json": b"[]"})
    assert repo.pull(revision=first).revision == first
    with pytest.raises(UsageError, match="JSON list"):
        repo.pull(revision="main")


def test_main_that_moves_in_between_is_harmless(repo, monkeypatch):
    first, files = repo.hub.main[repo.name], repo.files

    def look_up_then_move(*args, real=HfApi.model_info, **kwargs):
        answer = real(*args, **kwargs)
        repo.hub.commit(repo.name, files | {"model.safetensors": b"moved"})
        return answer

    monkeypatch.setattr(HfApi, "model_info", look_up_then_move)
    source = repo.pull()
    assert repo.hub.main[repo.name] != first
    assert source.revision == first
    assert (source.path / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_repo_under_an_old_name_gets_its_own(repo, monkeypatch):
    def renamed(*args, real=HfApi.model_info, **kwargs):
        answer = real(*args, **kwargs)
        answer.id = "somebody/new-name"
        return answer

    monkeypatch.setattr(HfApi, "model_info", renamed)
    assert repo.pull().repo_id == "somebody/new-name"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_corrupted_byte_is_caught(repo, name):
    repo.hub.fault(f"GET .*resolve/.*/{name}", corrupt=True)
    with pytest.raises(HfTscError, match=f"{name} of {repo.name} differ from what the Hub lists") as caught:
        repo.pull()
    shutil.rmtree(str(caught.value).split("Delete ")[1].split(" and try")[0])
    repo.pull()


@pytest.mark.parametrize("change", ["edited", "added"])
def test_changed_cache_is_caught(repo, change):
    name = {"edited": "config.json", "added": "adapter_config.json"}[change]
    (repo.pull().path / name).write_text("{}")
    with pytest.raises(HfTscError, match=f"{name} of .* differ from what the Hub lists"):
        repo.pull()


def test_incomplete_cache_that_the_client_returns_is_caught(repo, monkeypatch):
    path = repo.pull().path
    (path / "config.json").unlink()
    # What the client does, with a log line, when the listing fails and a folder of that commit is in the cache.
    monkeypatch.setattr("hf_tsc.hub.source.snapshot_download", lambda *args, **kwargs: str(path))
    with pytest.raises(HfTscError, match=r"config\.json of .* differ from what the Hub lists"):
        repo.pull()


@pytest.mark.parametrize(
    ("token", "sent"),
    [(False, None), (None, "Bearer hf_saved"), (True, "Bearer hf_saved"), ("hf_given", "Bearer hf_given")],
)
def test_token_is_sent_only_if_asked(repo, monkeypatch, token, sent):
    monkeypatch.setenv("HF_TOKEN", "hf_saved")
    repo.pull(token=token)
    assert len(repo.hub.requests) > 5
    headers = [{k.lower(): v for k, v in request.headers.items()} for request in repo.hub.requests]
    assert {header.get("authorization") for header in headers} == {sent}


STEPS = {
    "find": "GET /api/models/[^/]+/[^/]+(/revision/.*)?$",
    "download": "GET .*/resolve/.*/model",
    "verify": "GET .*/tree/",
}


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"status": 408}, {"drop": True}], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_passing_failure_is_retried(repo, step, fault):
    repo.hub.fault(STEPS[step], **fault)
    assert repo.pull().revision == repo.hub.main[repo.name]
    assert repo.hub.faults[0].times == 0
    # The client itself asks again for listings and, mostly, for files.
    assert repo.waits == ([1.0] if step == "find" or (step == "download" and fault == {"status": 503}) else [])


def test_failure_that_the_client_wraps_is_retried(repo):
    repo.hub.fault(STEPS["verify"], status=503, times=6)  # all the client's tries of the listing before the download
    repo.pull()
    assert repo.waits == [1.0]


@pytest.mark.parametrize(
    ("headers", "wait"),
    [({"Retry-After": "7"}, 7.0), ({"ratelimit": '"api";r=0;t=9'}, 9.0), ({"Retry-After": "Wed, 21 Oct 2015"}, 1.0)],
)
def test_the_wait_asked_for_is_honoured(repo, headers, wait):
    repo.hub.fault(STEPS["find"], status=429, headers=headers)
    repo.pull()
    assert repo.waits == [wait]


def test_a_limit_that_is_not_used_up_is_not_waited_for(repo):
    repo.hub.fault(STEPS["find"], status=503, headers={"ratelimit": '"api";r=400;t=290'})
    repo.pull()
    assert repo.waits == [1.0]


def test_a_wait_without_end_is_not_waited_for(repo):
    repo.hub.fault(STEPS["find"], status=429, headers={"Retry-After": "4000"})
    with pytest.raises(HfTscError, match="the Hub answered 429 and asks to wait 4000 s"):
        repo.pull()
    assert repo.waits == []


DEAD = [{"status": 503}, {"drop": True}]


@pytest.mark.parametrize("fault", DEAD, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_a_dead_hub_and_nothing_in_the_cache_is_an_error(repo, step, fault):
    if step == "verify":
        fault = {**fault, "times": 1000}
    repo.hub.fault(STEPS[step], **{"times": 1000, **fault})
    with pytest.raises(
        HfTscError, match=f"Could not (find|download|verify) {repo.name}: .* Try again later"
    ) as caught:
        repo.pull()
    assert caught.value.exit_code == 1
    assert len(repo.waits) >= 3


@pytest.mark.parametrize("fault", DEAD, ids=str)
@pytest.mark.parametrize("step", ["find", "verify"])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_dead_hub_and_a_warm_cache_say_which_commit_is_used(repo, step, fault, pinned):
    first = repo.pull()
    repo.hub.commit(repo.name, repo.files)
    if step == "verify":
        repo.pull()  # each commit is another to the cache
    repo.hub.fault(STEPS[step], times=1000, **fault)
    source = repo.pull(revision=first.revision if pinned else None)
    assert source.file_hashes == first.file_hashes
    assert source.revision == (first.revision if pinned or step == "find" else repo.hub.main[repo.name])
    assert len(source.notes) == 1
    assert f"at commit {source.revision} in the cache was used" in source.notes[0]
    assert first.notes == ()


def test_a_subfolder_that_another_program_got_does_not_matter(repo):
    source = repo.pull()
    (source.path / "onnx").mkdir()
    (source.path / "onnx" / "model.onnx").write_text("")
    repo.hub.fault(STEPS["find"], times=1000, status=503)
    assert repo.pull().revision == source.revision


@pytest.mark.parametrize("change", ["edited", "added", "replaced"])
def test_a_changed_cache_is_caught_when_the_hub_is_dead(repo, change):
    path = repo.pull().path
    name = {"edited": "config.json", "added": "adapter_config.json", "replaced": "model.safetensors"}[change]
    if change == "replaced":
        (path / name).unlink()
    (path / name).write_text("{}")
    repo.hub.fault(STEPS["find"], times=1000, status=503)
    with pytest.raises(HfTscError, match=f"{name} of .* differ from what the Hub lists"):
        repo.pull()


@pytest.mark.parametrize("cached", [False, True])
def test_offline_mode_uses_the_cache_or_is_an_error(repo, monkeypatch, cached):
    first = repo.pull() if cached else None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if first is None:
        with pytest.raises(HfTscError, match=r"Could not find .*OfflineModeIsEnabled"):
            repo.pull()
    else:
        assert repo.pull().revision == first.revision
    assert repo.waits == []


def test_a_half_downloaded_commit_is_not_taken_from_the_cache(repo):
    repo.hub.fault(STEPS["download"], times=1000, status=503)
    for _ in range(2):  # the configuration comes; in the cache there is then a folder of that commit
        with pytest.raises(HfTscError, match=r"Could not download .*the Hub answered 503"):
            repo.pull()
    repo.hub.fault(STEPS["find"], times=1000, status=503)
    with pytest.raises(HfTscError, match=r"Could not find .*: the Hub answered 503"):
        repo.pull()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "it is gated; accept its terms"),
        (401, "Bad", "Could not download .*: the Hub refuses it .401.; give a token"),
        (404, "RepoNotFound", "there is no such repo, or it is private"),
    ],
)
def test_refused_by_the_hub(repo, status, code, message):
    repo.hub.fault("(HEAD|GET) .*/resolve/", times=1000, status=status, headers={"X-Error-Code": code})
    with pytest.raises(UsageError, match=message):
        repo.pull()
    assert repo.waits == []


def test_missing_revision(repo):
    with pytest.raises(UsageError, match=r"Could not find someone/\w+ at revision v9: there is no such revision"):
        repo.pull(revision="v9")


def test_revision_of_a_folder_refused(saved):
    with pytest.raises(UsageError, match="only Hub repos have revisions"):
        resolve_model(str(saved["vit"]), revision="main")


@pytest.mark.parametrize("name", ["suspect/vit", "a/b/c"])
def test_missing_repo_with_a_folder_of_that_name(hub, saved, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=name) as caught:
        resolve_model(name)
    assert "--local" not in str(caught.value)
    shutil.copytree(saved["vit"], tmp_path / name)
    with pytest.raises(UsageError, match=f"for the folder of that name write `./{name}` or add `--local`"):
        resolve_model(name)
    assert resolve_model(name, local=True).path == Path(name)


def test_a_folder_does_not_stand_in_for_a_repo(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / repo.name).mkdir(parents=True)
    assert repo.pull().repo_id == repo.name


def test_malicious_repo_is_refused(repo):
    config = json.loads(repo.files["config.json"]) | {"auto_map": {"AutoModel": "modeling.Evil"}}
    repo.hub.commit(repo.name, repo.files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(UsageError, match="`auto_map`"):
        repo.pull()
    assert repo.asked("modeling.py") == 0


# The loopback Hub itself, where no model is pulled


def test_loopback_datasets_and_folders(hub, tmp_path):
    files = {"data/train/0.txt": b"zero", "data/readme.txt": b"hi", "README.md": b"---\n---\n"}
    sha = hub.commit("datasets/someone/digits", files)
    api = HfApi()
    info = api.dataset_info("someone/digits")
    assert (info.sha, {sibling.rfilename for sibling in info.siblings}) == (sha, set(files))

    def listed(folder=None, **kwargs):
        return {e.path for e in api.list_repo_tree("someone/digits", folder, repo_type="dataset", **kwargs)}

    assert listed() == {"README.md", "data"}
    assert listed("data") == {"data/readme.txt", "data/train"}
    assert listed(recursive=True) == {*files, "data", "data/train"}
    with pytest.raises(EntryNotFoundError):
        listed("absent")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("someone/digits")

    def download(name):
        return Path(hf_hub_download("someone/digits", name, repo_type="dataset", cache_dir=tmp_path))

    assert download("data/train/0.txt").read_bytes() == b"zero"
    with pytest.raises(EntryNotFoundError):
        download("absent.txt")
    assert os.environ["HF_ENDPOINT"] == hub.endpoint
