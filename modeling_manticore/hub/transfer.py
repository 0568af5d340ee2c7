"""Calls to the Hub that end: each runs `hub_client.py` in a process of its own, which is killed when it stalls."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token

from ..progress import progress_bar


PATIENCE = 60.0  # seconds without any sign of progress
QUIET_SECONDS = 2.0  # nothing is said of what takes less
TOLD = {"push": "pushing", "fetch": "fetching", "create": "creating"}
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
    address = variables.get("HF_ENDPOINT") or constants.ENDPOINT
    told_as = f"{TOLD.get(operation, operation)} {request.get('repo_id')} {'to' if needs_token else 'from'} {address}"
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
        readers = [
            threading.Thread(target=_collect, args=(client.stdout, lines), daemon=True),
            threading.Thread(target=_relay, args=(client.stderr, told, secret), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            whole = request | {"operation": operation, "token": secret, "patience": patience}
            client.stdin.write(json.dumps(whole) + "\n")
            client.stdin.flush()
            answer = _answer(lines, patience, told_as, address, quiet)
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


def _answer(lines: queue.Queue, patience: float, told_as: str, address: str, quiet: bool) -> dict[str, Any] | None:
    """
    The last line of the client; None if it ended without one. What takes longer than two seconds is told: which
    repository at which address, and then bytes, rate and remaining time.
    """
    shown, bar, last, started = not quiet, None, time.monotonic(), time.monotonic()
    try:
        while True:
            try:
                line = lines.get(timeout=min(patience, 1.0))
            except queue.Empty:
                if time.monotonic() - last > patience:
                    message = f"the Hub at {address} gave no sign of life for {patience:g} seconds; "
                    return {"failed": f"{message}the call was given up.", "kind": "stalled"}
                line = ""
            if line is None:
                return None
            answer = json.loads(line) if line else {"alive": 0}
            if "alive" not in answer:
                return answer
            last = time.monotonic() if line else last
            if shown and bar is None and time.monotonic() - started > QUIET_SECONDS:
                print(told_as, file=sys.stderr, flush=True)
                bar = progress_bar(total=None, desc="  so far", unit="B", unit_scale=True, leave=False)
            if bar is not None and line:
                bar.total = answer["total"] or None
                bar.set_postfix_str(answer["file"] or "", refresh=False)
                bar.update(max(0, answer["bytes"] - bar.n))
    finally:
        if bar is not None:
            bar.close()


def _collect(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _relay(stream, told: list[str], secret: str | None) -> None:
    """Keep the last of what the client writes to its standard error, without the token."""
    for line in stream:
        line = line.replace(secret, "***") if secret else line
        told.append(line)
        del told[:-20]
