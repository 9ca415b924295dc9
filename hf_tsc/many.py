"""Several models, one result each: what is done already is skipped, and a failure does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_tsc.data import ImageData
from hf_tsc.errors import HfTscError, UsageError
from hf_tsc.evaluation import Attack
from hf_tsc.evidence.settings import EvidenceSettings
from hf_tsc.folders import REPORT_FILE
from hf_tsc.hub import Pushed, PushOptions, Source, check_push, is_folder, list_repo, push_folder, resolve_model
from hf_tsc.hub.retry import HubUnavailableError
from hf_tsc.processes import number_of_processes, on_main_process, together
from hf_tsc.purify import purify, request_of
from hf_tsc.report import PurificationReport
from hf_tsc.tasks import Options
from hf_tsc.work_folder import work_of


@dataclass(frozen=True)
class Outcome:
    """What came of one model; `before` and `after` are measures by place, as in the report.

    Attributes:
        model: as the user named it.
        status: `done`, `skipped` (there was a result of the same model and request) or `failed`.
        output: the folder of the result; None where there is none.
        revision: commit of the suspect; None for a folder.
        seconds: that it took now.
        error: in one line.
        exit_code: what a purification of it alone would have ended with.
        pushed: repo, commit and address on the Hub.
        notes: what a reader should know.
    """

    model: str
    status: str
    output: str | None = None
    revision: str | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    seconds: float = 0.0
    error: str | None = None
    exit_code: int = 0
    pushed: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(
        cls, model: str, status: str, folder: Path, report: PurificationReport, pushed: Pushed | None, *notes: str
    ) -> Outcome:
        """That of a result in a folder."""
        return cls(
            model,
            status,
            str(folder),
            report.suspect["revision"],
            report.before,
            report.after,
            pushed=asdict(pushed) if pushed else None,
            notes=(*report.notes, *notes),
        )

    @classmethod
    def of_error(cls, model: str, folder: Path, error: Exception) -> Outcome:
        """That of a failure; the folder may be there, and the push of it have failed."""
        text = f"{'' if isinstance(error, HfTscError) else type(error).__name__ + ': '}{error}"
        return cls(
            model,
            "failed",
            str(folder) if (folder / REPORT_FILE).is_file() else None,
            error=" ".join(text.split()),
            exit_code=getattr(error, "exit_code", HfTscError.exit_code),
        )


@dataclass(frozen=True)
class Access:
    """How models are got.

    Attributes:
        revision: of repos; a branch or tag that all of them have.
        local: names are folders, however they are spelled.
        token: sent to the Hub.
    """

    revision: str | None = None
    local: bool = False
    token: str | bool | None = False

    def resolve(self, model: str) -> Source:
        """The checked files of a model."""
        return resolve_model(model, revision=self.revision, local=self.local, token=self.token)

    def is_folder(self, model: str) -> bool:
        return is_folder(model, local=self.local)

    def name(self, model: str) -> str:
        """A model's own name: the last part of its repo id or of its folder."""
        return Path(model).expanduser().resolve().name if self.is_folder(model) else model.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Order:
    """What is to be done with each model; see `purify` for what has its names.

    Attributes:
        access: how the models are got.
        arguments: those of `TSCConfig`, or of a baseline's settings, that are given.
        push: where to; `{name}` in the repo id stands for a model's own name.
    """

    data: ImageData
    access: Access = Access()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    preset: str = "default"
    method: str = "tsc"
    budget: str = "5%"
    held_out: float = 0.2
    options: Options = field(default_factory=Options)
    test: ImageData | None = None
    attack: Attack | None = None
    push: PushOptions | None = None
    evidence: EvidenceSettings | None = None

    def run(
        self,
        model: str,
        folder: Path,
        *,
        resume: bool = False,
        purified: Callable[[PurificationReport], None] = lambda report: None,
    ) -> Outcome:
        """Purify a model and push the result, where that is asked for; `purified` is called between the two.

        Raises:
            HfTscError: see `purify`, `check_push` (which is asked before weights are pulled) and `push_folder`.
        """
        if (push := self.push_of(model)) is not None:
            on_main_process(lambda: self._check_push(model, push))
        with together():
            source = self.access.resolve(model)
        report = purify(
            source,
            self.data,
            folder,
            config=self.arguments,
            preset=self.preset,
            method=self.method,
            budget=self.budget,
            held_out=self.held_out,
            options=self.options,
            test=self.test,
            attack=self.attack,
            evidence=self.evidence,
            resume=resume,
        )
        purified(report)
        return Outcome.of(model, "done", folder, report, push_result(folder, push))

    def run_or_skip(self, model: str, folder: Path) -> Outcome:
        """`run`, unless the folder holds the result already; an interrupted run is gone on with."""
        if not (folder / REPORT_FILE).is_file():
            return self.run(model, folder, resume=work_of(folder).is_dir())
        report = PurificationReport.from_file(folder / REPORT_FILE)
        same, notes = on_main_process(lambda: self._is_still_suspect_of(report, model))
        with together():
            if not (same and _asked(report, self.data) == self.request()):
                raise UsageError(
                    f"{folder} holds the result of another version of {model}, other images or other settings: "
                    "remove it, or give another --output_dir"
                )
        return Outcome.of(model, "skipped", folder, report, push_result(folder, self.push_of(model)), *notes)

    def _check_push(self, model: str, push: PushOptions) -> None:
        is_repo = not self.access.is_folder(model)
        suspect = list_repo(model, revision=self.access.revision, token=self.access.token) if is_repo else None
        check_push(push, suspect.repo_id if suspect else None)

    def push_of(self, model: str) -> PushOptions | None:
        """Where a model goes."""
        if self.push is None:
            return None
        return replace(self.push, repo_id=self.push.repo_id.replace("{name}", self.access.name(model)))

    def request(self) -> dict[str, Any]:
        """What decides whether a result is the one that is asked for."""
        how = (self.arguments, self.preset, self.budget, self.held_out, self.options, self.test, self.method)
        asked = request_of(*how, self.evidence)
        attack = self.attack.to_dict() if self.attack else None
        return {**asked, "attack": attack, "images": self.data.describe()}

    def _is_still_suspect_of(self, report: PurificationReport, model: str) -> tuple[bool, tuple[str, ...]]:
        """As far as the Hub says; and notes."""
        try:
            return self._is_suspect_of(report, model), ()
        except HubUnavailableError:
            note = "The Hub did not answer: it was not checked that the suspect is still at this commit."
            known = self.access.revision in (None, report.suspect["revision"])
            return known and model.casefold() == str(report.suspect["repo_id"]).casefold(), (note,)

    def _is_suspect_of(self, report: PurificationReport, model: str) -> bool:
        """Whether a report is of what a model is now; the weights of a repo are not fetched for that."""
        if self.access.is_folder(model):
            source = self.access.resolve(model)
            known = {"files": source.file_hashes, "texts": source.texts_hash}
            return all(report.suspect.get(name) == found for name, found in known.items())
        listing = list_repo(model, revision=self.access.revision, token=self.access.token)
        return bool(listing.revision == report.suspect["revision"])


def _asked(report: PurificationReport, data: ImageData) -> dict[str, Any]:
    """What a report's purification was asked for, and of which images."""
    images = {name: report.dataset.get(name) for name in data.describe()}
    return {**(report.request or {}), "attack": report.attack, "images": images}


def push_result(folder: Path, push: PushOptions | None) -> Pushed | None:
    """Push a result, where that is asked for; a failure says how to go on."""
    if push is None:
        return None
    try:
        return on_main_process(lambda: push_folder(folder, push))
    except HfTscError as error:
        command = " ".join(["hf-tsc push", str(folder), push.repo_id, *push.flags()])
        again = type(error)(f"{error} The purified model is in {folder}: push it with `{command}`.")
        again.everywhere = error.everywhere
        raise again from error


def read_models(file: Path) -> list[str]:
    """The models of a list, one a line; empty lines and those that begin with `#` do not count.

    Raises:
        UsageError: it cannot be read, or names none.
    """
    try:
        lines = [line.split(" #")[0].strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"--from_file {file}: expected a text file with a model a line ({error})") from error
    if not (models := [line for line in lines if line and not line.startswith("#")]):
        raise UsageError(f"--from_file {file} names no model: expected a repo id or a folder a line")
    return models


def folders_of(models: Sequence[str], output: Path, order: Order) -> dict[str, Path]:
    """Where the result of each model goes.

    Raises:
        UsageError: two would go to the same place, here or on the Hub.
    """
    found: dict[str, Path] = {}
    access, pushed = order.access, dict[str, str]()
    for model in dict.fromkeys(models):
        name = access.name(model) if access.is_folder(model) else model.replace("/", "--")
        if other := [m for m, folder in found.items() if folder.name == name]:
            raise UsageError(f"{other[0]} and {model} would both go to {output / name}: purify them one by one")
        push = order.push_of(model)
        if push is not None and (first := pushed.setdefault(push.repo_id.casefold(), model)) != model:
            raise UsageError(f"{first} and {model} would both be pushed to {push.repo_id}: purify them one by one")
        found[model] = output / name
    return found


def purify_many(folders: Mapping[str, Path], order: Order) -> Iterator[Outcome]:
    """Purify each model into its folder, and tell at once what came of it."""
    for model, folder in folders.items():
        started = time.monotonic()
        try:
            outcome = order.run_or_skip(model, folder)
        except Exception as error:  # whatever a hostile model brings about, the next one is not to suffer
            if number_of_processes() > 1 and not getattr(error, "everywhere", False):
                raise  # the others have not failed, and do not go on to the next one
            outcome = Outcome.of_error(model, folder, error)
        yield replace(outcome, seconds=round(time.monotonic() - started, 1))
