"""Suspect means hostile: get a model's files without running or trusting any.

Always in this order: pin one commit, fetch only the files that are read, compare their checksums with the Hub's,
refuse every declaration that makes `transformers` read something else, load float32 weights from the folder.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx, parse_ratelimit_headers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers import PreTrainedModel as Model
from transformers.utils import logging as transformers_logging

from .errors import HfTscError, UsageError

T = TypeVar("T")

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = "tokenizer_config.json"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "README.md"]
_RETRY_WAITS = (1.0, 2.0, 4.0)  # seconds
_LONGEST_WAIT = 300.0  # seconds; the window of the Hub's own rate limit
_FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What a configuration must not hold, at any depth: it would make transformers or timm run, patch or read what the
# checks below have not seen. `attn_implementation` is not here because `load_model` overrides it.
_FORBIDDEN_KEYS = {
    "auto_map": "it names Python code of the repo, which is never run; use a model that transformers itself defines",
    "transformers_weights": f"it makes another file than {_WEIGHTS} the weights; delete the key",
    "configuration_files": "it makes another file than config.json the configuration; delete the key",
    "quantization_config": "purification needs floating-point weights; give the model before quantisation",
    "fusion_config": "it patches the model's layers while loading; delete the key",
    "experts_implementation": "it can fetch a compiled kernel from the Hub; delete the key",
    "_experts_implementation": "it can fetch a compiled kernel from the Hub; delete the key",
    "checkpoint_path": "it makes timm unpickle a file; delete the key",
}

# The client's error -> what to tell the user; a subclass stands before its base.
_ADVICE: dict[type[Exception], str] = {
    hub_errors.HFValidationError: "this is not a repo id (`owner/name`)",
    hub_errors.GatedRepoError: "it is gated; accept its terms on the Hub, then give a token",
    hub_errors.RepositoryNotFoundError: "there is no such repo, or it is private (then give a token)",
    hub_errors.RevisionNotFoundError: "there is no such revision; give a branch, a tag or a commit of it",
}


@dataclass(frozen=True)
class Source:
    """Where a model's files are, and what identifies them.

    Attributes:
        path: the folder with the files; inside the Hub's cache for a repo.
        repo_id: id on the Hub, None for a local folder.
        revision: the commit that was fetched, 40 hexadecimal digits, None for a local folder.
        file_hashes: file name -> sha256 (hexadecimal) of each safetensors file.
    """

    path: Path
    repo_id: str | None
    revision: str | None
    file_hashes: dict[str, str]

    @property
    def name(self) -> str:
        """Repo id, or the folder's own name without its place."""
        return self.repo_id or self.path.resolve().name


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    local: bool = False,
    token: str | bool | None = False,
    cache_dir: str | Path | None = None,
) -> Source:
    """Get and check the files of a model; nothing is loaded.

    `./x`, `../x`, `/x` and `~/x` are folders, anything else is a repo id, even when a folder has that name (which
    `transformers` would prefer): a folder never stands in for a repo by accident.

    Args:
        model: repo id or folder.
        revision: branch, tag or commit of the repo; None is its default branch.
        local: `model` is a folder, however it is spelled.
        token: sent to the Hub; False sends none, None or True the saved one.
        cache_dir: the Hub cache; None is the default one.

    Raises:
        UsageError: no such folder, repo or revision, or `check_folder` refuses the files.
        HfTscError: the Hub did not answer, or the files are not those that it lists.
    """
    path, repo_id, sha = Path(model).expanduser(), None, None
    if not (local or model in {".", "..", "~"} or model.startswith(("./", "../", "/", "~/"))):
        repo_id = model
        path, sha = _fetch(model, revision, token, cache_dir)
    elif revision is not None:
        raise UsageError(f"revision={revision!r} was given with the folder {model}: only Hub repos have revisions.")
    check_folder(path)
    return Source(path, repo_id, sha, {file.name: _sha256(file) for file in sorted(path.glob("*.safetensors"))})


def _fetch(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None
) -> tuple[Path, str]:
    """The folder with the verified files of one commit, and the commit; nothing reads subfolders, so none is got."""
    api = HfApi(token=token)
    # Not `resolve_revision`, which answers from the cache when the Hub is down.
    at = f" at revision {revision}" if revision else ""
    sha = _ask_hub(f"find {repo_id}{at}", repo_id, lambda: str(api.model_info(repo_id, revision=revision).sha))

    def download() -> str:
        return snapshot_download(
            repo_id,
            revision=sha,
            allow_patterns=_PATTERNS,
            ignore_patterns=["*/*"],
            token=token,
            cache_dir=cache_dir,
        )

    path = Path(_ask_hub(f"download {repo_id}", repo_id, download))
    # Lists the files anew, so that what `snapshot_download` took from the cache does not pass unseen.
    found = _ask_hub(
        f"verify {repo_id}",
        repo_id,
        lambda: api.verify_repo_checksums(repo_id, revision=sha, cache_dir=cache_dir),
    )
    missing = [name for name in found.missing_paths if "/" not in name and any(fnmatch(name, p) for p in _PATTERNS)]
    wrong = [mismatch["path"] for mismatch in found.mismatches] + missing + found.extra_paths
    if wrong:
        raise HfTscError(
            f"{_some(wrong)} of {repo_id} differ from what the Hub lists for commit {sha}: a damaged download or a"
            f" changed cache. Delete {path.parents[1]} and try again."
        )
    return path, sha


def _ask_hub(what: str, repo_id: str, call: Callable[[], T]) -> T:
    """Do one step against the Hub; while its failure may pass (408, 429, 5xx, transport), wait and ask again."""
    for wait in (*_RETRY_WAITS, None):
        try:
            return call()
        except (
            hub_errors.HfHubHTTPError,
            hub_errors.HFValidationError,
            hub_errors.LocalEntryNotFoundError,
            hub_errors.OfflineModeIsEnabled,
            httpx.TransportError,
        ) as error:
            # With nothing in its cache to fall back on, the client wraps what really happened.
            wrapped = isinstance(error, hub_errors.LocalEntryNotFoundError)
            cause = error.__cause__ or error if wrapped else error
            asked = _seconds_asked(cause)
            if wait is None or asked is None or asked > _LONGEST_WAIT:
                raise _hub_error(what, repo_id, cause) from error
            sleep(max(wait, asked))
    raise AssertionError("the last round returns or raises")


def _seconds_asked(error: BaseException) -> float | None:
    """How long the Hub asks us to wait: 0 if it does not say, None if asking again is of no use."""
    if not isinstance(error, hub_errors.HfHubHTTPError):
        return 0.0 if isinstance(error, httpx.TransportError) else None
    if error.response.status_code not in {408, 429} and error.response.status_code < 500:
        return None
    limit = parse_ratelimit_headers(error.response.headers)
    retry_after = error.response.headers.get("Retry-After", "")  # the Hub gives seconds; a date says nothing here
    return max(float(retry_after) if retry_after.isdigit() else 0.0, limit.reset_in_seconds if limit else 0.0)


def _hub_error(what: str, repo_id: str, cause: BaseException) -> HfTscError:
    """The error of this package, in one line, for the client's `cause`."""
    hint = f"; for the folder of that name write `./{repo_id}` or add `--local`" if Path(repo_id).is_dir() else ""
    for kind, advice in _ADVICE.items():
        if isinstance(cause, kind):
            return UsageError(f"Could not {what}: {advice}{hint}.")
    if isinstance(cause, hub_errors.HfHubHTTPError):
        if cause.response.status_code in {401, 403}:
            return UsageError(f"Could not {what}: the Hub refuses it; give a token that may read it.")
        waits = f" and asks to wait {asked:.0f} s" if (asked := _seconds_asked(cause)) else ""
        reason = f"the Hub answered {cause.response.status_code}{waits}"
    else:
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    return HfTscError(f"Could not {what}: {reason}. No cached copy was used; try again later.")


def check_folder(path: Path) -> None:
    """Refuse a folder that makes a loader read, run or fetch anything but its own configuration and weights.

    Raises:
        UsageError: one line that names the file or key, and what to do.
    """
    if not path.is_dir():
        raise UsageError(f"The folder {path} does not exist: give a folder with config.json and {_WEIGHTS}.")
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} has no config.json: give the folder that `save_pretrained` wrote.")
    if (path / "adapter_config.json").exists():
        raise UsageError(f"{path} has an adapter_config.json, which can name another model: merge the adapter first.")
    if any(path.glob("shard-*-model-*.safetensors")):
        raise UsageError(f"{path} has a distributed checkpoint (shard-*-model-*): save it again as {_WEIGHTS}.")
    for file in (path / name for name in ("config.json", *_PROCESSORS, _TOKENIZER)):
        for key, value in _items(_read_object(file)) if file.is_file() else ():
            if key in _FORBIDDEN_KEYS:
                raise UsageError(f"{file} has the key `{key}`: {_FORBIDDEN_KEYS[key]}.")
            if key == "architecture" and ":" in str(value):  # timm: `hf-hub:owner/name`, `local-dir:folder`
                raise UsageError(
                    f"{file} has `architecture` {value!r}, which names another model: give a plain timm name."
                )
    for name in _weight_names(path):
        _check_weights(path, name)


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON ({error}): expected a JSON object.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds a JSON {type(content).__name__}: expected a JSON object.")
    return content


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) in a JSON value, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
        value = list(value.values())
    for child in value if isinstance(value, list) else ():
        yield from _items(child)


def _weight_names(path: Path) -> list[str]:
    """The files that `from_pretrained` takes weights from: model.safetensors, else those that the index names."""
    if (path / _WEIGHTS).is_file():
        return [_WEIGHTS]
    if not (path / _INDEX).is_file():
        raise UsageError(
            f"{path} has no {_WEIGHTS} (nor {_INDEX}). Pickles (.bin, .pt) are never loaded: the model's owner can"
            " convert them with `save_pretrained` of a recent transformers."
        )
    weight_map = _read_object(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{path / _INDEX} has no `weight_map`: expected an object, tensor name -> file name.")
    return sorted({str(name) for name in weight_map.values()})


def _check_weights(path: Path, name: str) -> None:
    """Refuse weights that are not a file of the folder itself (a Hub snapshot links into the cache's `blobs`)."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise UsageError(f"{_INDEX} names {name!r}: expected plain names of .safetensors files in {path}.")
    if not (path / name).is_file():
        raise UsageError(f"{_INDEX} names {name}, which is not in {path}: get the missing file.")
    folder, target = path.resolve(), (path / name).resolve()
    homes = {folder, folder.parents[1] / "blobs"} if folder.parent.name == "snapshots" else {folder}
    if target.parent not in homes:
        raise UsageError(f"{path / name} is a link to {target}, outside the folder: put the file itself there.")


def load_model(source: Source, *, auto_class: Any, dtype: torch.dtype = torch.float32) -> tuple[Model, torch.dtype]:
    """Load a checked folder, in eval mode, if every tensor of model and files corresponds and is finite.

    Nothing but the folder is read; that is also why `transformers` never asks the Hub to convert the weights.

    Args:
        source: what `resolve_model` returned.
        auto_class: `AutoModelForImageClassification`, `AutoModel`, ...
        dtype: of the loaded floating-point tensors.

    Returns:
        The model, and the dtype in which most floating-point tensors of the files are stored.

    Raises:
        UsageError: no model of `auto_class`; keys missing, unexpected or of another shape; NaN or infinity.
    """
    with quiet():
        config = _read_config(source.path, auto_class)
        stored_dtype = _stored_dtype(source.path)
        classes = auto_class._model_mapping[type(config)]
        classes = classes if isinstance(classes, tuple | list) else (classes,)
        try:
            model, info = auto_class.from_pretrained(
                source.path,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                # Overrides what the configuration asks for, at any depth: it could name a kernel on the Hub.
                attn_implementation="sdpa" if all(cls._supports_sdpa for cls in classes) else "eager",
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported in `info` instead of raised, and refused below
            )
        except ImportError as error:
            needed = f"{config.model_type} models need a package that is not installed"
            raise UsageError(f"{source.path}: {needed}: {' '.join(str(error).split())[:200]}") from error
        except Exception as error:  # a constructor that is given a field out of range raises anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UsageError(f"{source.path / 'config.json'} makes no model: {reason}; correct the field.") from error
    wrong = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in info.items() if keys)
    if wrong:
        raise UsageError(f"The weights of {source.path} do not fit its config.json ({wrong}): give a complete model.")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(f"`{name}` of {source.path} holds NaN or infinity: this model cannot be purified.")
    model.config.name_or_path = source.repo_id or ""  # not the local path: it would reach model cards
    return model, stored_dtype


def _read_config(path: Path, auto_class: Any) -> PreTrainedConfig:
    """The configuration, if it is one of a model that `auto_class` can load."""
    kind = "image classifier" if auto_class is AutoModelForImageClassification else auto_class.__name__
    model_type = _read_object(path / "config.json").get("model_type")
    problem = f"{path / 'config.json'} has model type {model_type!r}: expected an {kind} that transformers defines"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, AttributeError, hub_errors.StrictDataclassError) as error:
        raise UsageError(f"{problem}. {' '.join(str(error).split())[:200]}") from error
    if type(config) not in auto_class._model_mapping:
        raise UsageError(f"{problem}.")
    return config


def _stored_dtype(path: Path) -> torch.dtype:
    """The most common floating-point dtype in the headers of the weights."""
    count: Counter[str] = Counter()
    for name in _weight_names(path):
        try:
            with safe_open(path / name, framework="pt") as file:
                count.update(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise UsageError(f"{path / name} is not a safetensors file ({error}): get it again.") from error
    for dtype, _ in count.most_common():
        if dtype in _FLOAT_DTYPES:
            return _FLOAT_DTYPES[dtype]
    raise UsageError(f"{path} stores {_some(count) or 'nothing'}: expected one of {', '.join(_FLOAT_DTYPES)}.")


def load_image_processor(source: Source) -> Any:
    """The image processor that the folder declares.

    Raises:
        UsageError: the folder has none, or one that `transformers` does not define.
    """
    files = [source.path / name for name in _PROCESSORS if (source.path / name).is_file()]
    for key, value in (item for file in files for item in _items(_read_object(file))):
        # `AutoImageProcessor` would call `from_pretrained` of any class in transformers that is named here.
        if key in {"image_processor_type", "feature_extractor_type"} and not re.fullmatch(
            r"\w+(ImageProcessor(Fast|Pil)?|FeatureExtractor)", str(value)
        ):
            raise UsageError(f"{source.path} has `{key}` {value!r}: expected the name of an image processor.")
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{source.path} has no image processor that transformers knows: add a preprocessor_config.json."
        ) from error


def load_tokenizer(source: Source) -> Any:
    """The tokenizer that the folder declares.

    Raises:
        UsageError: the folder has none, or one that `transformers` does not define.
    """
    config, wanted = source.path / _TOKENIZER, f"add {_VOCABULARIES[0]} and {_TOKENIZER}"
    if not any((source.path / name).is_file() for name in _VOCABULARIES):  # transformers would make an empty one
        raise UsageError(f"{source.path} has no tokenizer: {wanted}.")
    named = str(_read_object(config).get("tokenizer_class") or "Tokenizer") if config.is_file() else "Tokenizer"
    if not re.fullmatch(r"\w*Tokenizer(Fast)?|TokenizersBackend", named):
        raise UsageError(f"{config} has `tokenizer_class` {named!r}: expected the name of a tokenizer.")
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"{source.path} has no tokenizer that transformers knows: {wanted}.") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence `transformers`: whatever matters about a load is raised by this module."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _some(names: Any) -> str:
    """Up to three names, sorted, and how many more there are."""
    names = sorted(str(name[0]) if isinstance(name, tuple) else str(name) for name in names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
