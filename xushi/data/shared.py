"""The corpus, tokenizer and tokens of a run, from the cache if another run has made the same.

A key is the hash of everything that the files depend on: the bytes that are read (not where they
are stored), the settings, and the code that reads them. Not here: the cache itself
(base.artifacts).
"""

import functools
import importlib.metadata
import importlib.resources
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from xushi import __version__
from xushi.base.artifacts import Artifacts
from xushi.base.errors import BadInput, Failed
from xushi.base.files import sha256_file, sha256_json
from xushi.data.config import DataConfig
from xushi.data.corpus import ExtraSource, build_corpus, training_texts
from xushi.data.documents import MAKE_AGAIN
from xushi.data.read_files import ReadFiles, difference, look_at
from xushi.data.tokens import tokenize_corpus

if TYPE_CHECKING:
    from xushi.tokenizer import Tokenizer


def obtain_corpus(
    config: DataConfig,
    extra: Mapping[str, ExtraSource],
    directory: Path,
    files: ReadFiles | None = None,
) -> bool:
    """Put the corpus that `build_corpus` writes at `directory`.

    `files`: the sources' files as `look_at` has just found them. Returns whether it was built now.
    """
    key, build = _corpus(config, extra, files)
    return Artifacts().obtain(key, build, directory)


def reading_corpus(
    config: DataConfig, extra: Mapping[str, ExtraSource], files: ReadFiles | None = None
) -> AbstractContextManager[Path]:
    """The directory of that corpus in the cache, to be read while the context lasts."""
    return Artifacts().reading(*_corpus(config, extra, files))


def _corpus(
    config: DataConfig, extra: Mapping[str, ExtraSource], files: ReadFiles | None
) -> tuple[str, Callable[[Path], None]]:
    """The key of a corpus, and what builds it."""
    read = files or look_at(config)

    def build(aside: Path) -> None:
        build_corpus(config, extra, aside)
        if changed := difference(read, look_at(config, read)):
            raise Failed(
                f"the text changed while it was read: {changed}",
                "run the same command again, or exclude what other programs write to",
            )

    return corpus_key(config, extra, read), build


def obtain_tokenizer(corpus: Path, vocab_size: int, directory: Path, tools: bool = False) -> bool:
    """Put a tokenizer trained on the training text of `corpus` at `directory`.

    Returns whether it was trained now.
    """

    def train(aside: Path) -> None:
        from xushi.tokenizer import Tokenizer

        Tokenizer.train(training_texts(corpus), vocab_size, tools).save(aside)

    return Artifacts().obtain(tokenizer_key(corpus, vocab_size, tools), train, directory)


def obtain_tokens(
    corpus: Path, tokenizer: "Tokenizer", sequence_length: int, directory: Path
) -> bool:
    """Put the tokens that `tokenize_corpus` writes at `directory`.

    Returns whether they were encoded now.
    """

    def encode(aside: Path) -> None:
        tokenize_corpus(corpus, tokenizer, aside, sequence_length)

    key = tokens_key(corpus, tokenizer, sequence_length)
    return Artifacts().obtain(key, encode, directory)


def corpus_key(
    config: DataConfig, extra: Mapping[str, ExtraSource], files: ReadFiles | None = None
) -> str:
    """The key of a corpus.

    It depends on the sources' files with their paths inside the source, on what is left out of
    them (run directories apart, as in the summary), on the config without the location of the
    files, and on the extra documents.
    """
    read = files or look_at(config)
    return "corpus-" + sha256_json(
        {
            "code": _code("data"),
            "config": config.model_dump(exclude={"sources", "sequence_length"}),
            "sources": [source.model_dump(exclude={"glob"}) for source in config.sources],
            "files": read.hash,
            "left_out": [
                [each.model_dump() for each in one.left_out if each.reason != "runs"]
                for one in read.sources
            ],
            "extra": {
                name: {
                    "weight": source.weight,
                    "documents": [document.uid.hex() for document in source.documents],
                }
                for name, source in extra.items()
            },
        }
    )


def tokenizer_key(corpus: Path, vocab_size: int, tools: bool = False) -> str:
    """The key of a tokenizer: of the training documents, its size and its special tokens."""
    return "tokenizer-" + sha256_json(
        {
            "code": _code("data", "tokenizer"),
            "library": importlib.metadata.version("tokenizers"),
            "texts": _hashes(corpus, "train-*.parquet"),
            "vocab_size": vocab_size,
            "tools": tools,
        }
    )


def tokens_key(corpus: Path, tokenizer: "Tokenizer", sequence_length: int) -> str:
    """The key of tokens: of the corpus, the tokenizer and the manifest's sequence length."""
    return "tokens-" + sha256_json(
        {
            "code": _code("data", "tokenizer"),
            "library": importlib.metadata.version("tokenizers"),
            "corpus": _hashes(corpus, "*.parquet") | _hashes(corpus, "summary.json"),
            "tokenizer": tokenizer.hash,
            "sequence_length": sequence_length,
        }
    )


def _hashes(directory: Path, pattern: str) -> dict[str, str]:
    found = {path.name: sha256_file(path) for path in sorted(directory.glob(pattern))}
    if not found:
        raise BadInput(f"{directory} has no {pattern}", MAKE_AGAIN)
    return found


@functools.cache
def _code(*packages: str) -> dict[str, str]:
    """The version of xushi and the hash of every module in these packages.

    Other code may make another corpus of the same text.
    """
    return {"xushi": __version__} | {
        f"{package}/{module.name}": sha256_json(module.read_text(encoding="utf-8"))
        for package in packages
        for module in importlib.resources.files(f"xushi.{package}").iterdir()
        if module.name.endswith(".py")
    }
