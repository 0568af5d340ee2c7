"""
Pushes and downloads through the real client against a loopback Hub that misbehaves: each ends in time, in success
after a retry or in one clear error, and the repository holds a whole commit or none.
"""

import hashlib
import math
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from loopback import TOKEN, LoopbackHub

from modeling_manticore import progress
from modeling_manticore.hub import transfer
from modeling_manticore.hub.transfer import HubError, call


PATIENCE = 25.0  # seconds; users get 60
LIMIT = 120.0  # seconds
MODES = ("lfs", "xet")


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    """One Hub for each mode. What waits for time-outs asks both at once."""
    folders = {mode: tmp_path_factory.mktemp(mode) for mode in MODES}
    with LoopbackHub(folders["lfs"]) as lfs, LoopbackHub(folders["xet"], xet=True) as xet:
        yield {"lfs": lfs, "xet": xet}


@pytest.fixture(params=MODES)
def hub(hubs, request):
    return hubs[request.param]


class Case:
    """One repository with one version of its files, to be pushed or fetched."""

    def __init__(self, hub, folder, name, private=False, token=TOKEN):
        self.hub, self.folder, self.repo, self.private, self.token = (
            hub,
            folder / name,
            f"tester/{name}",
            private,
            token,
        )
        self.folder.mkdir()
        self.write(name)

    def write(self, text):
        """The files; their contents depend on the text."""
        (self.folder / "config.json").write_text(f'{{"text": "{text}"}}')
        (self.folder / "README.md").write_text(f"---\nlibrary_name: transformers\n---\n\n{text}\n")
        (self.folder / "model.safetensors").write_bytes((self.repo + text).encode() * 20_000)
        self.weights = hashlib.sha256((self.folder / "model.safetensors").read_bytes()).hexdigest()

    @property
    def files(self):
        return {path.name: str(path) for path in self.folder.iterdir()}

    def environment(self, cache="cache"):
        return dict(os.environ) | self.hub.environment(self.folder.parent / f"{self.folder.name}-{cache}", self.token)

    def push(self, patience=PATIENCE, **options):
        settings = {"kept": [], "stale": "old.*", "revision": None, "create_pr": False, "private": self.private}
        settings |= {"message": "Upload", "description": None, "verify": True}
        request = {"repo_id": self.repo, "files": self.files} | settings | options
        return call("push", request, needs_token=True, patience=patience, environment=self.environment())

    def fetch(self, patience=PATIENCE, revision=None, cache="cache", patterns=None):
        request = {"repo_id": self.repo, "revision": revision, "patterns": patterns}
        return call("fetch", request, token=self.token, patience=patience, environment=self.environment(cache))

    def there(self, revision="main"):
        """{path: content hash} in the repository, and the titles of its commits."""
        repository = self.hub.store.repositories[self.repo]
        files = repository.find(revision).files
        return {p: e.sha256 or e.oid for p, e in files.items()}, [c.title for c in repository.history(revision)]

    def is_whole(self):
        """Whether the repository has these files and one commit with them."""
        files, titles = self.there()
        return files.keys() == self.files.keys() and titles == ["Upload", "initial commit"]


def outcome(action):
    """(result or HubError, seconds)."""
    start = time.monotonic()
    try:
        result = action()
    except HubError as error:
        result = error
    return result, time.monotonic() - start


def places(hub, case):
    """{step of a push: requests in which it happens}."""
    api = f"/api/models/{case.repo}"
    upload = f"GET {api}/xet-write-token" if hub.xet_folder else f"PUT /_lfs/{case.weights}"
    return {"preupload": f"POST {api}/preupload/", "upload": upload, "commit": f"POST {api}/commit/"}


STEPS = ("preupload", "upload", "commit")


def test_one_fault_is_survived(hub, tmp_path):
    labels = [(step, "drop") for step in STEPS] + [("commit", "drop_after"), ("preupload", "error")]
    cases = {(step, kind): Case(hub, tmp_path, f"once-{step}-{kind}") for step, kind in labels}
    for (step, kind), case in cases.items():
        hub.faults.add(kind, places(hub, case)[step], times=1)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda case: outcome(case.push), cases.values()))
    for (label, case), (result, seconds) in zip(cases.items(), results):
        assert isinstance(result, dict), (label, result)
        assert case.is_whole() and seconds < LIMIT, label
        assert result["commit"] == hub.store.repositories[case.repo].branches["main"]


def test_a_fault_that_stays_ends_in_one_error_and_a_rerun_completes(hubs, tmp_path):
    labels = [(mode, step, kind) for mode in MODES for step in STEPS for kind in ("drop", "stall")]
    cases = {label: Case(hubs[label[0]], tmp_path, "always-" + "-".join(label)) for label in labels}
    faults = {label: case.hub.faults.add(label[2], places(case.hub, case)[label[1]]) for label, case in cases.items()}
    with ThreadPoolExecutor(len(cases)) as pool:
        results = list(pool.map(lambda case: outcome(case.push), cases.values()))
    for (label, case), (error, seconds) in zip(cases.items(), results):
        case.hub.faults.clear()
        assert isinstance(error, HubError) and error.kind in ("connection", "stalled"), (label, error)
        assert "\n" not in str(error) and TOKEN not in str(error) and seconds < LIMIT, (label, seconds)
        assert faults[label].hits and case.there() == ({}, ["initial commit"]), label
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda case: outcome(case.push), cases.values()))
    assert all(isinstance(result, dict) for result, _ in results) and all(c.is_whole() for c in cases.values())


def test_a_commit_of_which_no_answer_came_is_not_made_twice(hub, tmp_path):
    case = Case(hub, tmp_path, "applied")
    hub.faults.add("drop_after", f"POST /api/models/{case.repo}/commit/")
    result = case.push()
    assert result["changed"] == [] and case.is_whole()
    assert case.push()["commit"] == result["commit"] and case.is_whole()
    hub.faults.clear()
    case.write("second")
    assert case.push()["changed"] and case.there()[1] == ["Upload", "Upload", "initial commit"]


DOWNLOAD_FAULTS = {
    "head-once": ("drop", "HEAD {file}", 1),
    "once": ("drop", "GET {weights}", 1),
    "cut": ("truncate", "GET {file}", 1),
    "head-always": ("drop", "HEAD {file}", math.inf),
    "always": ("drop", "GET {weights}", math.inf),
    "stalled": ("stall", "GET {weights}", math.inf),
}


def test_downloads(hubs, tmp_path):
    labels = [(mode, name) for mode in MODES for name in DOWNLOAD_FAULTS]
    cases = {label: Case(hubs[label[0]], tmp_path, "down-" + "-".join(label)) for label in labels}
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(Case.push, cases.values()))
    for (mode, name), case in cases.items():
        kind, pattern, times = DOWNLOAD_FAULTS[name]
        file = f"/{case.repo}/resolve/"
        weights = f"/api/models/{case.repo}/xet-read-token" if mode == "xet" else f"{file}.*safetensors"
        case.hub.faults.add(kind, pattern.format(file=file, weights=weights), times)
    with ThreadPoolExecutor(len(cases)) as pool:
        results = list(pool.map(lambda case: outcome(lambda: case.fetch(cache="fresh")), cases.values()))
    for (label, case), (result, seconds) in zip(cases.items(), results):
        case.hub.faults.clear()
        assert seconds < LIMIT, label
        if DOWNLOAD_FAULTS[label[1]][2] == math.inf:
            assert isinstance(result, HubError) and result.kind in ("connection", "stalled"), (label, result)
            assert TOKEN not in str(result) and "\n" not in str(result)
            result = case.fetch(cache="fresh")  # the client was killed, or gave up; now it completes
        assert isinstance(result, dict), (label, result)
        for path, original in case.files.items():
            assert Path(original).read_bytes() == Path(result["folder"], path).read_bytes(), (label, path)


def test_who_may_do_what(hub, tmp_path):
    ours = Case(hub, tmp_path, "private", private=True)
    ours.push()
    before = ours.there()
    expected = {
        "no token": (Case(hub, tmp_path, "anonymous", token=None), "push", {}, "access", "token: there is none"),
        "wrong token": (
            Case(hub, tmp_path, "wrong", token="hf_wrongSecret"),
            "push",
            {},
            "access",
            "token: it was not",
        ),
        "missing": (Case(hub, tmp_path, "missing"), "fetch", {}, "missing", "there is no repository 'tester/missing'"),
        "revision": (ours, "fetch", {"revision": "v9"}, "missing", "revision: 'tester/private' has no revision 'v9'"),
        "file": (ours, "fetch", {"patterns": ["no.json"]}, "missing", "'tester/private' has no file like ['no.json']"),
    }
    for label, (case, action, options, kind, message) in expected.items():
        error, seconds = outcome(lambda case=case, action=action, options=options: getattr(case, action)(**options))
        assert isinstance(error, HubError) and error.kind == kind and message in str(error), (label, error)
        assert not any(secret in str(error) for secret in (TOKEN, "hf_wrongSecret")) and seconds < LIMIT
    ours.token = None
    error, _ = outcome(lambda: ours.fetch(cache="other"))
    assert error.kind == "missing" and "or it is private" in str(error)
    assert ours.there() == before


def test_a_branch_that_moved_is_left_alone(hub, tmp_path):
    case = Case(hub, tmp_path, "overtaken")
    hub.faults.add("overtake", f"POST /api/models/{case.repo}/commit/", times=1)
    error, _ = outcome(case.push)
    assert error.kind == "overtaken" and "somebody else committed to 'main'" in str(error)
    assert case.there()[1] == ["overtaking", "initial commit"]
    case.push()
    files, titles = case.there()
    assert titles == ["Upload", "overtaking", "initial commit"] and files.keys() == case.files.keys() | {"other.txt"}


def test_branches_pull_requests_stale_shards_and_kept_files(hub, tmp_path):
    case = Case(hub, tmp_path, "branches")
    (case.folder / "old-1.safetensors").write_bytes(b"old" * 1000)
    first = case.push(revision="next")
    assert case.there()[0] == {} and "old-1.safetensors" in case.there("next")[0]
    (case.folder / "old-1.safetensors").unlink()
    case.write("second")
    second = case.push(revision="next", kept=["README.md"])
    old, new = (case.hub.store.repositories[case.repo].find(made["commit"]).files for made in (first, second))
    assert "old-1.safetensors" not in new and old["README.md"] == new["README.md"]
    assert old["config.json"] != new["config.json"]
    asked = case.push(create_pr=True)
    assert asked["pull_request"].endswith("/discussions/1") and case.there()[0] == {}
    assert case.there("refs/pr/1")[0].keys() == case.files.keys()


def test_a_dead_address_is_named_within_seconds(tmp_path):
    """Nobody listens there: no half minute of attempts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    variables = dict(os.environ) | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_x"}
    variables.pop("HF_HUB_OFFLINE", None)
    settings = {"kept": [], "stale": "old.*", "revision": None, "create_pr": False, "private": False, "verify": True}
    request = {"repo_id": "me/x", "files": {}, "message": "Upload", "description": None} | settings
    start = time.monotonic()
    with pytest.raises(HubError, match=f"the Hub at {address} cannot be reached") as error:
        call("push", request, needs_token=True, environment=variables)
    assert error.value.kind == "connection" and time.monotonic() - start < 20


def test_what_takes_long_is_told_with_its_address(hubs, tmp_path, capfd, monkeypatch):
    hub = hubs["lfs"]
    monkeypatch.setattr(transfer, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    case = Case(hub, tmp_path, "told")
    case.push()
    said = capfd.readouterr().err
    assert f"pushing {case.repo} to {hub.environment(tmp_path)['HF_ENDPOINT']}" in said and "B/s" in said
    case.fetch(patterns=["*.json", "*.safetensors"])
    said = capfd.readouterr().err
    assert f"fetching {case.repo} from" in said and "left" in said
    monkeypatch.setattr(transfer, "QUIET_SECONDS", 60.0)
    case.fetch(cache="other")
    assert capfd.readouterr().err == ""
