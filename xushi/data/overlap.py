"""How much of the held-out text stands in the training text too.

Whole groups are held out, but two groups may hold the same text: a copy with another line end, a
licence, a quotation. Compared is text without byte order marks, each run of white space as one
space and none at the ends; case counts. A byte of held-out text is shared if one of the windows of
`WINDOW` characters that contain it stands anywhere in a training document; a document shorter than
a window is shared if it equals a training document.

Windows are compared by 64-bit hashes: among n training windows and m held-out ones, about
n * m / 2**64 are expected to agree by chance. Time grows in proportion to the text. Memory is
bounded: of a larger held-out text about `MOST_CHARACTERS` are measured, whole documents in the
order of their uids, which are hashes. Not here: removing what is shared.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xushi.data.documents import read_documents

WINDOW = 50
MOST_CHARACTERS = 1 << 22
NOTABLE = 0.01
"""From this share on, text is not called unseen, and the share is told."""

_BLOCK = 1 << 20  # characters of training text that are hashed at once
_FILTER_BITS = 24
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
# Normalised text has neither, so a window across two documents is never found.
_HELDOUT_SEPARATOR, _TRAINING_SEPARATOR = "\r", "\n"

Hashes = npt.NDArray[np.uint64]


def heldout_overlap(corpus: Path) -> float:
    """The share of the held-out bytes of a corpus directory that is shared with training; 0 to 1.

    Bytes are those of the compared form as UTF-8.
    """
    lengths = {document.uid: len(document.text) for document in read_documents(corpus, "heldout")}
    kept = _sample(lengths)
    heldout = (
        document.text[: kept[document.uid]]
        for document in read_documents(corpus, "heldout")
        if document.uid in kept
    )
    training = (document.text for document in read_documents(corpus, "train"))
    return shared_fraction(heldout, training)


def shared_fraction(heldout: Iterable[str], training: Iterable[str]) -> float:
    """The share of the bytes of `heldout`, as this file's head defines it; 0 without text."""
    texts = [normalised(text) for text in heldout]
    short = {text: False for text in texts if len(text) < WINDOW}
    held = _HELDOUT_SEPARATOR.join(text for text in texts if len(text) >= WINDOW)
    codes = _code_points(held)
    hashes = _window_hashes(codes)
    keys = np.unique(hashes)
    found = np.zeros(len(keys), dtype=np.bool_)
    is_key = np.zeros(1 << _FILTER_BITS, dtype=np.bool_)  # of the first bits of a hash
    is_key[_first_bits(keys)] = True
    for block in _blocks(_noting(short, map(normalised, training))):
        others = _window_hashes(_code_points(block))
        others = others[is_key[_first_bits(others)]]
        places = np.searchsorted(keys, others)
        places = places[keys[np.minimum(places, len(keys) - 1)] == others] if len(keys) else places
        found[places] = True
    bytes_each = _utf8_lengths(codes)
    shared = int(bytes_each[_covered(codes, found[np.searchsorted(keys, hashes)])].sum())
    shared += sum(len(text.encode()) for text in texts if short.get(text))
    total = sum(len(text.encode()) for text in texts)
    return shared / total if total else 0.0


def normalised(text: str) -> str:
    """The form in which texts are compared."""
    return " ".join(text.replace("\ufeff", "").split())


def _sample(lengths: Mapping[bytes, int]) -> dict[bytes, int]:
    """How many characters to take of which documents: by uid, `MOST_CHARACTERS` or all in all."""
    kept: dict[bytes, int] = {}
    left = MOST_CHARACTERS
    for uid in sorted(lengths):
        if left == 0:
            break
        kept[uid] = min(left, lengths[uid])
        left -= kept[uid]
    return kept


def _noting(short: dict[str, bool], texts: Iterable[str]) -> Iterator[str]:
    """Pass `texts` on, and set those of `short` that are among them to True."""
    for text in texts:
        if text in short:
            short[text] = True
        yield text


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """The texts with a separator between them, in blocks that share what a window can span."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        for start in range(0, max(1, len(text) - WINDOW + 1), _BLOCK):
            waiting.append(text[start : start + _BLOCK + WINDOW - 1])
            size += len(waiting[-1])
            if size >= _BLOCK:
                yield _TRAINING_SEPARATOR.join(waiting)
                waiting, size = [], 0
    yield _TRAINING_SEPARATOR.join(waiting)


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def _window_hashes(codes: npt.NDArray[np.uint32]) -> Hashes:
    """A hash of each window: sum of mixed code points times powers of `_BASE`, modulo 2**64.

    It is the difference of two running sums, divided by the power at the window's start.
    """
    if len(codes) < WINDOW:
        return np.zeros(0, dtype=np.uint64)
    powers = _powers(_BASE, len(codes))
    inverses = _powers(pow(_BASE, -1, 1 << 64), len(codes) - WINDOW + 1)
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(_mixed(codes.astype(np.uint64)) * powers, out=sums[1:])
    return _mixed((sums[WINDOW:] - sums[:-WINDOW]) * inverses)


def _powers(base: int, count: int) -> Hashes:
    """base**0, base**1, ... modulo 2**64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _mixed(values: Hashes) -> Hashes:
    """Spread values over all 64 bits, one to one (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _first_bits(hashes: Hashes) -> npt.NDArray[np.int64]:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)


def _covered(codes: npt.NDArray[np.uint32], found: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which characters lie in a window that was found."""
    changes = np.zeros(len(codes) + 1, dtype=np.int64)
    changes[: len(found)] += found
    changes[WINDOW : WINDOW + len(found)] -= found
    return np.cumsum(changes[:-1]) > 0


def _utf8_lengths(codes: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    return 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
