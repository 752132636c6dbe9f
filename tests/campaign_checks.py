"""What the campaigns of bad input share: how many inputs, how bytes are damaged, and what a refusal must look like."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, currently_in_test_context, event, settings
from hypothesis import strategies as st

from oml_ray.errors import OmlRayError

T = TypeVar("T")

SCALE = int(os.environ.get("OML_RAY_CAMPAIGN", "1"))
SECONDS = 120 * SCALE  # for a whole test: an input that hangs fails it
LONGEST_MESSAGE = 20_000
EXTREMES = [
    b"\x00" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x80",
    b"\x00\x00\x00\x80",
    b"\xff" * 8,
]


def campaign(num_examples: int) -> settings:
    """Settings of a test: the same inputs each time or, with OML_RAY_CAMPAIGN=N, N times as many that are new."""
    return settings(
        max_examples=num_examples * SCALE,
        derandomize=SCALE == 1,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def outcome(call: Callable[[], T], *named: str) -> T | OmlRayError:
    """What a call returns, or its refusal, which must name all of `named`; any other exception fails the test."""
    try:
        result = call()
    except OmlRayError as error:
        check_message(str(error), *named)
        _note(f"refused: {type(error).__name__}")
        return error
    _note("accepted")
    return result


def _note(what: str) -> None:
    """For --hypothesis-show-statistics."""
    if currently_in_test_context():
        event(what)


def check_message(text: str, *named: str) -> None:
    """One message for the user: its further lines are indented, and nothing of Python's insides is in it."""
    first, *more = re.split(r"[\r\n]", text)
    assert first.strip()
    assert all(line.startswith("  ") for line in more), text
    assert len(text) <= LONGEST_MESSAGE
    assert not re.search(r"<[^<>]+ at 0x[0-9a-f]{8,}>", text), "the address of an object tells nobody anything"
    for name in named:
        assert name in text


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes of a file with a few faults, most of them near its ends, where formats keep what they say of it."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        size = len(data)
        at = draw(st.one_of(*(st.integers(first, last) for first, last in _regions(size))))
        kind = draw(st.sampled_from(["flip", "set", "extreme", "cut", "keep", "insert", "repeat"]))
        length = draw(st.integers(1, 16))
        if kind == "flip" and at < size:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[at : at + length] = draw(st.binary(min_size=1, max_size=length))
        elif kind == "extreme":
            value = draw(st.sampled_from(EXTREMES))
            data[at : at + len(value)] = value
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "keep":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=length))
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * draw(st.sampled_from([1, 7, 300]))
    return bytes(data)


def _regions(size: int) -> list[tuple[int, int]]:
    return [(0, size), (0, min(64, size)), (max(0, size - 64), size)]
