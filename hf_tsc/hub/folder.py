"""What a folder with a model may hold: nothing that makes a loader read, run or fetch anything else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from hf_tsc.errors import UsageError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = "tokenizer_config.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
CARD = "README.md"

LARGEST_TEXT = 64 * 2**20  # bytes; the largest tokenizers have half of it
LARGEST_CONFIG = 2**20  # bytes
LARGEST_TEXTS = 4 * LARGEST_TEXT  # bytes; all texts of a repo together
LARGEST_FRONT_MATTER = 2**17  # characters
LARGEST_INTEGER = 2**24  # of a configuration: more than any vocabulary or number of pixels
LARGEST_COUNT = 10**5  # of what is counted one by one while a model is made
_YAML_TEXT = "tag:yaml.org,2002:str"
_COUNTED = re.compile(r"layers|depth|labels|classes|stages|blocks|experts")

_TEXTS = ("*.json", "*.txt", "*.jinja", "*.model", CARD)  # what transformers reads besides weights
# What a configuration must not hold, at any depth: it would make transformers or timm run, patch or read what the
# checks below have not seen. `attn_implementation` is not here because `load_model` overrides it.
_FORBIDDEN_KEYS = {
    "auto_map": "it names Python code of the repo, which is never run; use a model that transformers itself defines",
    "transformers_weights": f"it makes another file than {WEIGHTS} the weights; delete the key",
    "configuration_files": "it makes another file than config.json the configuration; delete the key",
    "quantization_config": "purification needs floating-point weights; give the model before quantisation",
    "fusion_config": "it patches the model's layers while loading; delete the key",
    "experts_implementation": "it can fetch a compiled kernel from the Hub; delete the key",
    "_experts_implementation": "it can fetch a compiled kernel from the Hub; delete the key",
    "checkpoint_path": "it makes timm unpickle a file; delete the key",
    "repo_path": "it makes the image processor read from another place; delete the key",
    "class_info_file": "it makes the image processor read another file; delete the key",
}
# The Auto classes call `from_pretrained` of any class in transformers that these keys name, in config.json, too.
# OneFormer's processors read a file of another repo, those of LayoutLM start a program for reading texts.
_PROCESSOR = re.compile(r"(?!OneFormer|LayoutLM|LayoutXLM)\w+(ImageProcessor(Fast|Pil)?|FeatureExtractor)")
_CLASS_NAMES = {
    "image_processor_type": (_PROCESSOR, "an image processor"),
    "feature_extractor_type": (_PROCESSOR, "an image processor"),
    "tokenizer_class": (re.compile(r"\w*Tokenizer(Fast)?|TokenizersBackend"), "a tokenizer"),
}
# What a suspect's configuration may hold and a purified one does not: kernels, pipelines and places of the suspect's.
_NOT_KEPT = re.compile(r".*attn_implementation|custom_pipelines|_?name_or_path|_commit_hash")


def check_folder(path: Path) -> None:
    """Refuse a folder that makes a loader read, run or fetch anything but its own configuration and weights.

    Raises:
        UsageError: one line that names the file or key, and what to do.
    """
    check_configs(path)
    for name in weight_names(path):
        _check_weights(path, name)


def check_configs(path: Path) -> None:
    """`check_folder` less the weights, which may not be there yet."""
    if not path.is_dir():
        raise UsageError(f"The folder {path} does not exist: give a folder with config.json and {WEIGHTS}.")
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path} has no config.json: give the folder that `save_pretrained` wrote.")
    if (path / "adapter_config.json").exists():
        raise UsageError(f"{path} has an adapter_config.json, which can name another model: merge the adapter first.")
    if any(path.glob("shard-*-model-*.safetensors")):
        raise UsageError(f"{path} has a distributed checkpoint (shard-*-model-*): save it again as {WEIGHTS}.")
    for file in sorted(path.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in _TEXTS):
            _check_place(file)
            check_size(file.name, file.stat().st_size, str(path))
    check_keys(path)


def check_keys(path: Path) -> None:
    """Refuse what the JSON files of a folder must not say.

    Raises:
        UsageError: one line that names file and key.
    """
    for name in (CONFIG, *PROCESSORS, TOKENIZER):
        if (path / name).is_file():
            _check_keys(path / name, bounded=name == CONFIG)


def _check_keys(file: Path, *, bounded: bool) -> None:
    for key, value in items(read_object(file)):
        if key in _FORBIDDEN_KEYS:
            raise UsageError(f"{file} has the key `{key}`: {_FORBIDDEN_KEYS[key]}.")
        if key == "architecture" and ":" in str(value):  # timm: `hf-hub:owner/name`, `local-dir:folder`
            raise UsageError(
                f"{file} has `architecture` {value!r}, which names another model: give a plain timm name."
            )
        if key == "backbone" and isinstance(value, str):
            raise UsageError(
                f"{file} has `backbone` {value!r}, which names another model: give a model that is whole in itself."
            )
        if key in _CLASS_NAMES and value is not None:
            pattern, expected = _CLASS_NAMES[key]
            if not pattern.fullmatch(str(value)):
                raise UsageError(f"{file} has `{key}` {value!r}: expected the name of {expected}.")
        if key == "architectures" and not isinstance(value, list | None):
            raise UsageError(f"{file} has `architectures` {value!r}: expected a list of names; correct the field.")
        if bounded:
            _check_numbers(file, key, value)


def _check_numbers(file: Path, key: str, value: Any) -> None:
    """Refuse a number that would take all memory or time before any check of the model itself."""
    limit = LARGEST_COUNT if _COUNTED.search(key) else LARGEST_INTEGER
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and abs(number) > limit:
            raise UsageError(f"{file} has `{key}` {number}: more than {limit}, which no model has; correct the field.")


def check_size(name: str, size: int, where: str) -> None:
    """Refuse a text file that is larger than any that a model has.

    Raises:
        UsageError: it is.
    """
    if name.endswith(".safetensors"):
        return
    limit = LARGEST_CONFIG if name in (CONFIG, *PROCESSORS, CARD) else LARGEST_TEXT
    if size > limit:
        raise UsageError(f"{name} of {where} has {size / 2**20:.0f} MB: expected at most {limit / 2**20:.0f}.")


def declared_license(path: Path) -> str | None:
    """The identifier of the license that a model card's front matter declares, where it is one (`apache-2.0`)."""
    try:
        with (path / CARD).open(encoding="utf-8") as file:
            text = file.read(LARGEST_FRONT_MATTER)
        match = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*\n", text, re.DOTALL)  # `\s*\n` would take quadratic time
        # Nodes, not values: merge keys (`<<`) in a value can grow without bound.
        front = yaml.compose(match[1], Loader=yaml.SafeLoader) if match else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    fields = front.value if isinstance(front, yaml.MappingNode) else []
    declared = [str(value.value) for key, value in fields if key.value == "license" and value.tag == _YAML_TEXT]
    return declared[-1] if declared and re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,39}", declared[-1]) else None


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON ({error}): expected a JSON object.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds a JSON {type(content).__name__}: expected a JSON object.")
    return content


def items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) in a JSON value, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
        value = list(value.values())
    for child in value if isinstance(value, list) else ():
        yield from items(child)


def kept(config: Any) -> Any:
    """A JSON value without what must not pass from a suspect to who loads the purified model, at any depth."""
    if isinstance(config, dict):
        return {key: kept(value) for key, value in config.items() if not _NOT_KEPT.fullmatch(key)}
    return [kept(value) for value in config] if isinstance(config, list) else config


def weight_names(path: Path) -> list[str]:
    """The files that `from_pretrained` takes weights from: model.safetensors, else those that the index names."""
    if (path / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (path / INDEX).is_file():
        raise no_weights(str(path))
    weight_map = read_object(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{path / INDEX} has no `weight_map`: expected an object, tensor name -> file name.")
    return sorted({str(name) for name in weight_map.values()})


def no_weights(where: str) -> UsageError:
    """The error of a folder or repo without any that are read."""
    return UsageError(
        f"{where} has no {WEIGHTS} (nor {INDEX}). Pickles (.bin, .pt) are never loaded: the model's owner can"
        " convert them with `save_pretrained` of a recent transformers."
    )


def _check_weights(path: Path, name: str) -> None:
    """Refuse weights that are not a file of the folder itself (a Hub snapshot links into the cache's `blobs`)."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise UsageError(f"{INDEX} names {name!r}: expected plain names of .safetensors files in {path}.")
    if not (path / name).is_file():
        raise UsageError(f"{INDEX} names {name}, which is not in {path}: get the missing file.")
    _check_place(path / name)


def _check_place(file: Path) -> None:
    """Refuse a link out of the folder: what it leads to could end in the purified model, and be pushed."""
    folder, target = file.parent.resolve(), file.resolve()
    homes = {folder, folder.parents[1] / "blobs"} if folder.parent.name == "snapshots" else {folder}
    if target.parent not in homes:
        raise UsageError(f"{file} is a link to {target}, outside the folder: put the file itself there.")


def some(names: Any) -> str:
    """Up to three names, sorted, and how many more there are."""
    names = sorted(str(name[0]) if isinstance(name, tuple) else str(name) for name in names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def git_oid(file: Path) -> str:
    """The sha1 by which git names a file's content."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
