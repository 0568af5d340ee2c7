"""The loopback Hub's endpoints: repositories, files, commits."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from . import lfs, xet
from .faults import Faults, HubError
from .store import Commit, Entry, Repository, Store


TOKEN = "hf_loopbackSecretToken"
LARGE = re.compile(r"\.(safetensors|bin|pt|pth|gguf|pkl|onnx|h5)$")
MOST_REGULAR = 10 * 2**20  # bytes; larger files are large files whatever their name


class LoopbackHub:
    """
    The server, in threads of this process. `with` starts and stops it.

    Args:
        folder: where contents are kept.
        xet: speak Xet (through a folder) instead of LFS.
    """

    def __init__(self, folder: Path, xet: bool = False):
        self.store, self.faults, self.requests = Store(Path(folder, "contents")), Faults(), []
        self.xet_folder = Path(folder, "xet").resolve() if xet else None
        if xet:
            self.xet_folder.mkdir(parents=True, exist_ok=True)
        self.stopping = threading.Event()
        handler = type("Handler", (HubHandler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def xet_place(self, name: str) -> Path:
        """The folder with a repository's large files: one each, since the client locks it."""
        place = self.xet_folder / name.replace("/", "--")
        place.mkdir(exist_ok=True)
        return place

    def environment(self, cache: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables for a client: address, an empty cache, the token, LFS or Xet."""
        variables = {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
        variables |= {"HF_HUB_DISABLE_XET": "0" if self.xet_folder else "1", "HF_XET_CACHE": str(Path(cache, "xet"))}
        return variables | ({} if token is None else {"HF_TOKEN": token})


class HubHandler(BaseHTTPRequestHandler):
    """One connection. Endpoints are methods, found by `ROUTES`."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *arguments) -> None:
        """Nothing goes to stderr; `LoopbackHub.requests` has every request."""

    # ------------------------------------------------------------------ requests and answers
    def handle_request(self) -> None:
        self._body, self.truncate, self.silent = None, False, False
        self.url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(self.url.query).items()}
        line = f"{self.command} {unquote(self.path)}"
        self.hub.requests.append(line)
        try:
            fault = self.hub.faults.due(line)
            if fault is not None and self._meet(fault):
                return
            for methods, pattern, endpoint in ROUTES:
                match = re.fullmatch(pattern, self.url.path)
                if match and self.command in methods.split():
                    return endpoint(self, *map(unquote, match.groups()))
            raise HubError(404, message=f"no route {line}")
        except HubError as error:
            if not self.url.path.startswith("/_lfs"):
                self.body()
            headers = dict(error.headers)
            if error.code:
                headers["X-Error-Code"] = error.code
            if error.message:
                headers["X-Error-Message"] = error.message
            self.answer({"error": error.message}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def _meet(self, fault: str) -> bool:
        """Do what a fault says. Whether the request is over with that."""
        if fault == "drop":
            self.rfile.read(min(65536, int(self.headers.get("Content-Length") or 0)))
            self._hang_up()
            return True
        if fault == "stall":
            self.hub.stopping.wait()
            self._hang_up()
            return True
        if fault == "error":
            raise HubError(500, message="injected")
        self.truncate, self.silent = fault == "truncate", fault == "drop_after"
        if fault == "overtake":
            name, branch = re.fullmatch(REPO + "/commit/([^/]+)", self.url.path).groups()
            repository = self.repository(name)
            head = repository.find(unquote(branch))
            entry = self.hub.store.put(b"somebody else's\n")
            repository.commit(unquote(branch), head.files | {"other.txt": entry}, "overtaking", head.sha)
        return False

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def body(self) -> bytes:
        """The request's body, read once."""
        if self._body is None:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                self._body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    self._body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self._body

    def answer(self, content, status: int = 200, headers: dict | None = None, kind: str = "application/json") -> None:
        """Send an answer: bytes as they are, anything else as JSON."""
        if self.silent:
            return self._hang_up()
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content)), "Content-Type": kind} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.truncate:
            content = content[: len(content) // 3]
            self.close_connection = True
        self.wfile.write(content)
        return None

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    # ------------------------------------------------------------------ who may see what
    def authorised(self) -> bool:
        """
        Whether the request has the token.

        Raises:
            HubError: it has a wrong one.
        """
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {TOKEN}":
            raise HubError(401, message="Invalid credentials in Authorization header")
        return given is not None

    def repository(self, name: str, write: bool = False) -> Repository:
        """
        Raises:
            HubError: the caller may not see it, or it does not exist; the Hub does not tell which.
        """
        authorised = self.authorised()
        if write and not authorised:
            raise HubError(401, message="Invalid username or password.")
        repository = self.hub.store.repositories.get(name)
        if repository is None or (repository.private and not authorised):
            raise HubError(404 if authorised else 401, "RepoNotFound", "Repository not found")
        return repository

    # ------------------------------------------------------------------ repositories
    def whoami(self) -> None:
        if not self.authorised():
            raise HubError(401, message="Invalid username or password.")
        self.answer({"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        if not self.authorised():
            raise HubError(401, message="Invalid username or password.")
        wanted = json.loads(self.body())
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        found = {"url": f"{self.base}/{name}", "name": name, "id": name}
        with self.hub.store.lock:
            if name in self.hub.store.repositories:
                return self.answer({"error": "You already created this model repo"} | found, 409)
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.store.create(name, private)
        return self.answer(found)

    def validate(self) -> None:
        try:
            _front_matter(json.loads(self.body())["content"])
        except yaml.YAMLError as error:
            return self.answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return self.answer({"errors": [], "warnings": []})

    def info(self, name: str, revision: str = "main") -> None:
        repository = self.repository(name)
        commit = repository.find(revision)
        readme = commit.files.get("README.md")
        card = _front_matter(self.hub.store.read(readme).decode()) if readme else {}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for sibling in siblings:
                entry = commit.files[sibling["rfilename"]]
                sibling |= {"size": entry.size, "blobId": entry.oid}
                if entry.sha256:
                    sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": 134}
        self.answer(
            {
                "id": name,
                "modelId": name,
                "sha": commit.sha,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "lastModified": commit.date,
                "createdAt": repository.created,
                "tags": card.get("tags") or [],
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "cardData": card,
                "siblings": siblings,
            }
        )

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        commit = self.repository(name).find(revision)
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        files, folders = [], set()
        for path, entry in sorted(commit.files.items()):
            parts = path[len(prefix) :].split("/")
            if path.startswith(prefix):
                depth = len(parts) if recursive else min(2, len(parts))
                folders |= {prefix + "/".join(parts[:i]) for i in range(1, depth)}
                files += [entry.listed(path)] if recursive or len(parts) == 1 else []
        if prefix and not files and not folders:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        listed = [{"type": "directory", "path": f, "size": 0, "oid": _sha1(f)} for f in sorted(folders)]
        self.answer(listed + files)

    def paths_info(self, name: str, revision: str) -> None:
        commit, raw = self.repository(name).find(revision), self.body()
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(raw)["paths"] if is_json else parse_qs(raw.decode()).get("paths", [])
        self.answer([commit.files[path].listed(path) for path in paths if path in commit.files])

    def refs(self, name: str) -> None:
        repository = self.repository(name)

        def listed(named: dict[str, str], kind: str) -> list[dict]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in named.items()]

        branches = {n: sha for n, sha in repository.branches.items() if not n.startswith("refs/pr/")}
        answer = {"branches": listed(branches, "heads"), "tags": listed(repository.tags, "tags"), "converts": []}
        self.answer(answer)

    def commits(self, name: str, revision: str) -> None:
        history = self.repository(name).history(revision)
        listed = [{"id": c.sha, "title": c.title, "message": "", "date": c.date, "authors": []} for c in history]
        self.answer(listed)

    def branch(self, name: str, branch: str) -> None:
        repository, raw = self.repository(name, write=True), self.body()
        if self.command == "DELETE":
            repository.branches.pop(branch, None)
        elif branch in repository.branches:
            raise HubError(409, message="Reference already exists")
        else:
            start = json.loads(raw or b"{}").get("startingPoint", "main")
            repository.branches[branch] = repository.find(start).sha
        self.answer({})

    def tag(self, name: str, revision: str) -> None:
        repository, raw = self.repository(name, write=True), self.body()
        if self.command == "DELETE":
            if repository.tags.pop(revision, None) is None:
                raise HubError(404, "RevisionNotFound", revision)
        else:
            repository.tags[json.loads(raw)["tag"]] = repository.find(revision).sha
        self.answer({})

    # ------------------------------------------------------------------ commits and downloads
    def preupload(self, name: str, revision: str) -> None:
        commit = self.repository(name, write=True).find(revision)
        answers = []
        for file in json.loads(self.body())["files"]:
            large = LARGE.search(file["path"]) or file["size"] > MOST_REGULAR
            entry = commit.files.get(file["path"])
            oid = None if entry is None else entry.sha256 or entry.oid
            mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            answers.append({"path": file["path"]} | mode)
        self.answer({"files": answers})

    def commit(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        operations = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        header = next(operation["value"] for operation in operations if operation["key"] == "header")
        with self.hub.store.lock:
            parent = repository.find(branch)
            if branch not in repository.branches:
                raise HubError(400, message="this revision is not a branch")
            expected = header.get("parentCommit")
            if expected and not parent.sha.startswith(expected):
                raise HubError(412, message="A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for operation in operations:
                self._apply(name, operation["key"], operation["value"], files)
            answer = {"success": True, "hookOutput": ""}
            if "create_pr" in self.query:
                number = sum(ref.startswith("refs/pr/") for ref in repository.branches) + 1
                branch = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{self.base}/{name}/discussions/{number}"
            made = repository.commit(branch, files, header["summary"], parent.sha)
        self.answer(answer | {"commitOid": made.sha, "commitUrl": f"{self.base}/{name}/commit/{made.sha}"})

    def _apply(self, name: str, key: str, value: dict, files: dict[str, Entry]) -> None:
        """One line of a commit, on the tree `files`."""
        if key == "file":
            files[value["path"]] = self.hub.store.put(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[value["path"]] = self._large_file(name, value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            start = value["path"].rstrip("/") + "/" if key == "deletedFolder" else None
            gone = [p for p in files if p == value["path"] or (start and p.startswith(start))]
            if not gone:
                raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            for path in gone:
                del files[path]

    def _large_file(self, name: str, sha256: str) -> Entry:
        path = self.hub.store.path(sha256)
        if path.exists():
            return Entry(_sha1(sha256), path.stat().st_size, sha256)
        found = xet.contents(self.hub.xet_place(name)).get(sha256) if self.hub.xet_folder else None
        if found is None:
            raise HubError(400, message=f"the object {sha256} was not uploaded")
        return Entry(_sha1(sha256), found[1], sha256, found[0])

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name)
        if repository.gated:
            raise HubError(403, "GatedRepo", f"Access to model {name} is restricted")
        commit: Commit = repository.find(revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        entry = commit.files.get(path)
        if entry is None:
            raise HubError(404, "EntryNotFound", "Entry not found", headers)
        headers["ETag"] = f'"{entry.sha256 or entry.oid}"'
        if entry.sha256:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(entry.size)}
        if entry.xet:
            route = f"{self.base}/api/models/{name}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": entry.xet, "X-Xet-Refresh-Route": route}
        kind = "application/octet-stream"
        if self.command == "HEAD":
            return self.answer(b"", headers=headers | {"Content-Length": str(entry.size)}, kind=kind)
        if entry.xet and not self.hub.store.path(entry.sha256).exists():
            target = self.hub.store.path(entry.sha256)
            xet.fetch(self.hub.xet_place(name), entry.xet, entry.size, entry.sha256, target)
        content = self.hub.store.read(entry)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.answer(content, headers=headers, kind=kind)
        first, last = int(wanted[1]), min(int(wanted[2] or entry.size), entry.size - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{entry.size}"
        return self.answer(content[first : last + 1], 206, headers, kind)


def _front_matter(readme: str) -> dict:
    match = re.match(r"---\n(.*?)\n---", readme, re.S)
    return (yaml.safe_load(match[1]) if match else None) or {}


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


REPO = r"/api/(?:models|spaces)/([^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", HubHandler.whoami),
    ("POST", "/api/repos/create", HubHandler.create),
    ("POST", "/api/validate-yaml", HubHandler.validate),
    ("GET", REPO, HubHandler.info),
    ("GET", r"/api/models/([^/]+)", HubHandler.info),  # a name without owner, of which there is none here
    ("GET", r"/api/models/([^/]+)/revision/([^/]+)", HubHandler.info),
    ("GET", REPO + "/revision/([^/]+)", HubHandler.info),
    ("GET", REPO + "/tree/([^/]+)", HubHandler.tree),
    ("GET", REPO + "/tree/([^/]+)/(.+)", HubHandler.tree),
    ("POST", REPO + "/paths-info/([^/]+)", HubHandler.paths_info),
    ("GET", REPO + "/refs", HubHandler.refs),
    ("GET", REPO + "/commits/([^/]+)", HubHandler.commits),
    ("POST DELETE", REPO + "/branch/([^/]+)", HubHandler.branch),
    ("POST DELETE", REPO + "/tag/([^/]+)", HubHandler.tag),
    ("POST", REPO + "/preupload/([^/]+)", HubHandler.preupload),
    ("POST", REPO + "/commit/([^/]+)", HubHandler.commit),
    ("GET", REPO + "/xet-(?:read|write)-token/([^/]+)", xet.token),
    ("POST", r"(?:/spaces)?/([^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs.batch),
    ("PUT", "/_lfs/([0-9a-f]{64})", lfs.upload),
    ("POST", "/_lfs/([0-9a-f]{64})/verify", lfs.verify),
    ("GET HEAD", "(?:/spaces)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", HubHandler.resolve),
]
