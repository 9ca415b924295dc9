"""What a suspect's repo, or the way from it, can do to a user, and how each of these things must be answered.

`test_security.py` tries every row as a repo of the Hub and as a local folder; `recipes/security_docs.py` makes the
tables of docs/security.md of the same rows. What a row expects is what the tests compare with. Datasets are in
`hostile_datasets`, faults of the Hub in `hub_faults`.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loopback_hub_routes
import pytest
import torch
from huggingface_hub import HfApi
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_tsc.hub import Source

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PROCESSOR, TOKENIZER, PICKLE = "preprocessor_config.json", "tokenizer_config.json", "pytorch_model.bin"
CARD, LICENSE = "README.md", "apache-2.0"
NOTHING, TEXTS, ALL = "nothing", "texts", "texts and weights"  # what had been downloaded when the answer came


@dataclass(frozen=True)
class Refused:
    """One error of one line that holds `says`, when `after` had been downloaded from the Hub."""

    says: str
    after: str = TEXTS


@dataclass(frozen=True)
class Safe:
    """The healthy weights are loaded, and `holds` is true of what was got."""

    words: str = "only the healthy files are read"
    holds: Callable[[Got], bool] = lambda got: True
    after: str = ALL


@dataclass(frozen=True)
class Happens:
    """What is not prevented. It ends in an error that holds `says`, but `asks` this other server first."""

    words: str
    says: str
    asks: tuple[str, int]


Answer = Refused | Safe | Happens | None  # None: it cannot happen there


@dataclass(frozen=True)
class Got:
    """What a user has after a row that was safe."""

    source: Source
    attention: str
    license: str | None
    commit: str | None  # that the row's files were first committed as


@dataclass
class World:
    """Where a row happens."""

    folder: Path  # of the suspect
    marker: Path  # payloads create it
    hub: LoopbackHub
    repo: str
    cache: Path
    monkeypatch: pytest.MonkeyPatch
    pull: Callable[[], Source]

    def edit(self, name: str, **changes: Any) -> None:
        file = self.folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | changes))

    def write(self, name: str, content: str | bytes) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def edit_weights(self, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        tensors = load_file(self.folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, self.folder / WEIGHTS, metadata={"format": "pt"})

    def files(self) -> dict[str, bytes]:
        found = [file for file in self.folder.rglob("*") if file.is_file()]
        return {str(file.relative_to(self.folder)): file.read_bytes() for file in found}


@dataclass(frozen=True)
class Row:
    """One thing that can be done.

    Attributes:
        name: what is done.
        make: does it to the suspect's folder, which is then used, or committed to the Hub.
        hub, local: how it is answered there.
        then: does more on the Hub or on the way from it, after the commit.
    """

    name: str
    make: Callable[[World], Any]
    hub: Answer
    local: Answer
    then: Callable[[World], Any] = lambda world: None


def both(name: str, make: Callable[[World], Any], answer: Answer) -> Row:
    return Row(name, make, answer, answer)


def healthy(folder: Path) -> None:
    """The suspect as it would be if nobody was hostile."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    (folder / CARD).write_text(card(f"license: {LICENSE}"))


def card(front: str) -> str:
    return f"---\n{front}\n---\n# A model\n"


def as_it_is(world: World) -> None:
    """The suspect is healthy."""


# Code


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def payload(marker: Path) -> bytes:
    """A pickle that creates `marker` when it is loaded."""
    return pickle.dumps(_Touch(str(marker)))


def code(marker: Path) -> str:
    """A module that creates `marker` when it is imported."""
    return f"open({str(marker)!r}, 'w').close()\n"


def only_a_pickle(world: World) -> None:
    (world.folder / WEIGHTS).unlink()
    world.write(PICKLE, payload(world.marker))


def names_code(name: str) -> Callable[[World], None]:
    def make(world: World) -> None:
        world.edit(name, auto_map={"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"})
        world.write("evil.py", code(world.marker))

    return make


def sets(name: str, **changes: Any) -> Callable[[World], None]:
    return lambda world: world.edit(name, **changes)


def names_a_tokenizer(world: World) -> None:
    world.edit(TOKENIZER, tokenizer_class="BertModel")
    world.write("vocab.txt", "[PAD]\n[UNK]\n")


def names_a_pipeline(world: World) -> None:
    world.edit(CONFIG, custom_pipelines={"image-classification": {"impl": "evil.Evil", "pt": ["AutoModel"]}})
    world.write("evil.py", code(world.marker))


def same_attention(got: Got) -> bool:
    return got.attention == "sdpa"


KERNEL = Safe("loaded with `sdpa`; no kernel is asked for", same_attention)
RUNS_CODE = [
    both(
        "pickle with a payload, and no other weights", only_a_pickle, Refused("Pickles (.bin, .pt) are never loaded")
    ),
    both("pickle with a payload beside the weights", lambda w: w.write(PICKLE, payload(w.marker)), Safe()),
    both(
        "pickle with a payload called model.safetensors",
        lambda w: w.write(WEIGHTS, payload(w.marker)),
        Refused("is not a safetensors file", ALL),
    ),
    *(
        both(f"`auto_map` in {name}, with code", names_code(name), Refused("has the key `auto_map`"))
        for name in (CONFIG, PROCESSOR, "processor_config.json", TOKENIZER)
    ),
    both(
        "model type that transformers does not know",
        sets(CONFIG, model_type="evil"),
        Refused("expected an image classifier that transformers defines", ALL),
    ),
    *(
        both(f"kernel as `{key}`", sets(CONFIG, **{key: "evil/kernel"}), KERNEL)
        for key in ("attn_implementation", "_attn_implementation")
    ),
    *(
        both(f"`{key}` in config.json", sets(CONFIG, **{key: value}), Refused(f"has the key `{key}`"))
        for key, value in {
            "experts_implementation": "evil/kernel",
            "fusion_config": {"patch": True},
            "checkpoint_path": "evil.pth",
            "configuration_files": ["config.4.0.0.json"],
            "transformers_weights": "other.safetensors",
            "quantization_config": {"quant_method": "gptq", "bits": 4},
        }.items()
    ),
    both("`custom_pipelines` in config.json, with code", names_a_pipeline, Safe("the key is not read, and not kept")),
    both(
        "timm `architecture` of another repo",
        sets(CONFIG, architecture="hf-hub:evil/model"),
        Refused("which names another model"),
    ),
    both(
        "`image_processor_type` that is another class of transformers",
        sets(PROCESSOR, image_processor_type="Trainer"),
        Refused("expected the name of an image processor"),
    ),
    both(
        "`tokenizer_class` that is another class of transformers",
        names_a_tokenizer,
        Refused("expected the name of a tokenizer"),
    ),
    *(
        both(f"the same, `{key}` in config.json", sets(CONFIG, **{key: name}), Refused(f"expected the name of {what}"))
        for key, name, what in (
            ("image_processor_type", "ViTForImageClassification", "an image processor"),
            ("tokenizer_class", "BertModel", "a tokenizer"),
        )
    ),
    both(
        "image processor that starts another program",
        sets(PROCESSOR, image_processor_type="LayoutLMv3ImageProcessor"),
        Refused("expected the name of an image processor"),
    ),
    *(
        both(f"`{key}` of an image processor", sets(PROCESSOR, **{key: value}), Refused(f"has the key `{key}`"))
        for key, value in {"repo_path": "evil/other", "class_info_file": "classes.json"}.items()
    ),
    both("`backbone` of another repo", sets(CONFIG, backbone="evil/other"), Refused("which names another model")),
    both(
        "card whose YAML calls a function",
        lambda w: w.write(CARD, card(f"license: !!python/object/apply:builtins.open ['{w.marker}', 'w']")),
        Safe("the license is left out", lambda got: got.license is None),
    ),
]

# Weights from elsewhere, or that do not fit


def index(world: World, first: str, *, make: bool = True) -> None:
    """Two shards, of which the index calls the first one by another name, where a copy of it is."""
    tensors = load_file(world.folder / WEIGHTS)
    (world.folder / WEIGHTS).rename(world.folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    weight_map["classifier.bias"] = first
    place = world.folder / first
    if make and not place.exists() and place.parent.is_dir():
        save_file(tensors, place, metadata={"format": "pt"})
    world.write(INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))


def lists_files_outside(world: World) -> None:
    """As git would not do."""
    outside = dict.fromkeys(("../evil.json", "../../evil.txt", "/evil.json", "sub/../../evil.json"), b"{}")
    world.hub.commit(world.repo, world.files() | outside)


def link(name: str) -> Callable[[World], None]:
    def make(world: World) -> None:
        outside = (world.folder / name).rename(world.folder.parent / name)
        (world.folder / name).symlink_to(outside)

    return make


def with_index(world: World) -> None:
    world.write(INDEX, json.dumps({"metadata": {}, "weight_map": {"classifier.bias": PICKLE}}))
    world.write(PICKLE, payload(world.marker))


def twice(data: bytes) -> bytes:
    """Weights in whose header all tensors of a shape have the same bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    header, first = json.loads(data[8 : 8 + size]), {}
    for entry in header.values():
        if "shape" in entry:
            entry["data_offsets"] = first.setdefault(str(entry["shape"]), entry["data_offsets"])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def damaged(change: Callable[[bytes], bytes]) -> Callable[[World], None]:
    return lambda world: world.write(WEIGHTS, change((world.folder / WEIGHTS).read_bytes()))


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[World], None]:
    return lambda world: world.edit_weights(edit)


LEAVES = Refused("expected plain names of .safetensors files", ALL)
ABSENT = Refused("names lost.safetensors, which is not in", ALL)
NO_FIT, NO_HEADER = "do not fit its config.json", Refused("is not a safetensors file", ALL)
WRONG_WEIGHTS = [
    both("index with `../other.safetensors`", lambda w: index(w, "../other.safetensors"), LEAVES),
    both("index with a whole path", lambda w: index(w, str(w.folder.parent / "other.safetensors")), LEAVES),
    both("index with a pickle", lambda w: index(w, PICKLE), LEAVES),
    both("index with a way through a folder", lambda w: index(w, "no/../lost.safetensors"), LEAVES),
    both("index with a file that is not there", lambda w: index(w, "lost.safetensors", make=False), ABSENT),
    both("index with a pickle, beside the weights", with_index, Safe()),
    Row("file called ../evil.json", as_it_is, Safe(), None, lists_files_outside),
    Row("weights that are a link out of the folder", link(WEIGHTS), None, Refused("outside the folder")),
    Row("configuration that is a link out of the folder", link(CONFIG), None, Refused("outside the folder")),
    both(
        "adapter_config.json that names another repo",
        sets("adapter_config.json", base_model_name_or_path="evil/base", peft_type="LORA"),
        Refused("merge the adapter first"),
    ),
    both(
        "distributed checkpoint beside the weights",
        lambda w: shutil.copy(w.folder / WEIGHTS, w.folder / "shard-00000-model-00001-of-00001.safetensors"),
        Refused("has a distributed checkpoint", ALL),
    ),
    both("key missing", weights(lambda t: t.pop("classifier.bias")), Refused(f"{NO_FIT} (missing_keys", ALL)),
    both(
        "key too many",
        weights(lambda t: t.update({"backdoor.weight": torch.zeros(2)})),
        Refused(f"{NO_FIT} (unexpected_keys", ALL),
    ),
    both(
        "tensor of another shape",
        weights(lambda t: t.update({"classifier.bias": torch.zeros(4)})),
        Refused(f"{NO_FIT} (mismatched_keys", ALL),
    ),
    both("NaN", weights(lambda t: t["classifier.bias"].fill_(float("nan"))), Refused("holds NaN or infinity", ALL)),
    both(
        "infinity", weights(lambda t: t["classifier.bias"].fill_(float("inf"))), Refused("holds NaN or infinity", ALL)
    ),
    both(
        "integers for weights",
        weights(lambda t: t.update({name: tensor.to(torch.int8) for name, tensor in t.items()})),
        Refused("stores I8: expected one of F64, F32, F16, BF16", ALL),
    ),
    both("header that claims 2^60 bytes", damaged(lambda data: struct.pack("<Q", 2**60) + data[8:]), NO_HEADER),
    both("header that is not JSON", damaged(lambda data: data[:8] + b"\xff" * 64 + data[72:]), NO_HEADER),
    both("file that ends too early", damaged(lambda data: data[:-100]), NO_HEADER),
    both("file without a byte", damaged(lambda data: b""), NO_HEADER),
    both("tensors that share their bytes", damaged(twice), NO_HEADER),
]

# Sizes


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def large_texts(world: World) -> None:
    """Ten texts that the Hub lists with 60 MB each."""
    for i in range(10):
        world.write(f"notes{i}.txt", "notes")


def lists_them_large(world: World) -> None:
    def sibling(path: str, data: bytes, real: Any = loopback_hub_routes.sibling) -> dict[str, Any]:
        return real(path, data) | ({"size": 60 * 2**20} if path.startswith("notes") else {})

    world.monkeypatch.setattr(loopback_hub_routes, "sibling", sibling)


def free_memory(world: World) -> None:
    world.monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))


def free_disk(world: World) -> None:
    world.monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))


TOO_MANY = "which no model has"
OUTGROWS = "does not fit the weights: it describes more than"
TOO_LARGE = [
    *(
        both(f"`{key}` of {number:,}", sets(CONFIG, **{key: number}), Refused(f"has `{key}` {number}: more than"))
        for key, number in {
            "num_labels": 10**9,
            "num_hidden_layers": 10**6,
            "hidden_size": 10**8,
            "image_size": 10**9,
            "num_channels": -(10**9),
        }.items()
    ),
    *(
        both(f"`{key}` of {number:,}, not as stored", sets(CONFIG, **{key: number}), Refused(OUTGROWS, ALL))
        for key, number in {"hidden_size": 10**7, "num_hidden_layers": 99_999, "image_size": 10**6}.items()
    ),
    both(
        "`dtype` that is none",
        sets(CONFIG, dtype="os.system"),
        Refused("expected an image classifier that transformers defines", ALL),
    ),
    both("`patch_size` of 0", sets(CONFIG, patch_size=0), Refused("makes no model: ZeroDivisionError", ALL)),
    both(
        "`hidden_size` of 1e9, a float",
        sets(CONFIG, hidden_size=1e9),
        Refused("expected an image classifier that transformers defines", ALL),
    ),
    Row(
        "config.json of 2 MB",
        sets(CONFIG, text="x" * 2**21),
        Refused("has 2 MB: expected at most 1", NOTHING),
        Refused("has 2 MB: expected at most 1"),
    ),
    both(
        "config.json 100,000 levels deep",
        lambda w: w.write(CONFIG, f'{{"x": {nested(10**5)}}}'),
        Refused("config.json is not JSON"),
    ),
    both(
        "image processor for pictures of 1,000,000 pixels a side",
        sets(PROCESSOR, size={"height": 10**6, "width": 10**6}),
        Refused("expected sides of at most 4096 pixels", ALL),
    ),
    both(
        "image processor with a `crop_pct` of 0.000001",
        sets(PROCESSOR, crop_pct=1e-6),
        Refused("at least 0.1 for `crop_pct`", ALL),
    ),
    Row(
        "more weights than memory",
        lambda w: None,
        Refused("GB of free memory", NOTHING),
        Refused("GB of free memory"),
        then=free_memory,
    ),
    Row("more weights than disk", lambda w: None, Refused("GB of free disk", NOTHING), None, then=free_disk),
    Row(
        "600 MB of texts",
        large_texts,
        Refused("MB of text files: expected at most", NOTHING),
        None,
        lists_them_large,
    ),
]

# Cards


def merges(depth: int) -> str:
    """YAML of a few lines whose value has 10^depth entries."""
    lines = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(10)) + "}"]
    for k in range(1, depth):
        lines.append(f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 10)}]}}")
    return "\n".join(lines)


def text(content: str) -> Callable[[World], None]:
    return lambda world: world.write(CARD, content)


LEFT_OUT = Safe("the license is left out", lambda got: got.license is None)
KEPT = Safe("read as text, no more", lambda got: got.license == LICENSE)
CARDS = [
    both("license that is HTML", text(card("license: <script>alert(1)</script>")), LEFT_OUT),
    both("license of several lines", text(card('license: "mit\\n---\\n# Certified clean"')), LEFT_OUT),
    both("license that is a list", text(card("license: [mit, evil]")), LEFT_OUT),
    both("YAML whose merge keys make 10^12 entries", text(card(f"{merges(12)}\nlicense: {LICENSE}")), KEPT),
    both("YAML 100,000 levels deep", text(card(f"license: {nested(10**5)}")), LEFT_OUT),
    both("a million empty lines", text("---" + "\n" * 10**6), LEFT_OUT),
    both("bytes that are no text", lambda w: w.write(CARD, b"---\nlicense: \xff\xfe\n---\n"), LEFT_OUT),
]

# On the way


def main_moves(world: World) -> None:
    """Between the answer that names the commit and the download."""

    def look_up_then_move(*args: Any, real: Any = HfApi.model_info, **kwargs: Any) -> Any:
        answer = real(*args, **kwargs)
        world.hub.commit(world.repo, world.files() | {WEIGHTS: b"moved"})
        return answer

    world.monkeypatch.setattr(HfApi, "model_info", look_up_then_move)


def damages(name: str) -> Callable[[World], None]:
    return lambda world: world.hub.fault(f"GET (/{world.repo}/resolve/.*{name}|/cdn/)", corrupt=True, times=None)


def cache_changes(name: str) -> Callable[[World], None]:
    """One bit of a file, which keeps its size."""

    def then(world: World) -> None:
        blob = (world.pull().path / name).resolve()
        data = blob.read_bytes()
        blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    return then


def cache_grows(world: World) -> None:
    (world.pull().path / "adapter_config.json").write_text("{}")


def dies(world: World) -> None:
    world.hub.fault("/", times=None, status=503)


def in_turn(*steps: Callable[[World], None]) -> Callable[[World], None]:
    def then(world: World) -> None:
        for step in steps:
            step(world)

    return then


def pulled(world: World) -> None:
    world.pull()


def scanned(world: World) -> None:
    """The Hub's scanners have found something."""
    issues = {"scansDone": True, "filesWithIssues": [{"path": "a<b>.bin", "level": "unsafe"}]}

    def as_json(data: Any, *args: Any, real: Any = loopback_hub_routes.as_json) -> Any:
        is_info = isinstance(data, dict) and "siblings" in data
        return real(data | {"securityRepoStatus": issues} if is_info else data, *args)

    world.monkeypatch.setattr(loopback_hub_routes, "as_json", as_json)


def beside_a_folder_of_that_name(world: World) -> None:
    """Which transformers would load instead."""
    here = world.folder.parent / "here"
    other = Path(shutil.copytree(world.folder, here / world.repo))
    (other / CONFIG).write_text("{}")
    world.monkeypatch.chdir(here)


DIFFERS = "differ from what the Hub lists"
ON_THE_WAY = [
    Row(
        "main moves while it is pulled",
        as_it_is,
        Safe("all files are of the commit that was listed", lambda got: got.source.revision == got.commit),
        None,
        main_moves,
    ),
    Row("a bit of the weights flips on the way", as_it_is, Refused(DIFFERS, ALL), None, damages(WEIGHTS)),
    Row("a bit of config.json flips on the way", as_it_is, Refused(DIFFERS), None, damages(CONFIG)),
    Row("a bit of the weights flips in the cache", as_it_is, Refused(DIFFERS, NOTHING), None, cache_changes(WEIGHTS)),
    Row("a file is put into the cache", as_it_is, Refused(DIFFERS, NOTHING), None, cache_grows),
    Row(
        "a bit flips in the cache, and the Hub is down",
        as_it_is,
        Refused(DIFFERS, NOTHING),
        None,
        in_turn(cache_changes(WEIGHTS), dies),
    ),
    Row(
        "the Hub is down, and the cache is whole",
        as_it_is,
        Safe(
            "the commit in the cache is used; a note says so and names it",
            lambda got: f"at commit {got.commit} in the cache was used" in got.source.notes[0],
            NOTHING,
        ),
        None,
        in_turn(pulled, dies),
    ),
    Row(
        "the Hub's scanners report a file",
        as_it_is,
        Safe("a note says so", lambda got: "report issues in a_b_.bin of" in got.source.notes[0]),
        None,
        scanned,
    ),
    Row(
        "a folder here has the repo's name",
        as_it_is,
        Safe("the repo is used", lambda got: got.source.repo_id is not None),
        Safe("the folder that was named with its path is used", lambda got: got.source.repo_id is None),
        beside_a_folder_of_that_name,
    ),
]

MODELS = {"Code": RUNS_CODE, "Weights": WRONG_WEIGHTS, "Sizes": TOO_LARGE, "Cards": CARDS, "On the way": ON_THE_WAY}
