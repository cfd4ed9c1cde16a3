"""What the values of train.py's options may be."""

from __future__ import annotations

import argparse


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def workers(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return int(text)


def share(text: str) -> float:
    if not 0.0 <= float(text) <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} does not lie in [0, 1]")
    return float(text)


def not_negative(text: str) -> float:
    if not 0.0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of 0 or more")
    return float(text)


def seed_number(text: str) -> int:
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} does not lie in [0, 2**32)")
    return int(text)


def phase(text: str) -> tuple[float, float]:
    start, _, stop = text.partition(":")
    first, last = share(start or "0"), share(stop or "1")
    if ":" not in text or first >= last:
        raise argparse.ArgumentTypeError(f"{text} is not START:STOP with 0 <= START < STOP <= 1")
    return first, last
