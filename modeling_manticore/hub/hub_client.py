"""
What talks to the Hub, in a process of its own: `python hub_client.py`, a request as one line of JSON on standard
input, answers as lines of JSON on standard output. It imports huggingface_hub and nothing of this package.

A process of its own, because huggingface_hub sets no time-outs for its calls and the native code of hf_xet cannot be
interrupted: whoever waits here (`transfer.py`) can kill it. It ends itself when its standard input closes, so it does
not outlive a killed parent.

Answers: {"alive": n, "bytes": so many went over the wire, "total": of so many (or null), "file": which is on its way}
at every new sign of progress, then {"done": {...}} or {"failed": message, "kind": kind}.
A sign of progress is new when the same byte of the same request was not sent, or answered, before; so a client that
sends the same thing again and again gives none.
"""

import functools
import hashlib
import importlib
import json
import os
import re
import sys
import threading
import time
from pathlib import Path


sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 40.0
WAITS = (1, 2, 4, 8)  # seconds between attempts; the last one repeats
STEP = 2**18  # bytes


class Failure(Exception):
    """What the user is told, and which kind of failure it is."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Progress:
    """Signs of life, each counted once."""

    def __init__(self):
        self._seen, self._lock, self.last = set(), threading.Lock(), time.monotonic()
        self.file = None  # which is being downloaded
        self.bytes, self.total, self.answered = 0, None, False
        self._counts = {}

    def count(self, *what, upto: int) -> None:
        """So many bytes of something went over the wire, all in all."""
        with self._lock:
            self.bytes += max(0, upto - self._counts.get(what, 0))
            self._counts[what] = max(upto, self._counts.get(what, 0))

    def mark(self, *sign) -> None:
        """Tell the parent of a sign that was not there before."""
        with self._lock:
            if sign not in self._seen:
                self._seen.add(sign)
                self.last = time.monotonic()
                say({"alive": len(self._seen), "bytes": self.bytes, "total": self.total, "file": self.file})


def say(answer: dict) -> None:
    """One line to the parent."""
    print(json.dumps(answer), flush=True)


def watch_client(progress: Progress) -> None:
    """Give huggingface_hub's HTTP client time-outs, and count what goes over the wire as signs of life."""
    import huggingface_hub
    from huggingface_hub.utils import _xet_progress_reporting
    from huggingface_hub.utils._http import default_client_factory

    def client():
        made = default_client_factory()
        http = importlib.import_module(type(made).__module__.split(".")[0])
        made.timeout = http.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)

        class Counted(http.SyncByteStream):
            def __init__(self, stream, *sign):
                self.stream, self.sign = stream, sign

            def __iter__(self):
                passed = 0
                for chunk in self.stream:
                    yield chunk
                    passed += len(chunk)
                    if "/api/" not in self.sign[-1]:
                        progress.count(*self.sign, upto=passed)
                    progress.mark(*self.sign, passed // STEP)

            def close(self):
                if hasattr(self.stream, "close"):
                    self.stream.close()

        def on_request(request):
            if isinstance(request.stream, http.SyncByteStream):
                request.stream = Counted(request.stream, "sent", request.method, str(request.url))

        def on_response(response):
            if response.status_code < 500:
                sign = (response.request.method, str(response.request.url))
                progress.answered = True
                progress.mark("answered", *sign)
                response.stream = Counted(response.stream, "received", *sign)

        hooks = made.event_hooks
        made.event_hooks = {
            "request": [*hooks["request"], on_request],
            "response": [*hooks["response"], on_response],
        }
        return made

    huggingface_hub.set_client_factory(client)
    for name in ("XetUploadProgressReporter", "XetDownloadProgressReporter"):
        reporter = getattr(_xet_progress_reporting, name)
        reporter.update_progress = counted(reporter.update_progress, name, progress)


def counted(update_progress, name: str, progress: Progress):
    """hf_xet's report of progress, which also marks it."""

    def update(self, report, *rest):
        progress.count(name, progress.file, upto=report.total_bytes_completed)
        for field in ("total_bytes_completed", "total_transfer_bytes_completed"):
            progress.mark(name, progress.file, field, getattr(report, field) // STEP)
        return update_progress(self, report, *rest)

    return update


# ------------------------------------------------------------------ errors
def connection_trouble(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is one that may be gone at the next attempt."""
    while error is not None:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status is not None:
            return status >= 500 or status in (408, 429)
        names = {kind.__name__ for kind in type(error).__mro__}
        if "OfflineModeIsEnabled" in names:
            return False
        if isinstance(error, (ConnectionError, TimeoutError)) or "TransportError" in names:
            return True
        error = error.__cause__ or error.__context__
    return False


def unreachable(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that nobody listens at the address, or that it has no such name."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, ConnectionRefusedError) or names & {"ConnectError", "ConnectTimeout", "gaierror"}:
            return True
        error = error.__cause__ or error.__context__
    return False


def explained(error: Exception, repo: str, revision: str | None, address: str) -> Failure:
    """The failure that an exception of huggingface_hub is, in one line."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    detail = " ".join(str(getattr(error, "server_message", None) or error).split())[:300]
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Failure("offline", "HF_HUB_OFFLINE is set: the Hub may not be asked.")
    if isinstance(error, errors.GatedRepoError):
        return Failure("access", f"repo_id: access to {repo!r} is restricted; ask for it on its page.")
    if isinstance(error, errors.RevisionNotFoundError):
        return Failure("missing", f"revision: {repo!r} has no revision {revision!r}.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return Failure(
            "missing", f"repo_id: there is no repository {repo!r}, or it is private and the token may not see it."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return Failure("missing", f"repo_id: {repo!r} lacks a file ({detail}).")
    if status in (401, 403):
        return Failure("access", f"token: it was not accepted, or may not do this in {repo!r} ({status}: {detail}).")
    if status == 412:
        return Failure(
            "overtaken",
            f"revision: somebody else committed to {revision or 'main'!r} of {repo!r} meanwhile; nothing was pushed. "
            "Look at that commit and push again.",
        )
    if unreachable(error):
        return Failure("connection", f"the Hub at {address} cannot be reached ({detail}).")
    if connection_trouble(error):
        return Failure("connection", f"the connection to the Hub at {address} failed again and again ({detail}).")
    return Failure("refused", f"the Hub or its client refused it: {type(error).__name__}: {detail}")


# ------------------------------------------------------------------ operations
def push(api, request: dict, digest, progress: Progress) -> dict:
    """
    Bring files into a repository with one commit, or none where nothing differs.

    request: repo_id; files {path in the repository: local path}; kept (paths that stay as they are where the
        repository has them); stale (pattern of paths that go if they are not in files); revision, create_pr, private,
        message, description, verify; repo_type ("space" for a Gradio Space, else a model).
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo, revision = request["repo_id"], request["revision"]
    kind = request.get("repo_type")
    sdk = {"space_sdk": "gradio"} if kind == "space" else {}
    repo = api.create_repo(repo, private=request["private"], exist_ok=True, repo_type=kind, **sdk).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True, repo_type=kind)
    head = api.repo_info(repo, revision=revision, repo_type=kind).sha
    there = listed(api, repo, head, kind)
    files = {
        path: local for path, local in request["files"].items() if path not in request["kept"] or path not in there
    }
    different = [path for path, local in files.items() if not is_same(there.get(path), local, digest)]
    progress.total = sum(os.path.getsize(files[path]) for path in different)
    stale = [path for path in there if path not in request["files"] and re.fullmatch(request["stale"], path)]
    result = {"repo_id": repo, "commit": head, "changed": different + stale, "pull_request": None}
    place = f"spaces/{repo}" if kind == "space" else repo
    result |= {"endpoint": api.endpoint, "url": f"{api.endpoint}/{place}/commit/{head}"}
    if not result["changed"]:
        return result
    operations = [CommitOperationAdd(path, files[path]) for path in different]
    for operation, path in zip(operations, different):  # or the client would hash in silence before it sends
        operation.upload_info.sha256 = bytes.fromhex(digest(files[path], "sha256"))
    operations += [CommitOperationDelete(path) for path in stale]
    made = api.create_commit(
        repo,
        operations,
        commit_message=request["message"],
        commit_description=request["description"],
        revision=revision,
        create_pr=request["create_pr"],
        parent_commit=head,
        repo_type=kind,
    )
    result |= {"commit": made.oid, "pull_request": made.pr_url, "url": str(made.commit_url)}
    if request["verify"]:
        now = listed(api, repo, made.oid, kind)
        wrong = [path for path, local in files.items() if not is_same(now.get(path), local, digest)]
        wrong += [path for path in stale if path in now]
        if wrong:
            raise Failure("unverified", f"repo_id: after the push {repo!r} differs from what was sent in {wrong[:5]}.")
    return result


def listed(api, repo: str, revision: str, kind: str | None = None) -> dict:
    """{path: entry with the hashes that the Hub states} of all files at a revision."""
    entries = api.list_repo_tree(repo, recursive=True, revision=revision, repo_type=kind)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def is_same(entry, local: str, digest) -> bool:
    """Whether the Hub states the hash of the local file: SHA-256 of a large file, git's hash of a small one."""
    if entry is None or entry.size != os.path.getsize(local):
        return False
    return digest(local, "sha256") == entry.lfs.sha256 if entry.lfs else digest(local, "sha1") == entry.blob_id


def digests(progress: Progress):
    """A function (file, "sha256" or git's "sha1") -> hexadecimal hash. It computes each once, with signs of life."""

    @functools.cache
    def digest(local: str, kind: str) -> str:
        made = hashlib.new(kind, b"" if kind == "sha256" else b"blob %d\0" % os.path.getsize(local))
        with open(local, "rb") as file:
            while chunk := file.read(2**24):
                made.update(chunk)
                progress.mark(kind, local, file.tell())
        return made.hexdigest()

    return digest


def fetch(api, request: dict, digest, progress: Progress) -> dict:
    """
    Bring files of a repository into the local cache, one after the other: repo_id, revision, patterns (as in a shell),
    cache_dir. The commit, the folder, and the names of all files that the repository has.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    repo = request["repo_id"]
    commit = api.repo_info(repo, revision=request["revision"]).sha
    entries = listed(api, repo, commit)
    paths, folder = sorted(entries), None
    wanted = list(filter_repo_objects(paths, allow_patterns=request["patterns"]))
    kept = {"cache_dir": request.get("cache_dir"), "revision": commit}
    new = [path for path in wanted if not isinstance(try_to_load_from_cache(repo, path, **kept), str)]
    progress.total = sum(entries[path].size for path in new)
    for path in wanted:
        progress.file = path
        local = api.hf_hub_download(repo, path, revision=commit, cache_dir=request.get("cache_dir"))
        progress.mark("file", path)
        folder = str(Path(local).parents[path.count("/")])
    if folder is None:
        raise Failure("missing", f"repo_id: {repo!r} has no file like {request['patterns']}.")
    return {"commit": commit, "folder": folder, "files": paths}


def create(api, request: dict, digest, progress: Progress) -> dict:
    """Make a repository unless it exists: repo_id, private. Its full name."""
    return {"repo_id": api.create_repo(request["repo_id"], private=request["private"], exist_ok=True).repo_id}


OPERATIONS = {"push": push, "fetch": fetch, "create": create}


def repeated(operation, api, request: dict, progress: Progress) -> dict:
    """
    Run an operation, once more after connection trouble (a commit of which no answer came may have been made), and
    then while something new happened in the last half of the parent's patience. Where nobody has ever answered, and
    nobody listens at the address, it is tried three times in some seconds.

    Raises:
        Failure: with what the user is told.
    """
    digest, attempt = digests(progress), 0
    while True:
        try:
            return operation(api, request, digest, progress)
        except Failure:
            raise
        except Exception as error:
            wait = WAITS[min(attempt, len(WAITS) - 1)]
            idle = time.monotonic() + wait - progress.last
            twice = request.get("create_pr")  # a second attempt could open a second pull request
            dead = unreachable(error) and not progress.answered and (attempt >= 2 or idle > CONNECT_SECONDS)
            if not connection_trouble(error) or twice or dead or (attempt and idle > request["patience"] / 2):
                raise explained(error, request["repo_id"], request.get("revision"), api.endpoint) from error
            time.sleep(wait)
            attempt += 1


def end_with_parent() -> None:
    """End this process when the parent's end of standard input is gone."""
    sys.stdin.buffer.read()
    os._exit(3)


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    token = request.pop("token")
    progress = Progress()
    progress.mark("started")
    try:
        from huggingface_hub import HfApi

        progress.mark("imported")
        watch_client(progress)
        answer = {"done": repeated(OPERATIONS[request["operation"]], HfApi(token=token or False), request, progress)}
    except Failure as failure:
        answer = {"failed": str(failure), "kind": failure.kind}
    text = json.dumps(answer)
    print(text.replace(token, "***") if token else text, flush=True)
    sys.stdout.flush()
    os._exit(0)  # threads of a native client that still retry would keep the process


if __name__ == "__main__":
    main()
