"""What the loopback Hub keeps: repositories, commits, and contents by hash."""

import hashlib
import itertools
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from .faults import HubError


def now() -> str:
    """The time as the Hub writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def blob_oid(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One file of a commit: its git hash, size in bytes, and for large files their SHA-256 and perhaps Xet hash."""

    oid: str
    size: int
    sha256: str | None = None
    xet: str | None = None

    def listed(self, path: str) -> dict:
        """As the tree endpoint lists it."""
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        if self.xet:
            entry["xetHash"] = self.xet
        return entry


@dataclass(frozen=True)
class Commit:
    """One commit: the whole tree as {path: Entry}."""

    sha: str
    parent: str | None
    title: str
    files: dict[str, Entry]
    date: str = field(default_factory=now)


@dataclass
class Repository:
    """Branches, tags and pull requests ("refs/pr/1") point at commits."""

    name: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    created: str = field(default_factory=now)
    _count: itertools.count = field(default_factory=itertools.count)

    def find(self, revision: str) -> Commit:
        """
        Raises:
            HubError: there is no such revision.
        """
        name = revision.removeprefix("refs/heads/")
        sha = self.branches.get(name) or self.tags.get(name) or (name if name in self.commits else None)
        if sha is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]

    def commit(self, branch: str, files: dict[str, Entry], title: str, parent: str | None) -> Commit:
        """Put a new commit on a branch."""
        seed = f"{self.name} {next(self._count)} {parent} {title} {sorted(files)}"
        made = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, files)
        self.commits[made.sha] = made
        self.branches[branch] = made.sha
        return made

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits of a revision, newest first. The last is the empty one that creation makes."""
        chain, commit = [], self.find(revision)
        while commit is not None:
            chain.append(commit)
            commit = self.commits.get(commit.parent)
        return chain


class Store:
    """All repositories, and contents in a folder under their hashes."""

    def __init__(self, folder: Path):
        self.lock, self.repositories, self.folder = threading.RLock(), {}, folder
        folder.mkdir(parents=True, exist_ok=True)

    def create(self, name: str, private: bool = False) -> Repository:
        """A new repository with one empty commit on main."""
        repository = self.repositories[name] = Repository(name, private)
        repository.commit("main", {}, "initial commit", None)
        return repository

    def path(self, key: str) -> Path:
        """Where a content with this hash is, or would be."""
        return self.folder / key

    def put(self, content: bytes) -> Entry:
        """Keep a small file."""
        oid = blob_oid(content)
        self.path(oid).write_bytes(content)
        return Entry(oid, len(content))

    def read(self, entry: Entry) -> bytes:
        """The content of a file that is kept here (not in Xet's folder)."""
        return self.path(entry.sha256 or entry.oid).read_bytes()
