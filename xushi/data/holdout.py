"""Hold out 5-8 % of the bytes for evaluation, chosen by hash before anything is trained.

Whole groups are held out (a package, or a document that belongs to none), so that similar documents
of one group are not on both sides. If no selection of groups has 5-8 % of the bytes, as with a
single book, the tail of every document is held out instead. The rule used is recorded. Not here:
the evaluation itself.
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
"""In bytes. In a smaller text there may be no character boundary that holds out 5-8 %."""

Group = tuple[str, str]


@dataclass(frozen=True)
class Holdout:
    """Training and held-out documents in the order given. `groups`: those held out, sorted.

    Under the rule "tails" `groups` is empty.
    """

    train: list[Document]
    heldout: list[Document]
    rule: Literal["groups", "tails"]
    groups: list[Group]


def group_of(document: Document) -> Group:
    """(source, group): the package that the document belongs to, or else its own place."""
    package = document.meta.get("package")
    return document.source, place_of(document) if package is None else str(package)


def place_of(document: Document) -> str:
    """The path inside the source, followed by `:number` for a line (jsonl) or row (parquet)."""
    return ":".join(
        str(document.meta[key]) for key in ("path", "line", "row") if key in document.meta
    )


def hold_out(documents: Sequence[Document], fraction: float, salt: str) -> Holdout:
    """Divide `documents` into training and held-out ones. The order of the groups has no effect.

    The held-out share comes close to `fraction` (0.05-0.08) of the bytes and always lies between
    5 % and 8 %. Too little text for that is a `XushiError`.
    """
    total = sum(len(document.text.encode()) for document in documents)
    if total < SMALLEST_CORPUS:
        raise BadInput(
            f"the sources have {total} bytes of text, which is too little to hold any of it out "
            "for evaluation",
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
    """Select groups greedily in hash order. None if no selection has 5-8 % of the bytes.

    If the greedy pass ends below 5 %, it skipped only groups larger than 3 %. A valid selection
    holds at most two such groups. Trying every one and every pair of them first therefore finds a
    valid selection if one exists.
    """

    def position(group: Group) -> bytes:
        return hashlib.blake2b("\0".join((salt, *group)).encode(), digest_size=16).digest()

    order = sorted(sizes, key=position)
    large = [group for group in order if (MOST - LEAST) * total < sizes[group] <= MOST * total]
    for first in chain([()], combinations(large, 1), combinations(large, 2)):
        taken = list(first)
        held = sum(sizes[group] for group in first)
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
    """Hold out the tail of every document. If a tail is too short, the next one is longer."""
    # Half a percent inside the bounds, so that a cut may move to the end of a line.
    aim = min(max(fraction, LEAST + 0.005), MOST - 0.005)
    train: list[Document] = []
    heldout: list[Document] = []
    seen = 0
    held = 0
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
    """Where a tail of about `wanted` bytes begins: at the start of a line within `slack` bytes of
    that place, or else at the start of a character.
    """
    wanted = min(max(wanted, 0), len(data) // 2)
    cut = len(data) - wanted
    if wanted == 0:
        return cut
    after = data.find(b"\n", max(cut - 1, 0), min(cut + slack, len(data) - 1)) + 1
    before = data.rfind(b"\n", max(cut - slack, 0), cut) + 1
    starts = [start for start in (before, after) if start > 0]
    if starts:
        return min(starts, key=lambda start: abs(start - cut))
    while cut > 0 and data[cut] & 0xC0 == 0x80:  # a UTF-8 continuation byte
        cut -= 1
    return cut
