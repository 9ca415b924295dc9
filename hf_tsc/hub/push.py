"""A finished folder goes to the Hub: the files of a list, in one commit, read back afterwards."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub import errors as hub_errors

from hf_tsc.errors import HfTscError, UsageError
from hf_tsc.folders import CARD_FILE, PLOT_FILE, REPORT_FILE, sha256
from hf_tsc.hub.folder import (
    CONFIG,
    INDEX,
    PROCESSORS,
    TOKENIZER,
    VOCABULARIES,
    WEIGHTS,
    check_folder,
    git_oid,
    kept,
    read_object,
    some,
)
from hf_tsc.hub.retry import (
    CLIENT_ERRORS,
    SILENCE,
    WAITS,
    ask_hub,
    hub_error,
    patience,
    seconds_asked,
    wait_for_another,
)

PUSHED = (
    CONFIG, WEIGHTS, "model-*-of-*.safetensors", INDEX, "generation_config.json", *PROCESSORS, *VOCABULARIES,
    TOKENIZER, "special_tokens_map.json", "added_tokens.json", "merges.txt", CARD_FILE, REPORT_FILE, PLOT_FILE,
)  # fmt: skip
NEEDED = (CONFIG, CARD_FILE, REPORT_FILE)
# What a loader could take in place of the pushed files, wherever it lies; anything else of the repo stays.
_TAKEN_INSTEAD = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.pkl", "*.onnx", "*.gguf", "*.tflite",
    "*.index.json", "adapter_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class PushOptions:
    """Where to, and how.

    Attributes:
        repo_id: the repo, `owner/name`; made where there is none.
        private: what a new repo is.
        create_pr: open a pull request on a repo that exists, and leave its `main` as it is.
        onto_suspect: the repo may be the suspect's own.
        token: that may write; None for the saved one.
    """

    repo_id: str
    private: bool = True
    create_pr: bool = False
    onto_suspect: bool = False
    token: str | None = None

    def flags(self) -> list[str]:
        """The options of the command line that say the same, besides the repo."""
        asked = {
            "--push_public": not self.private,
            "--create_pr": self.create_pr,
            "--push_onto_suspect": self.onto_suspect,
        }
        return [flag for flag, given in asked.items() if given]


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now.

    Attributes:
        repo_id: as the Hub spells it.
        commit: 40 hexadecimal digits.
        url: of the commit, or of the pull request.
        private: what the repo is.
        replaced: files of the repo that the commit took away, since a loader could have taken them instead.
    """

    repo_id: str
    commit: str
    url: str
    private: bool
    replaced: tuple[str, ...] = ()


def check_push(options: PushOptions, suspect: str | None) -> None:
    """Ask, before any work, whether a push will be possible.

    Args:
        options: where to.
        suspect: repo id of the suspect, if it has one.

    Raises:
        UsageError: no token or one that may not write, the suspect's own repo, no repo for a pull request.
        HubUnavailableError: the Hub did not answer.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo_id):
        raise UsageError(f"--push_to_hub {options.repo_id}: expected a repo id (`owner/name`)")
    api = HfApi(token=options.token)
    try:
        user = ask_hub("find out whose the Hub token is", options.repo_id, api.whoami)
    except hub_errors.LocalTokenNotFoundError as error:
        raise UsageError(
            f"--push_to_hub {options.repo_id}: there is no token; log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise UsageError(f"--push_to_hub {options.repo_id}: the Hub token may only read; give one that may write")
    known = _head(api, options.repo_id)
    _check_target(options, suspect, known)
    if known is None:
        _check_owner(options, user)


def _check_owner(options: PushOptions, user: dict[str, Any]) -> None:
    """A new repo is the user's own, or of an organisation that the user is in."""
    owners = [str(user.get("name")), *(str(org.get("name")) for org in user.get("orgs") or [])]
    if options.repo_id.split("/")[0].casefold() not in {owner.casefold() for owner in owners}:
        raise UsageError(
            f"--push_to_hub {options.repo_id}: there is no such repo, and the Hub token may make one for "
            f"{some(owners)} only"
        )


def _check_target(options: PushOptions, suspect: str | None, head: _Head | None) -> None:
    """Refuse a pull request on nothing, and the suspect's own repo.

    Ids of the Hub are the same in any case, and an old name leads to a renamed repo.
    """
    if head is None and options.create_pr:
        raise UsageError(f"--create_pr: there is no repo {options.repo_id} to open a pull request on")
    target = head.repo_id if head else options.repo_id
    same = suspect is not None and suspect.casefold() in {target.casefold(), options.repo_id.casefold()}
    if same and not (options.onto_suspect or options.create_pr):
        raise UsageError(
            f"--push_to_hub {options.repo_id} is the suspect's own repo: name another one, open a pull request with "
            "--create_pr, or say --push_onto_suspect"
        )


def push_folder(folder: Path, options: PushOptions) -> Pushed:
    """Push a purified model: what `purify` wrote, and nothing else that may lie beside it.

    Args:
        folder: with weights, configuration, card and report.
        options: where to, and how.

    Raises:
        UsageError: `check_folder_to_push` refuses the folder; the Hub refuses the push; the suspect's own repo.
        HfTscError: the Hub did not answer, or has other files than were sent; the message says what is there now.

    Nothing is done where the repo holds these files already.
    """
    files, report = check_folder_to_push(folder)
    api, repo_id = HfApi(token=options.token), options.repo_id
    head = _head(api, repo_id)
    _check_target(options, report["suspect"]["repo_id"], head)
    if head is None:
        made: dict[str, Any] = {"private": options.private, "exist_ok": True}
        ask_hub(f"make the repo {repo_id}", repo_id, lambda: api.create_repo(repo_id, **made))
        head = _head(api, repo_id)
        if head is None:
            raise HfTscError(f"Could not push to {repo_id}: the Hub made the repo, and does not find it. Try again.")
    replaced = tuple(name for name in head.files if _is_taken_instead(name) and name not in files)
    if not options.create_pr and _has(head, files, replaced):
        return Pushed(head.repo_id, head.commit, _address(api, head), head.private)
    commit, url = _commit(api, head, files, replaced, create_pr=options.create_pr)
    _read_back(api, head.repo_id, commit, report["purified"]["files"])
    return Pushed(head.repo_id, commit, url, head.private, replaced)


def check_folder_to_push(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files that are pushed, by name, and the report.

    Raises:
        UsageError: the folder is not a finished one, its weights are not those of its report, it would make a loader
            do what `check_folder` refuses, or a text in it names a place on this machine.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: give one that `hf-tsc purify` wrote")
    found = {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in PUSHED)
    }
    if missing := [name for name in NEEDED if name not in found]:
        raise UsageError(f"{folder} has no {', '.join(missing)}: give a folder that `hf-tsc purify` wrote")
    check_folder(folder)
    if (config := read_object(found[CONFIG])) != kept(config):
        raise UsageError(f"{found[CONFIG]} has fields that `hf-tsc purify` leaves out: purify again")
    report = read_object(found[REPORT_FILE])
    try:
        expected, _ = dict(report["purified"]["files"]), report["suspect"]["repo_id"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{found[REPORT_FILE]} is not a report of a purification ({error!r})") from error
    weights = {name: sha256(file) for name, file in found.items() if name.endswith(".safetensors")}
    if weights != expected:
        differing = some(name for name in expected | weights if weights.get(name) != expected.get(name))
        raise UsageError(f"{differing} of {folder}: not the weights of its {REPORT_FILE}; purify again")
    for name, file in found.items():
        if name.endswith((".json", ".txt", ".md")) and (place := _place_in(file)):
            raise UsageError(f"{file} names a place on this machine ({place}): remove it before the push")
    return found, report


def _place_in(file: Path) -> str | None:
    """A folder of this machine that a text names: the file's own, the current one, the user's, a temporary one."""
    text = file.read_text(encoding="utf-8", errors="replace")
    near = (file.parent.resolve(), Path.cwd(), Path.home(), Path(tempfile.gettempdir()).resolve())
    places = {str(place) for place in near if len(place.parts) > 1}
    return next(
        (place for place in sorted(places) if re.search(rf"(?<![\w/.]){re.escape(place)}(?![\w.-])", text)), None
    )


def _is_taken_instead(name: str) -> bool:
    """Subfolders are read as well by whoever asks for them (`subfolder=`); configurations there are left alone."""
    root = [] if "/" in name else PUSHED
    return any(fnmatch(name.rsplit("/", 1)[-1], pattern) for pattern in (*_TAKEN_INSTEAD, *root))


@dataclass(frozen=True)
class _Head:
    """`main` of a repo; `files` are those at its root and below, name -> sha256 (large files) or git's sha1."""

    repo_id: str
    commit: str
    private: bool
    files: dict[str, str]


def _head(api: HfApi, repo_id: str) -> _Head | None:
    """None where there is no repo, as far as the token shows."""

    def ask() -> _Head | None:
        try:
            info = api.model_info(repo_id, files_metadata=True, timeout=SILENCE)
        except hub_errors.GatedRepoError:
            raise
        except hub_errors.RepositoryNotFoundError:
            return None
        files = {s.rfilename: str(s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings or []}
        return _Head(info.id, str(info.sha), bool(info.private), files)

    return ask_hub(f"find {repo_id}", repo_id, ask)


def _commit(
    api: HfApi, head: _Head, files: dict[str, Path], replaced: tuple[str, ...], *, create_pr: bool
) -> tuple[str, str]:
    """One commit on the head that was seen; its id and address. A lost answer is looked up before a retry."""
    operations: list[Any] = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
    operations += [CommitOperationDelete(name) for name in replaced]
    message, what = "Purified with hf_tsc", f"push to {head.repo_id}"
    for wait in (*WAITS, None):
        try:
            with patience():
                info = api.create_commit(
                    head.repo_id,
                    operations,
                    commit_message=message,
                    commit_description="See README.md for what was done and measured, tsc_report.json for all of it.",
                    parent_commit=None if create_pr else head.commit,
                    create_pr=create_pr,
                )
            return str(info.oid), str(info.pr_url or info.commit_url)
        except (*CLIENT_ERRORS, RuntimeError) as raised:  # the latter around what went wrong with a large file
            cause = raised.__cause__ if type(raised) is RuntimeError else raised
            if not isinstance(cause, CLIENT_ERRORS):
                raise
            if create_pr and _may_be_done(cause):  # a second try could open a second one
                raise hub_error(what, head.repo_id, cause, _left(api, head, create_pr=True)) from raised
            now = None if create_pr else _now(api, head.repo_id)
            if now is not None and now.commit != head.commit:
                if _has(now, files, replaced):
                    return now.commit, _address(api, now)
                raise HfTscError(
                    f"Could not {what}: somebody else moved its main from {head.commit} to {now.commit} meanwhile. "
                    "Nothing was pushed; look at it, and push again."
                ) from raised
            if not wait_for_another(cause, wait):
                raise hub_error(what, head.repo_id, cause, _left(api, head, create_pr=create_pr)) from raised
        except ValueError as error:  # the Hub's check of the card's metadata
            raise HfTscError(f"Could not {what}: {' '.join(str(error).split())} {_left(api, head)}") from error
    raise AssertionError("the last round returns or raises")


def _may_be_done(error: BaseException) -> bool:
    """Whether the Hub may have made the commit although its answer did not come."""
    if seconds_asked(error) is None:
        return False
    if isinstance(error, hub_errors.HfHubHTTPError):
        return error.response.status_code != 429 and "/commit/" in str(error.response.request.url)
    request = getattr(error, "_request", None)  # `error.request` raises where there is none
    return request is None or "/commit/" in str(request.url)


def _has(now: _Head, files: dict[str, Path], replaced: tuple[str, ...]) -> bool:
    """Whether a head holds what was to be pushed."""
    return not any(name in now.files for name in replaced) and all(
        now.files.get(name) in (git_oid(file), sha256(file)) for name, file in files.items()
    )


def _address(api: HfApi, head: _Head) -> str:
    return f"{api.endpoint}/{head.repo_id}/commit/{head.commit}"


def _now(api: HfApi, repo_id: str) -> _Head | None:
    try:
        return _head(api, repo_id)
    except HfTscError:
        return None


def _left(api: HfApi, head: _Head, *, create_pr: bool = False) -> str:
    """What is on the Hub after a push that failed."""
    now = _now(api, head.repo_id)
    if now is None:
        return f"What is on the Hub could not be asked; before the push {head.repo_id} was at commit {head.commit}."
    also = " A pull request may have been opened." if create_pr else ""
    same = "still at" if now.commit == head.commit else "now at"
    return f"{head.repo_id} is {same} commit {now.commit}.{also} Push the folder again with `hf-tsc push`."


def _read_back(api: HfApi, repo_id: str, commit: str, expected: dict[str, str]) -> None:
    """Download the pushed weights and compare them with the report.

    Raises:
        HfTscError: they differ.
    """
    unchecked = f"The commit {commit} was made, and its weights are not checked."
    with tempfile.TemporaryDirectory(prefix="hf_tsc_") as folder:
        for name, digest in expected.items():
            where: dict[str, Any] = {"revision": commit, "local_dir": folder, "token": api.token}
            for _ in range(2):  # a transfer can be damaged on its way back, too
                try:
                    file = ask_hub(
                        f"read {name} back from {repo_id}",
                        repo_id,
                        partial(hf_hub_download, repo_id, name, force_download=True, **where),
                        left=lambda: unchecked,
                    )
                except OSError as error:
                    raise HfTscError(f"Could not read {name} back from {repo_id}: {error}. {unchecked}") from error
                if sha256(Path(file)) == digest:
                    break
            else:
                raise HfTscError(
                    f"{name} of {repo_id} at commit {commit} is not what was sent, as read back twice: do not use "
                    "this commit; push again"
                )
