"""Where a model's files are, and how they come from the Hub: one commit, only the files that are read, verified."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub import constants as hub_constants

from hf_tsc.errors import HfTscError, UsageError
from hf_tsc.folders import sha256
from hf_tsc.hub.folder import (
    CARD,
    CONFIG,
    LARGEST_TEXTS,
    check_configs,
    check_folder,
    check_size,
    git_oid,
    some,
    weight_names,
)
from hf_tsc.hub.retry import SILENCE, HubUnavailableError, ask_hub

_TEXTS = ["*.json", "*.txt", CARD]
_PATTERNS = [*_TEXTS, "*.safetensors"]


@dataclass(frozen=True)
class Source:
    """Where a model's files are, and what identifies them.

    Attributes:
        path: the folder with the files; inside the Hub's cache for a repo.
        repo_id: id as the Hub spells it, None for a local folder.
        revision: the commit that was fetched, 40 hexadecimal digits, None for a local folder.
        file_hashes: file name -> sha256 (hexadecimal) of each safetensors file.
        notes: what a reader of the report should know of how the files came.
    """

    path: Path
    repo_id: str | None
    revision: str | None
    file_hashes: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Repo id, or the folder's own name without its place."""
        return self.repo_id or self.path.resolve().name

    @cached_property
    def texts_hash(self) -> str:
        """sha256 (hexadecimal) of the names and contents of what is read besides weights, the card left out."""
        digest = hashlib.sha256()
        for file in sorted(file for pattern in _TEXTS for file in self.path.glob(pattern) if file.name != CARD):
            digest.update(f"{file.name}\0{sha256(file)}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Listing:
    """One commit of a repo, as the Hub lists it.

    Attributes:
        repo_id: as the Hub spells it.
        revision: the commit, 40 hexadecimal digits.
        sizes: file name -> bytes of the files that are read.
        notes: what its scanners say.
    """

    repo_id: str
    revision: str
    sizes: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Bytes of all weight files."""
        return sum(size for name, size in self.sizes.items() if name.endswith(".safetensors"))


def is_folder(model: str, *, local: bool = False) -> bool:
    """Whether a user's name of a model means a folder.

    `./x`, `../x`, `/x` and `~/x` are folders, anything else is a repo id, even when a folder has that name (which
    `transformers` would prefer): a folder never stands in for a repo by accident.
    """
    return local or model in {".", "..", "~"} or model.startswith(("./", "../", "/", "~/"))


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    local: bool = False,
    token: str | bool | None = False,
    cache_dir: str | Path | None = None,
    weights: bool = True,
) -> Source:
    """Get and check the files of a model; nothing is loaded.

    Args:
        model: repo id or folder; see `is_folder`.
        revision: branch, tag or commit of the repo; None is its default branch.
        local: `model` is a folder, however it is spelled.
        token: sent to the Hub; False sends none, None or True the saved one.
        cache_dir: the Hub cache; None is the default one.
        weights: False gets and checks the other files alone.

    Raises:
        UsageError: no such folder, repo or revision, or `check_folder` refuses the files.
        HfTscError: the files are not those that the Hub lists; the Hub did not answer, and the cache does not hold the
            whole commit.
    """
    if is_folder(model, local=local):
        if revision is not None:
            raise UsageError(
                f"revision={revision!r} was given with the folder {model}: only Hub repos have revisions."
            )
        source = Source(Path(model).expanduser(), None, None, {})
    else:
        source = _fetch(model, revision, token, cache_dir, weights=weights)
    if not weights:
        check_configs(source.path)
        return source
    check_folder(source.path)
    files = [file for file in sorted(source.path.glob("*.safetensors")) if file.is_file()]
    if source.repo_id is None:
        _check_room(model, sum(file.stat().st_size for file in files), {"memory": psutil.virtual_memory().available})
    return replace(source, file_hashes={file.name: sha256(file) for file in files})


def list_repo(repo_id: str, *, revision: str | None = None, token: str | bool | None = False) -> Listing:
    """Ask the Hub for one commit of a repo of a model.

    Raises:
        UsageError: no such repo or revision.
        HubUnavailableError: the Hub did not answer.
    """
    at = f" at revision {revision}" if revision else ""
    asked: dict[str, Any] = {"revision": revision, "files_metadata": True, "securityStatus": True, "timeout": SILENCE}
    # Not `resolve_revision`, which answers from the cache when the Hub is down.
    info = ask_hub(f"find {repo_id}{at}", repo_id, lambda: HfApi(token=token).model_info(repo_id, **asked))
    read = {file.rfilename: file.size or 0 for file in info.siblings or [] if _is_read(file.rfilename)}
    scan = info.security_repo_status if isinstance(info.security_repo_status, dict) else {}
    issues = [found for found in scan.get("filesWithIssues") or [] if isinstance(found, dict)]
    flagged = [re.sub(r"[^\w./-]", "_", str(found.get("path")))[:80] for found in issues]
    notes = (f"The Hub's scanners report issues in {some(flagged)} of the suspect's repo.",) if flagged else ()
    return Listing(info.id, str(info.sha), read, notes)


def _is_read(name: str, patterns: list[str] = _PATTERNS) -> bool:
    """Nothing reads subfolders, so none is got."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)


def _fetch(
    repo_id: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None, *, weights: bool
) -> Source:
    """The folder with the verified files of one commit. Configurations come first, and are checked before weights."""
    try:
        listing = list_repo(repo_id, revision=revision, token=token)
    except HubUnavailableError as error:
        return _from_cache(repo_id, revision, cache_dir, error, weights=weights)
    _check_listing(listing, cache_dir)
    sha = listing.revision

    def get(patterns: list[str]) -> Path:
        wanted: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["*/*"]}
        where: dict[str, Any] = {"revision": sha, "token": token, "cache_dir": cache_dir}
        path = Path(ask_hub(f"download {repo_id}", repo_id, lambda: snapshot_download(repo_id, **wanted, **where)))
        # Lists the files anew, so that what `snapshot_download` took from the cache does not pass unseen.
        found = ask_hub(
            f"verify {repo_id}",
            repo_id,
            lambda: HfApi(token=token).verify_repo_checksums(repo_id, revision=sha, cache_dir=cache_dir),
        )
        missing = [name for name in found.missing_paths if _is_read(name, patterns)]
        if wrong := [mismatch["path"] for mismatch in found.mismatches] + missing + found.extra_paths:
            raise _damaged(wrong, repo_id, sha, path)
        return path

    try:
        path = get(_TEXTS)
        check_configs(path)
        path = get(_PATTERNS) if weights else path
    except HubUnavailableError as error:
        return _from_cache(repo_id, sha, cache_dir, error, weights=weights)
    _remember(path, revision or hub_constants.DEFAULT_REVISION, sha)
    return Source(path, listing.repo_id, sha, {}, listing.notes)


def _remember(path: Path, revision: str, sha: str) -> None:
    """Note in the cache, as the client does, which commit a branch or tag was."""
    if revision != sha:
        ref = path.parents[1] / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(sha)


def _check_listing(listing: Listing, cache_dir: str | Path | None) -> None:
    """Refuse, before anything is downloaded, what this machine cannot hold."""
    for name, size in listing.sizes.items():
        check_size(name, size, listing.repo_id)
    if (texts := sum(listing.sizes.values()) - listing.weights) > LARGEST_TEXTS:
        limit = LARGEST_TEXTS / 2**20
        raise UsageError(f"{listing.repo_id} has {texts / 2**20:.0f} MB of text files: expected at most {limit:.0f}.")
    place = Path(cache_dir or hub_constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    resources = {"memory": psutil.virtual_memory().available, f"disk under {place}": shutil.disk_usage(place).free}
    _check_room(listing.repo_id, listing.weights, resources)


def _check_room(name: str, weights: int, resources: dict[str, int]) -> None:
    """Refuse more bytes of weights than are free of any resource."""
    for resource, free in resources.items():
        if weights > free:
            raise UsageError(
                f"{name} has {weights / 1e9:.1f} GB of weights, and there are {free / 1e9:.1f} GB of free {resource}: "
                "use a larger machine."
            )


def _from_cache(
    repo_id: str,
    revision: str | None,
    cache_dir: str | Path | None,
    error: HubUnavailableError,
    *,
    weights: bool,
) -> Source:
    """The commit in the cache that a revision was last seen to be; its files are what the Hub said when they came.

    The cache names a file's content by the checksum that the Hub gave for it.

    Raises:
        HubUnavailableError: the one given, where the cache has no such commit, or not all of its weights.
    """
    found = try_to_load_from_cache(repo_id, CONFIG, revision=revision, cache_dir=cache_dir)
    path = Path(found).parent if isinstance(found, str) else Path()
    whole = bool(re.fullmatch(r"[0-9a-f]{40}", path.name)) and (not weights or _has_weights(path))
    if not whole:
        raise error
    read = [file for file in path.iterdir() if _is_read(file.name) or not file.is_symlink()]
    if wrong := [file.name for file in read if not file.is_dir() and not _is_what_its_blob_is_named(file)]:
        raise _damaged(wrong, repo_id, path.name, path)
    note = (
        f"The Hub did not answer: the copy of {repo_id} at commit {path.name} in the cache was used, and it was not "
        "checked that this is what the Hub has now."
    )
    return Source(path, repo_id, path.name, {}, (note,))


def _has_weights(path: Path) -> bool:
    try:
        return all((path / Path(name).name).is_file() for name in weight_names(path))
    except UsageError:
        return False


def _is_what_its_blob_is_named(file: Path) -> bool:
    blob = file.resolve()
    if not file.is_symlink() or not blob.is_file() or blob.parent != file.parent.resolve().parents[1] / "blobs":
        return False
    return blob.name == (sha256(blob) if len(blob.name) == 64 else git_oid(blob))


def _damaged(names: list[str], repo_id: str, sha: str, path: Path) -> HfTscError:
    return HfTscError(
        f"{some(names)} of {repo_id} differ from what the Hub lists for commit {sha}: a damaged download or a"
        f" changed cache. Delete {path.parents[1]} and try again."
    )
