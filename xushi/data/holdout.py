"""What is held out for evaluation: 5-8 % of the bytes, chosen by hash, before anything is trained.

Whole groups (a package, else a document) so that near neighbours do not stand on both sides. Where
the groups are too few and too large for that, as with a single book, the tail of every document
instead; which rule was used is recorded. Not here: the evaluation itself.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Literal

from xushi.base.errors import BadInput
from xushi.data.documents import Document, make_document

LEAST, MOST = 0.05, 0.08
SMALLEST_CORPUS = 1024
"""Bytes. Below this a border between two characters can miss the 5-8 %."""

Group = tuple[str, str]


@dataclass(frozen=True)
class Holdout:
    """Both sides in the order of the documents given. `groups` is empty under the rule "tails"."""

    train: list[Document]
    heldout: list[Document]
    rule: Literal["groups", "tails"]
    groups: list[Group]


def group_of(document: Document) -> Group:
    """(source, group): the distribution of a package's file, else the document's own place."""
    return document.source, str(
        document.meta["package"]
    ) if "package" in document.meta else place_of(document)


def place_of(document: Document) -> str:
    """The path inside the source, with `:number` for the line or row of a table."""
    return ":".join(
        str(document.meta[key]) for key in ("path", "line", "row") if key in document.meta
    )


def hold_out(documents: Sequence[Document], fraction: float, salt: str) -> Holdout:
    """Divide `documents`; the same for the same documents, whatever order the groups were found in.

    `fraction` (0.05-0.08) of the bytes is what is aimed at; between 5 % and 8 % is what is kept to.
    `XushiError` if there is too little text to hold anything out.
    """
    total = sum(len(document.text.encode()) for document in documents)
    if total < SMALLEST_CORPUS:
        raise BadInput(
            f"the sources hold {total} bytes of text, too little to hold any of it out for "
            "evaluation",
            f"give at least {SMALLEST_CORPUS} bytes; a useful model needs millions",
        )
    sizes: dict[Group, int] = {}
    for document in documents:
        group = group_of(document)
        sizes[group] = sizes.get(group, 0) + len(document.text.encode())
    taken = _choose(sizes, total, fraction, salt)
    if taken is None:
        return _tails(documents, total, fraction)
    held = set(taken)
    return Holdout(
        [d for d in documents if group_of(d) not in held],
        [d for d in documents if group_of(d) in held],
        "groups",
        sorted(held),
    )


def _choose(sizes: dict[Group, int], total: int, fraction: float, salt: str) -> list[Group] | None:
    """Walk the groups in hash order, taking what fits. None if no set of whole groups lies between
    5 % and 8 %.

    A walk that ends below 5 % has passed over nothing but groups above 3 %. A set that lies within
    the bounds has at most two of those, so walks that begin with each one, then with each two of
    them, leave no set unfound.
    """

    def position(group: Group) -> bytes:
        return hashlib.blake2b("\0".join((salt, *group)).encode(), digest_size=16).digest()

    order = sorted(sizes, key=position)
    large = [group for group in order if (MOST - LEAST) * total < sizes[group] <= MOST * total]
    for first in chain([()], combinations(large, 1), combinations(large, 2)):
        taken, held = list(first), sum(sizes[group] for group in first)
        if held > MOST * total:
            continue
        for group in order:
            if held >= fraction * total:
                break
            if group not in first and held + sizes[group] <= MOST * total:
                taken.append(group)
                held += sizes[group]
        if held >= LEAST * total:
            return taken
    return None


def _tails(documents: Sequence[Document], total: int, fraction: float) -> Holdout:
    """Cut every document in two. What one cut misses of its share, the next one makes up for."""
    # A little inside the bounds, so that a line's end may be found without leaving them.
    aim = min(max(fraction, LEAST + 0.005), MOST - 0.005)
    train: list[Document] = []
    heldout: list[Document] = []
    seen = held = 0
    for document in documents:
        data = document.text.encode()
        seen += len(data)
        cut = _cut(data, round(aim * seen) - held, len(data) // 250)
        held += len(data) - cut
        for side, start, end in ((train, 0, cut), (heldout, cut, len(data))):
            if start < end:
                side.append(
                    make_document(
                        document.source,
                        data[start:end].decode(),
                        {**document.meta, "bytes": [start, end]},
                    )
                )
    if not LEAST * total <= held <= MOST * total:
        raise BadInput(
            "the documents are too short to hold out a part of each",
            "give longer texts, or more of them",
        )
    return Holdout(train, heldout, "tails", [])


def _cut(data: bytes, wanted: int, slack: int) -> int:
    """Where the tail of about `wanted` bytes begins: at a line's start within `slack` bytes, else
    at a character's.
    """
    wanted = min(max(wanted, 0), len(data) // 2)
    cut = len(data) - wanted
    if wanted == 0:
        return cut
    after = data.find(b"\n", max(cut - 1, 0), min(cut + slack, len(data) - 1)) + 1
    before = data.rfind(b"\n", max(cut - slack, 0), cut) + 1
    lines = [place for place in (before, after) if place > 0]
    if lines:
        return min(lines, key=lambda place: abs(place - cut))
    while cut > 0 and data[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        cut -= 1
    return cut
