"""The files that a corpus was made from, so that it can be told later whether they changed.

Size, times and SHA-256 of each are kept. A file whose size and times are as they were is not read
again; any other is known by its bytes. Not here: what is in the files (`sources`).
"""

import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from xushi.base.config import StrictConfig, parse
from xushi.base.files import read_json, sha256_file, sha256_json, write_json
from xushi.data.config import DataConfig
from xushi.data.documents import MAKE_AGAIN
from xushi.data.files import SourceFile, find_files, unreadable
from xushi.data.left_out import LeftOut

# A file that was written so shortly before it was read may be written again without another time.
_CLOCK_NS = 2_000_000_000


class ReadFile(StrictConfig):
    """A file as it was when it was read: `meta` as in a document, size in bytes, times in ns."""

    meta: dict[str, str]
    size: int
    modified: int
    changed: int
    sha256: str

    @property
    def name(self) -> str:
        """The path inside the source."""
        return self.meta["path"]


class ReadSource(StrictConfig):
    """The files of a source in path order, what is left out by their names and beginnings, and the
    patterns of `exclude` that match nothing.
    """

    name: str
    files: list[ReadFile]
    left_out: list[LeftOut]
    unmatched: list[str] = Field(default=[])


class ReadFiles(StrictConfig):
    """All files of a corpus. `read_at`: when they were looked at, in ns since 1970."""

    read_at: int
    sources: list[ReadSource]

    @property
    def hash(self) -> str:
        """SHA-256 of names and bytes; where the files lie and their times have no part in it."""
        return sha256_json(
            [[each.name, [[f.meta, f.sha256] for f in each.files]] for each in self.sources]
        )

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, self.model_dump())

    @classmethod
    def read(cls, path: Path) -> "ReadFiles":
        """Read what `write` wrote."""
        return parse(cls, read_json(path, MAKE_AGAIN), str(path), MAKE_AGAIN)


def look_at(config: DataConfig, before: ReadFiles | None = None) -> ReadFiles:
    """The sources' files as they are now. Those that are as in `before` are not read again."""
    now = time.time_ns()
    known = {} if before is None else dict(_known(before))
    sources = []
    for source in config.sources:
        found = find_files(source)
        files = [_look(file, known.get((source.name, file.meta["path"]))) for file in found.files]
        left_out, unmatched = found.left_out.listed(), found.unmatched
        sources.append(
            ReadSource(name=source.name, files=files, left_out=left_out, unmatched=unmatched)
        )
    return ReadFiles(read_at=now, sources=sources)


def _known(before: ReadFiles) -> Iterator[tuple[tuple[str, str], ReadFile]]:
    """The files whose times tell whether they were written since."""
    for source in before.sources:
        for file in source.files:
            if max(file.modified, file.changed) < before.read_at - _CLOCK_NS:
                yield (source.name, file.name), file


def _look(file: SourceFile, known: ReadFile | None) -> ReadFile:
    try:
        status = file.path.stat()
        size, modified, changed = status.st_size, status.st_mtime_ns, status.st_ctime_ns
        if known is not None and (known.size, known.modified, known.changed) == (
            size,
            modified,
            changed,
        ):
            sha256 = known.sha256
        else:
            sha256 = sha256_file(file.path)
    except OSError as error:
        raise unreadable(file.path, error) from None
    return ReadFile(
        meta=dict(file.meta), size=size, modified=modified, changed=changed, sha256=sha256
    )


def difference(before: ReadFiles, now: ReadFiles) -> str:
    """What changed, in a phrase; empty if names and bytes are the same."""
    if before.hash == now.hash:
        return ""
    old, new = _by_name(before), _by_name(now)
    changed = [name for name in old if name in new and old[name] != new[name]]
    parts = (
        (changed, "changed"),
        ([name for name in new if name not in old], "new"),
        ([name for name in old if name not in new], "gone"),
    )
    return ", ".join(
        f"{len(names):,} {what} ({names[0]}{', …' if len(names) > 1 else ''})"
        for names, what in parts
        if names
    )


def _by_name(files: ReadFiles) -> dict[str, str]:
    several = len(files.sources) > 1
    return {
        f"{source.name}/{file.name}" if several else file.name: file.sha256
        for source in files.sources
        for file in source.files
    }
