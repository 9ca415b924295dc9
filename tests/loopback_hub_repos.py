"""The repos of the loopback Hub, without HTTP: commits, branches, large files, and who may read and write them.

A repo is named as in its address: `owner/name`, `datasets/owner/name`, `spaces/owner/name`. The owner is a user.
"""

import hashlib
import threading

Files = dict[str, bytes]

_LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".pt", ".pth", ".pkl", ".npz", ".zip")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES).encode()


class HubError(Exception):
    """An answer that refuses: a status, a message, and the `X-Error-Code` by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class Repos:
    """Repos in memory. Tests read and change the sets `private`, `gated` and `allowed` as they like."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}  # repo -> commit -> its files
        self.branches: dict[str, dict[str, list[str]]] = {}  # repo -> branch or PR ref -> its commits, oldest first
        self.objects: dict[str, dict[str, bytes]] = {}  # repo -> sha256 -> content of an LFS file
        self.messages: dict[str, str] = {}  # commit -> what its author wrote
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.allowed: set[tuple[str, str]] = set()  # (user, repo): who else may read what is private or gated
        self.tokens: dict[str, str] = {}  # token -> user
        self.readers: set[str] = set()  # the tokens with the role "read"
        self.lock = threading.RLock()

    # What tests do and ask

    def commit(self, repo: str, files: Files, *, branch: str = "main", message: str = "") -> str:
        """Make `files` the whole content of `branch`; returns the commit. Earlier commits stay."""
        with self.lock:
            commits = self.commits.setdefault(repo, {})
            listing = "".join(f"{path}{git_oid(data)}" for path, data in sorted(files.items()))
            sha = hashlib.sha1(f"{repo}{len(commits)}{listing}".encode()).hexdigest()
            commits[sha] = dict(files)
            self.messages[sha] = message
            self.branches.setdefault(repo, {}).setdefault(branch, []).append(sha)
            stored = self.objects.setdefault(repo, {})
            stored |= {sha256(data): data for path, data in files.items() if is_lfs(path, len(data))}
            return sha

    @property
    def main(self) -> dict[str, str]:
        """The head of `main` of each repo."""
        return {repo: branches["main"][-1] for repo, branches in self.branches.items()}

    def files(self, repo: str, revision: str = "main") -> Files:
        return dict(self.files_at(repo, revision)[1])

    def history(self, repo: str, branch: str = "main") -> list[str]:
        """The commits on a branch or PR ref, oldest first."""
        return list(self.branches[repo][branch])

    def add_user(self, name: str, *, token: str, role: str = "write") -> None:
        """Let `token` speak for `name`, who owns the repos `name/...`; role "read" or "write"."""
        if role not in ("read", "write"):
            raise ValueError(f"`role` {role!r}: expected 'read' or 'write'.")
        self.tokens[token] = name
        self.readers.discard(token)
        if role == "read":
            self.readers.add(token)

    # What requests do and ask

    def files_at(self, repo: str, revision: str) -> tuple[str, Files]:
        """The commit that a branch, a PR ref or a sha is, and its files."""
        if repo not in self.commits:
            raise HubError(404, "Repository not found", "RepoNotFound")
        branch = self.branches[repo].get(revision)
        sha = branch[-1] if branch else revision
        if sha not in self.commits[repo]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[repo][sha]

    def open_pull_request(self, repo: str, base: str) -> str:
        """A new PR ref on top of the commit `base`; returns its name."""
        history = self.branches[repo]["main"]
        if base not in history:
            raise HubError(400, f"{base} is not on main")
        ref = f"refs/pr/{len(self.branches[repo])}"  # PRs are the only other branches
        self.branches[repo][ref] = history[: history.index(base) + 1]
        return ref

    def token_of(self, authorization: str | None) -> str | None:
        """The token of a request, if it has one and there are users. A wrong one is refused, even if not needed."""
        token = (authorization or "").removeprefix("Bearer ")
        if token and self.tokens and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return token if token in self.tokens else None

    def may_read(self, repo: str, token: str | None) -> bool:
        """Whether `token` opens `repo` were it private or gated."""
        user = self.tokens.get(token or "")
        return user is not None and (user == owner_of(repo) or (user, repo) in self.allowed)

    def check_found(self, repo: str, token: str | None) -> None:
        """A private repo is as good as absent to those who may not read it."""
        if repo not in self.commits or (repo in self.private and not self.may_read(repo, token)):
            raise HubError(404, "Repository not found", "RepoNotFound")

    def check_terms(self, repo: str, token: str | None) -> None:
        """Everybody sees what is in a gated repo; only those who were let in get the files."""
        if repo in self.gated and not self.may_read(repo, token):
            raise HubError(403 if token else 401, f"Access to {repo} is restricted", "GatedRepo")

    def check_login(self, token: str | None) -> str:
        """The user of `token`."""
        if token is None:
            raise HubError(401, "Invalid username or password.")
        return self.tokens[token]

    def check_write(self, repo: str, token: str | None, *, as_pull_request: bool = False) -> None:
        """Anybody with a write token may open a PR; the rest is the owner's."""
        user = self.check_login(token)
        if token in self.readers or not (as_pull_request or user == owner_of(repo)):
            raise HubError(403, f"You don't have the rights to write to {repo}")


def owner_of(repo: str) -> str:
    return repo.split("/")[-2]


# Files as the Hub describes them


def is_lfs(path: str, size: int) -> bool:
    """The client sends empty files as regular ones, whatever they are called."""
    return size > 0 and path.endswith(_LFS_SUFFIXES)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    """The sha1 by which git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(data: bytes) -> bytes:
    """What git itself keeps of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()


def file_entry(path: str, data: bytes) -> dict:
    """A file as `list_repo_tree` and `get_paths_info` expect it."""
    entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if is_lfs(path, len(data)):
        text = pointer(data)
        entry["oid"] = git_oid(text)
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": len(text)}
    return entry


def folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": git_oid(path.encode())}


def sibling(path: str, data: bytes) -> dict:
    """A file as `model_info(files_metadata=True)` expects it."""
    entry = file_entry(path, data)
    described = {"rfilename": path, "size": len(data), "blobId": entry["oid"]}
    if "lfs" in entry:
        described["lfs"] = {"sha256": entry["lfs"].pop("oid"), **entry["lfs"]}
    return described


def tree(files: Files, folder: str | None, *, recursive: bool) -> list[dict]:
    """The entries of `folder` (None: the root)."""
    prefix = f"{folder}/" if folder else ""
    inside = {path: data for path, data in sorted(files.items()) if path.startswith(prefix)}
    if folder and not inside:
        raise HubError(404, f"{folder} does not exist", "EntryNotFound")
    entries, folders = [], set()
    for path, data in inside.items():
        parents = path.removeprefix(prefix).split("/")[:-1]
        depth = len(parents) if recursive else min(len(parents), 1)
        folders |= {prefix + "/".join(parents[: i + 1]) for i in range(depth)}
        if recursive or not parents:
            entries.append(file_entry(path, data))
    return entries + [folder_entry(path) for path in sorted(folders)]
