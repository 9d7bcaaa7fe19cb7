"""The Hugging Face hub: tried once before the first download, so that nobody waits for retries without a connection."""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

PATIENCE = 3.0
"""Seconds that the hub's address, or that of a proxy, has to answer."""


def use_hub() -> None:
    """Tries the hub's address before the first download, and works offline if nothing answers.

    The hub's own client tries five times at each file, for 50 seconds in all. Offline, what was downloaded before is
    found, and for anything else there is an error at once, to which :func:`offline_note` adds the reason.
    """
    problem = connection_problem()
    if not problem:
        return
    import huggingface_hub.constants
    from datasets import config

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        print(f"{problem}: using only what was downloaded before", file=sys.stderr)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    config.HF_HUB_OFFLINE = True


def offline_note() -> str:
    """The reason why nothing can be downloaded, to add to an error; empty if the hub can be reached."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    problem = connection_problem()
    if not problem and HF_HUB_OFFLINE:
        problem = "HF_HUB_OFFLINE is set"
    return f" ({problem}, so nothing can be downloaded)" if problem else ""


@functools.cache
def connection_problem() -> str:
    """Says why the hub cannot be reached; empty if it can, or if the environment forbids to try."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return ""
    address = urlsplit(ENDPOINT)
    proxy = getproxies().get(address.scheme)
    if proxy and not proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    host, port = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
    reason = connect(host, port)
    return f"{host} cannot be reached ({reason})" if reason else ""


def connect(host: str, port: int) -> str:
    """Tries to open a connection; returns the reason why there is none, or an empty text."""
    reasons = [f"no answer within {PATIENCE:g} s"]

    def attempt() -> None:
        try:
            with socket.create_connection((host, port), timeout=PATIENCE):
                pass
            reasons.append("")
        except OSError as error:
            reasons.append(error.strerror or str(error))

    # A thread, because looking a name up knows no time limit.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return reasons[-1]
