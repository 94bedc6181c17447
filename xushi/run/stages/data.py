"""The data stage: sources are read, cleaned, held out and written down as a corpus."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xushi.base.files import sha256_json
from xushi.base.progress import say
from xushi.data import (
    NOTABLE,
    CorpusSummary,
    ExtraSource,
    heldout_overlap,
    load_summary,
    make_document,
    obtain_corpus,
    reading_corpus,
)
from xushi.data.left_out import LeftOut, counts, sentence
from xushi.data.read_files import ReadFiles, difference, look_at
from xushi.run.place import RunPlace
from xushi.run.stages.base import Costs, Fact, Results, Stage

if TYPE_CHECKING:
    from xushi.run.recipe import Recipe

TRANSCRIPTS = "transcripts"  # the name of the environment's source
GROUPS_NAMED = 12


class LeftOutFigures(Results):
    """What is left out, by reason (see `xushi.data.left_out.REASONS`)."""

    counts: dict[str, int]

    def flat(self) -> dict[str, Any]:
        """One key for each reason."""
        return dict(self.counts)


class CorpusFigures(Results):
    """Totals of the text, without the environment's transcripts."""

    bytes: int
    documents: int
    files: int
    sha256: str
    heldout_bytes: int
    heldout_fraction: float
    heldout_rule: str
    heldout_overlap: float  # the share of the held-out text that training has too
    heldout_groups: int
    heldout_groups_named: str  # the first of their names, separated by commas
    heldout_groups_sha256: str  # of the JSON list of their names, which corpus/summary.json has
    left_out: LeftOutFigures


class DataResults(Results):
    """What the data stage returns."""

    data: CorpusFigures


class Data(Stage):
    """Reads the sources; writes data/corpus."""

    name = "data"
    title = "Data"
    section = "data"
    required = True
    version = 2
    facts = (
        Fact("data.bytes", "{} of text", "size"),
        Fact("data.documents", "{} documents"),
        Fact("data.heldout_fraction", "{} held out", "percent"),
    )

    def __init__(self, recipe: "Recipe") -> None:
        environment = recipe.environment
        self.config = recipe.data
        self.environment = environment if environment and environment.transcripts else None

    @classmethod
    def wanted(cls, recipe: "Recipe") -> bool:
        """Always: left out as a control, the text is made all the same and only evaluated on."""
        return True

    @classmethod
    def check(cls, recipe: "Recipe") -> None:
        """Without the text there must be transcripts to pretrain on."""
        transcripts = recipe.environment.transcripts if recipe.environment else 0
        if recipe.without == cls.name and not transcripts:
            raise ValueError(
                "without = 'data' pretrains on the environment's transcripts alone, and "
                "environment.transcripts is 0"
            )

    def run(self, place: RunPlace) -> DataResults:
        """Read, divide and write the corpus, or link the one that another run made of the same."""
        files = look_at(self.config)
        obtain_corpus(self.config, self._transcripts(), place.corpus, files)
        summary = load_summary(place.corpus)
        files.write(place.read_files)
        left_out = left_out_of(summary, files)
        tell_left_out(left_out)
        for source in files.sources:
            for pattern in source.unmatched:
                say(f"exclude = {pattern!r} matches nothing in source {source.name}")
        overlap = heldout_overlap(place.corpus)
        if overlap >= NOTABLE:
            say(f"data: {overlap:.1%} of the held-out text stands in the training text too")
        return DataResults(
            data=CorpusFigures(
                bytes=summary.bytes,
                documents=summary.documents,
                files=summary.files,
                sha256=summary.sha256,
                heldout_bytes=summary.heldout_bytes,
                heldout_fraction=summary.heldout_bytes / summary.bytes,
                heldout_rule=summary.rule,
                heldout_overlap=overlap,
                heldout_groups=len(summary.heldout_groups),
                heldout_groups_named=", ".join(summary.heldout_groups[:GROUPS_NAMED]),
                heldout_groups_sha256=sha256_json(summary.heldout_groups),
                left_out=LeftOutFigures(counts=counts(left_out.values())),
            )
        )

    def reading(self, files: ReadFiles) -> AbstractContextManager[Path]:
        """The corpus in the cache, of the files that `look_at` has just found, while the context
        lasts; it is made if it is not there.
        """
        return reading_corpus(self.config, self._transcripts(), files)

    def prepare_again(self, place: RunPlace) -> None:
        """Make the corpus, which `run` then finds in the cache."""
        with self.reading(look_at(self.config)):
            pass

    def seconds(self, costs: Costs) -> float:
        """As measured: where the corpus was in the cache, without the time of making it."""
        return costs.data

    def reads(self) -> dict[str, Any]:
        """Where the files lie is no part of it: what they hold is told by `files_read`."""
        kept = super().reads()
        for source in kept["config"]["sources"]:
            del source["glob"]
        return kept

    def files_read(self, place: RunPlace) -> str:
        """The hash of the text files."""
        return ReadFiles.read(place.read_files).hash

    def files_changed(self, place: RunPlace) -> str:
        """Which of the text files are not as they were."""
        before = ReadFiles.read(place.read_files)
        return difference(before, look_at(self.config, before))

    def _transcripts(self) -> dict[str, ExtraSource]:
        """Worked episodes as plain text, each a document of its own.

        In documents of many lines the working is learnt far later.
        """
        if self.environment is None:
            return {}
        environment = self.environment.make()
        documents = [
            make_document(
                TRANSCRIPTS,
                environment.text(environment.demonstration("train", index, 1.0)),
                {"path": f"{environment.name}/{index}"},
            )
            for index in range(self.environment.transcripts)
        ]
        return {TRANSCRIPTS: ExtraSource(documents, self.environment.transcript_weight)}


def left_out_of(summary: CorpusSummary, files: ReadFiles) -> dict[str, list[LeftOut]]:
    """What each source leaves out: run directories, which are no part of the summary, and the
    rest.
    """
    runs = {
        source.name: [each for each in source.left_out if each.reason == "runs"]
        for source in files.sources
    }
    return {each.name: [*runs.get(each.name, []), *each.left_out] for each in summary.sources}


def tell_left_out(sources: Mapping[str, Iterable[LeftOut]]) -> None:
    """Say what the sources leave out: a line for each reason, with the source if there are
    several.
    """
    for name, left_out in sources.items():
        for each in left_out:
            say(f"{name}: {sentence(each)}" if len(sources) > 1 else sentence(each))
