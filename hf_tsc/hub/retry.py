"""One step against the Hub, asked again while its failure may pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx, parse_ratelimit_headers

from hf_tsc.errors import HfTscError, UsageError

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0)  # seconds
LONGEST_WAIT = 300.0  # seconds; the window of the Hub's own rate limit
SILENCE = 120.0  # seconds without a byte, after which the Hub counts as gone; most of the client's calls have no limit
STEPS_OF_A_REQUEST = ("connect", "read", "write", "pool")  # as httpx calls them

UNREADABLE = (json.JSONDecodeError, UnicodeDecodeError)  # an answer that was damaged, or comes from something between
CLIENT_ERRORS = (
    hub_errors.HfHubHTTPError,
    hub_errors.HFValidationError,
    hub_errors.LocalEntryNotFoundError,
    hub_errors.OfflineModeIsEnabled,
    hub_errors.FileMetadataError,
    httpx.TransportError,
    *UNREADABLE,
)

# The client's error -> what to tell the user; a subclass stands before its base.
_ADVICE: dict[type[Exception], str] = {
    hub_errors.HFValidationError: "this is not a repo id (`owner/name`)",
    hub_errors.GatedRepoError: "it is gated; accept its terms on the Hub, then give a token",
    hub_errors.RepositoryNotFoundError: "there is no such repo, or it is private (then give a token)",
    hub_errors.RevisionNotFoundError: "there is no such revision; give a branch, a tag or a commit of it",
}


class HubUnavailableError(HfTscError):
    """The Hub did not answer as often as it was asked."""


def ask_hub(what: str, repo_id: str, call: Callable[[], T], *, left: Callable[[], str] = lambda: "") -> T:
    """Do one step; while its failure may pass (408, 429, 5xx, transport), wait and ask again.

    Args:
        what: the step, as in "Could not ...".
        repo_id: that it is about.
        call: the step.
        left: says how things stand, for the error.

    Raises:
        UsageError: the Hub refuses it.
        HubUnavailableError: it did not answer in four tries, or asks to wait for longer than five minutes.
    """
    for wait in (*WAITS, None):
        try:
            with patience():
                return call()
        except CLIENT_ERRORS as error:
            if not wait_for_another(error, wait):
                raise hub_error(what, repo_id, error, left()) from error
    raise AssertionError("the last round returns or raises")


@contextmanager
def patience() -> Iterator[None]:
    """Let no request of the client wait for longer than `SILENCE` that has no limit of its own.

    A session's own limit would not do: some of the client's calls override it, and it opens new sessions by itself.
    """
    send = httpx.Client.send

    def limited(self: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        asked = request.extensions.get("timeout") or {}
        limits = {step: SILENCE if asked.get(step) is None else asked[step] for step in STEPS_OF_A_REQUEST}
        request.extensions = {**request.extensions, "timeout": limits}
        return send(self, request, **options)

    httpx.Client.send = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        httpx.Client.send = send  # type: ignore[method-assign]


def wait_for_another(error: Exception, wait: float | None) -> bool:
    """Wait as long as is due before a step is tried again; False where that is of no use.

    Args:
        error: what the client raised.
        wait: seconds, at least; None after the last try.
    """
    asked = seconds_asked(_cause(error))
    if wait is None or asked is None or asked > LONGEST_WAIT:
        return False
    sleep(max(wait, asked))
    return True


def _cause(error: Exception) -> BaseException:
    """With nothing in its cache to fall back on, the client wraps what really happened."""
    return error.__cause__ or error if isinstance(error, hub_errors.LocalEntryNotFoundError) else error


def seconds_asked(error: BaseException) -> float | None:
    """How long the Hub asks us to wait: 0 if it does not say, None if asking again is of no use."""
    if not isinstance(error, hub_errors.HfHubHTTPError):
        passing = isinstance(error, (httpx.TransportError, hub_errors.FileMetadataError, *UNREADABLE))
        return 0.0 if passing else None
    status = error.response.status_code
    if status not in {408, 429} and status < 500:
        return None
    # Every answer tells when the limit is reset; that matters where it is used up.
    limit = parse_ratelimit_headers(error.response.headers) if status == 429 else None
    retry_after = error.response.headers.get("Retry-After", "")  # the Hub gives seconds; a date says nothing here
    return max(float(retry_after) if retry_after.isdigit() else 0.0, limit.reset_in_seconds if limit else 0.0)


def hub_error(what: str, repo_id: str, error: Exception, left: str = "") -> HfTscError:
    """The error of this package, in one line, for one of the client's."""
    cause = _cause(error)
    hint = f"; for the folder of that name write `./{repo_id}` or add `--local`" if Path(repo_id).is_dir() else ""
    left = f" {left}" if left else ""
    for kind, advice in _ADVICE.items():
        if isinstance(cause, kind):
            return UsageError(f"Could not {what}: {advice}{hint}.{left}")
    asked = seconds_asked(cause)
    if isinstance(cause, hub_errors.HfHubHTTPError):
        status = cause.response.status_code
        if status in {401, 403}:
            return UsageError(f"Could not {what}: the Hub refuses it ({status}); give a token that may do that.{left}")
        waits = f" and asks to wait {asked:.0f} s" if asked else ""
        reason = f"the Hub answered {status}{waits}"
    else:
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    passing = asked is not None or isinstance(cause, hub_errors.OfflineModeIsEnabled)
    kind_of_error = HubUnavailableError if passing else HfTscError
    return kind_of_error(f"Could not {what}: {reason}{hint}.{left or ' Try again later.'}")
