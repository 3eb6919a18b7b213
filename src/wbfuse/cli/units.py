"""Sizes, rates and durations as people write them: 1GiB, 20MB/s, 5s, 20ms. Pure, and as click types."""

from __future__ import annotations

import re
from typing import Any

import click

from wbfuse.store.shaped import Shape

_SIZES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _SIZES |= {_letter: 1024**_power, _letter + "ib": 1024**_power, _letter + "b": 1000**_power}
_TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def _parse(text: str, units: dict[str, Any], example: str) -> float:
    match = _NUMBER.fullmatch(text)
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!r} is not understood; write it like {example}")
    return float(match[1]) * float(units[match[2].lower()])


def parse_size(text: str) -> int:
    """'1GiB' -> 1073741824, '20MB' -> 20000000; a bare letter is binary. Raises ValueError."""
    return int(_parse(text, _SIZES, "1GiB or 64MiB"))


def parse_rate(text: str) -> float:
    """'20MB/s' -> 2e7 bytes a second; '/s' may be left out, the unit may not. Raises ValueError."""
    if text.strip().replace(".", "", 1).isdigit():
        raise ValueError(f"{text!r}: of what, a second? write it like {text.strip()}MB/s")
    rate = _parse(text.strip().removesuffix("/s"), _SIZES, "20MB/s")
    if rate <= 0:
        raise ValueError(f"{text!r}: a rate must be above zero")
    return rate


def parse_time(text: str) -> float:
    """'5s' -> 5.0, '20ms' -> 0.02. Raises ValueError."""
    return _parse(text, _TIMES, "5s or 20ms")


def parse_slow(text: str) -> Shape:
    """'50MB/s,20ms' -> Shape: bandwidth and delay of each call, either may be left out. Raises ValueError."""
    rate, delay = None, 0.0
    try:
        for part in text.split(","):
            if "/s" in part:
                rate = parse_rate(part)
            else:
                delay = parse_time(part)
    except ValueError as e:
        raise ValueError(f"{text!r} is not understood; write it like 50MB/s,20ms") from e
    return Shape(rate=rate, delay=delay)


class Parsed(click.ParamType[Any]):
    """A click type from a function that raises ValueError."""

    def __init__(self, name: str, parse: Any) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as e:
            self.fail(str(e), param, ctx)


SIZE, RATE, TIME, SLOW = (
    Parsed("size", parse_size), Parsed("rate", parse_rate), Parsed("time", parse_time), Parsed("rate,delay", parse_slow)
)  # fmt: skip


def show_size(size: float) -> str:
    """1073741824 -> '1.0 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
