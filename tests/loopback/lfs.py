"""Git LFS as the Hub speaks it: batch, upload, verify."""

import hashlib
import json
import os
import threading

from .faults import HubError


CHUNK = 2**20


def batch(handler, name: str) -> None:
    """POST /{name}.git/info/lfs/objects/batch: where to upload what is not here yet."""
    handler.repository(name, write=True)
    objects = []
    for wanted in json.loads(handler.body())["objects"]:
        place = f"{handler.base}/_lfs/{wanted['oid']}"
        here = handler.hub.store.path(wanted["oid"]).exists()
        actions = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
        objects.append(wanted if here else wanted | {"actions": actions})
    handler.answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")


def upload(handler, oid: str) -> None:
    """PUT /_lfs/{oid}: the content, kept only if it is whole."""
    store, digest = handler.hub.store, hashlib.sha256()
    partial = store.path(f".{oid}.{threading.get_ident()}")
    left = int(handler.headers.get("Content-Length") or 0)
    with open(partial, "wb") as file:
        while left and (chunk := handler.rfile.read(min(left, CHUNK))):
            digest.update(chunk)
            file.write(chunk)
            left -= len(chunk)
    if left or digest.hexdigest() != oid:
        partial.unlink()
        raise HubError(400, message="the content does not have this SHA-256")
    os.replace(partial, store.path(oid))
    handler.answer({})


def verify(handler, oid: str) -> None:
    """POST /_lfs/{oid}/verify."""
    path, wanted = handler.hub.store.path(oid), json.loads(handler.body())
    if not path.exists() or path.stat().st_size != wanted["size"]:
        raise HubError(404, message="there is no such object")
    handler.answer({})
