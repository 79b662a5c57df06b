"""Where tokens fall between the boundaries of chunks."""

from __future__ import annotations


def segments(tokens: int, position: int, chunk: int) -> list[int]:
    """Lengths into which `tokens` new tokens fall between multiples of `chunk`.

    The first of them comes `position` tokens after such a multiple.
    """
    lengths: list[int] = []
    done = 0
    while done < tokens:
        lengths.append(min(chunk - (position + done) % chunk, tokens - done))
        done += lengths[-1]
    return lengths
