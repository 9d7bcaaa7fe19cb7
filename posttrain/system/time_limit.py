"""Time limits of a run: how long the program runs already, and times such as ``3h30m``."""

from __future__ import annotations

import re
import time

import psutil

_UNITS = {"h": 3600, "m": 60, "s": 1}


def seconds_of(text: str) -> int:
    """Returns the seconds of a time such as ``3h30m``."""
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([hms])", text))


def seconds_since_start() -> float:
    """Returns the seconds since this process was started."""
    return time.time() - psutil.Process().create_time()
