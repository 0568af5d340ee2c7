"""Calls to the Hub that end: each runs `hub_client.py` in a process of its own, which is killed when it stalls."""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from huggingface_hub import get_token


PATIENCE = 60.0  # seconds without any sign of progress
CLIENT = Path(__file__).with_name("hub_client.py")


class HubError(ValueError):
    """
    A call to the Hub that failed. `kind` says how: "access", "missing", "overtaken", "connection", "stalled",
    "offline", "refused", "unverified" or "crashed".
    """

    exit_code = 1  # of the command line

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


def call(
    operation: str,
    request: dict[str, Any],
    *,
    token: str | bool | None = None,
    needs_token: bool = False,
    patience: float = PATIENCE,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """
    Run one operation of `hub_client.py` and wait for its end.

    Args:
        operation: "push", "fetch" or "create"; `request` is described there.
        token: as everywhere in huggingface_hub: a token, None for the usual places, False for none.
        needs_token: refuse to start without one.
        patience: seconds without a new sign of progress after which the call is given up. Where the connection fails
            but does not hang, it is tried again for half of that.
        environment: variables in place of this process's own.

    Raises:
        HubError: one line that says what is wrong. The token is not in it.
    """
    if isinstance(patience, bool) or not isinstance(patience, (int, float)) or not 0 < patience < float("inf"):
        raise ValueError(f"patience: got {patience!r}, allowed is a positive number of seconds.")
    variables = dict(os.environ if environment is None else environment)
    quiet = variables.pop("HF_HUB_DISABLE_PROGRESS_BARS", "0").upper() in ("1", "ON", "YES", "TRUE")
    secret = check_token(token, environment) if needs_token else _token(token, environment)
    lines, told = queue.Queue(), []
    with subprocess.Popen(
        [sys.executable, str(CLIENT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=variables,
        text=True,
        errors="replace",
    ) as client:
        shown = sys.stderr.isatty() and not quiet
        readers = [
            threading.Thread(target=_collect, args=(client.stdout, lines), daemon=True),
            threading.Thread(target=_relay, args=(client.stderr, told, secret, shown), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            whole = request | {"operation": operation, "token": secret, "patience": patience}
            client.stdin.write(json.dumps(whole) + "\n")
            client.stdin.flush()
            answer = _answer(lines, patience)
        except BrokenPipeError:
            answer = None
        finally:
            client.kill()
        client.wait()
        for reader in readers:
            reader.join()
    if answer is None:
        raise HubError(f"the Hub client ended without an answer: {''.join(told)[-500:].strip()}", "crashed")
    if "failed" in answer:
        raise HubError(answer["failed"], answer["kind"])
    return answer["done"]


def check_token(token: str | bool | None, environment: dict[str, str] | None = None) -> str:
    """
    The token that a call would use.

    Raises:
        HubError: there is none.
    """
    secret = _token(token, environment)
    if not secret:
        raise HubError(
            "token: there is none. Run `hf auth login`, set HF_TOKEN, or give `token=`, with write permission.",
            "access",
        )
    return secret


def _token(token: str | bool | None, environment: dict[str, str] | None) -> str | None:
    if isinstance(token, str):
        return token.strip() or None
    if token is False:
        return None
    if environment is not None:
        return environment.get("HF_TOKEN")
    return get_token()


def _answer(lines: queue.Queue, patience: float) -> dict[str, Any] | None:
    """The last line of the client; None if it ended without one."""
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            message = f"the Hub gave no sign of life for {patience:g} seconds; the call was given up."
            return {"failed": message, "kind": "stalled"}
        if line is None:
            return None
        answer = json.loads(line)
        if "alive" not in answer:
            return answer


def _collect(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _relay(stream, told: list[str], secret: str | None, shown: bool) -> None:
    """Keep the last of what the client writes to its standard error, without the token, and show it on a terminal."""
    for line in stream:
        line = line.replace(secret, "***") if secret else line
        told.append(line)
        del told[:-20]
        if shown:
            sys.stderr.write(line)
