"""How long a server wants to be left alone, by the headers of an answer that it could not give."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC
from email.message import Message
from email.utils import parsedate_to_datetime

LONGEST = 60.0
"""Seconds that are waited for a server; one that asks for more is asked again by another run."""


def asked_pause(headers: Message | Mapping[str, str]) -> float | None:
    """Seconds until it may be asked again; ``None`` where that is not said, or cannot be understood.

    ``Retry-After`` (RFC 9110, section 10.2.3) is a number of seconds or a date. ``RateLimit`` has the seconds until the
    next window as ``t`` of what is used up (``r=0``), in the words of draft-ietf-httpapi-ratelimit-headers.
    """
    told = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", told):
        return float(told)
    if told:
        return _until(told)
    windows = headers.get("RateLimit", "").split(",")
    ends = [re.search(r";\s*t=([0-9]{1,9})\b", window) for window in windows if re.search(r";\s*r=0\b", window)]
    return max((float(end[1]) for end in ends if end), default=None)


def _until(date: str) -> float | None:
    try:
        found = parsedate_to_datetime(date)
        return max((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def words(seconds: float) -> str:
    """So long, in words, in a unit of which there are not too many."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
