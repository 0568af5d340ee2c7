"""
A Hub on the loopback interface, for tests of what this package asks of a Hub.

    with LoopbackHub(folder) as hub:                 # LFS;  LoopbackHub(folder, xet=True) for Xet
        hub.faults.add("drop", r"POST .*/commit/", times=1)
        subprocess.run(..., env=hub.environment(cache))
        hub.store.repositories["tester/name"].history("main")

What it tests: the calls this package makes, and the real client (huggingface_hub, hf_xet, transformers) that makes
them, over HTTP, also when connections drop, stall or answers are cut short.
What it does not test: the rules of the real Hub. It accepts what the client of one release sends and answers what that
client needs; permissions, quotas, moderation, rate limits, gated access requests and concurrent writers are not here.
In the Xet mode bytes go to a folder (`local://`, which hf_xet understands), so the token and commit protocol and the
real Xet client are tested, the HTTP protocol of Xet's storage servers is not.
"""

from .server import TOKEN, LoopbackHub


__all__ = ["TOKEN", "LoopbackHub"]
