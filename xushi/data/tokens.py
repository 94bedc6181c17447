"""The corpus as token ids on disk.

    train/SOURCE.bin, heldout/heldout.bin    [bos] + tokens + [eos] of each document, concatenated;
                                             little-endian uint16, or uint32 for a vocabulary of
                                             more than 65,536
    train/SOURCE.parquet, heldout/heldout.parquet    uid, start, end of each document; offsets
                                             count tokens
    byte_lengths.npy                         int64 [V]: bytes of text of each token
    manifest.json                            `TokenManifest`; written last

Not here: the tokenizer, and packing into sequences (`packing`).
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from xushi.base.config import StrictConfig, parse
from xushi.base.errors import BadInput
from xushi.base.files import directory_in_place, read_json, write_json
from xushi.data.corpus import load_summary
from xushi.data.documents import Document, read_documents
from xushi.data.packing import Ints, PackedSource

if TYPE_CHECKING:
    from xushi.tokenizer import Tokenizer

_CHUNK_CHARACTERS = 2 << 20
MAKE_AGAIN = (
    "remove stages/tokenizer.json of the run and run its recipe again: the tokens are made again"
)


class TokenSource(StrictConfig):
    """One flat file of tokens. `tokens` counts bos and eos too."""

    name: str
    weight: float
    documents: int
    tokens: int


class TokenManifest(StrictConfig):
    """What a token directory holds and how to read it.

    `tokenizer` and `corpus` are the hashes of what it was made from.
    """

    sequence_length: int
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    pad_id: int
    tokenizer: str
    corpus: str
    train: list[TokenSource]
    heldout: TokenSource


def tokenize_corpus(
    corpus: Path, tokenizer: "Tokenizer", directory: Path, sequence_length: int
) -> TokenManifest:
    """Tokenise the corpus in the directory `corpus` and write the tokens to `directory`.

    `directory` is replaced by one rename: after a failure the old one is still there.
    """
    summary = load_summary(corpus)
    weights = {source.name: source.weight for source in summary.sources}
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with directory_in_place(directory) as aside:
        (aside / "train").mkdir()
        (aside / "heldout").mkdir()
        train = [
            _write(aside / "train", name, weights[name], documents, tokenizer, dtype)
            for name, documents in groupby(read_documents(corpus, "train"), key=lambda d: d.source)
        ]
        heldout = _write(
            aside / "heldout", "heldout", 1.0, read_documents(corpus, "heldout"), tokenizer, dtype
        )
        np.save(aside / "byte_lengths.npy", tokenizer.byte_lengths, allow_pickle=False)
        manifest = TokenManifest(
            sequence_length=sequence_length,
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            tokenizer=tokenizer.hash,
            corpus=summary.sha256,
            train=train,
            heldout=heldout,
        )
        write_json(aside / "manifest.json", manifest.model_dump())
    return manifest


def _write(
    directory: Path,
    name: str,
    weight: float,
    documents: Iterable[Document],
    tokenizer: "Tokenizer",
    dtype: str,
) -> TokenSource:
    import pyarrow as pa
    import pyarrow.parquet as pq

    uids: list[bytes] = []
    starts = [0]
    with open(directory / f"{name}.bin", "wb") as file:
        for chunk in _chunks(documents):
            for document, ids in zip(
                chunk, tokenizer.encode_batch([d.text for d in chunk]), strict=True
            ):
                ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
                file.write(np.array(ids, dtype=np.dtype(dtype).newbyteorder("<")).tobytes())
                uids.append(document.uid)
                starts.append(starts[-1] + len(ids))
    pq.write_table(
        pa.table(
            {
                "uid": pa.array(uids, pa.binary(16)),
                "start": pa.array(starts[:-1], pa.int64()),
                "end": pa.array(starts[1:], pa.int64()),
            }
        ),
        directory / f"{name}.parquet",
        compression="zstd",
    )
    return TokenSource(name=name, weight=weight, documents=len(uids), tokens=starts[-1])


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk = []
            size = 0
    if chunk:
        yield chunk


def load_manifest(directory: Path) -> TokenManifest:
    """The manifest of a directory that `tokenize_corpus` wrote."""
    path = directory / "manifest.json"
    return parse(TokenManifest, read_json(path, MAKE_AGAIN), str(path), MAKE_AGAIN)


def open_source(directory: Path, manifest: TokenManifest, source: TokenSource) -> PackedSource:
    """The sequences of one flat file. `directory` is `train` or `heldout` of a token directory.

    A missing or damaged file is a `XushiError`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = directory / f"{source.name}.bin"
    try:
        index = pq.read_table(directory / f"{source.name}.parquet", columns=["uid", "end"])
        size = path.stat().st_size
    except (OSError, pa.ArrowException) as error:
        raise BadInput(
            f"the tokens of {source.name} in {directory} cannot be read: "
            f"{' '.join(str(error).split())}",
            MAKE_AGAIN,
        ) from None
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    if size != source.tokens * dtype.itemsize or index.num_rows != source.documents:
        raise BadInput(f"the size of {path} differs from the manifest", MAKE_AGAIN)
    starts = np.concatenate(
        [np.zeros(1, dtype=np.int64), index.column("end").to_numpy().astype(np.int64)]
    )
    tokens = np.memmap(path, dtype=dtype, mode="r")
    return PackedSource(
        tokens, starts, index.column("uid").to_pylist(), manifest.sequence_length, manifest.pad_id
    )


def load_byte_lengths(directory: Path, manifest: TokenManifest) -> Ints:
    """int64 [V]: the number of bytes of text of each token."""
    path = directory / "byte_lengths.npy"
    try:
        lengths = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}", MAKE_AGAIN) from None
    if lengths.shape != (manifest.vocab_size,):
        raise BadInput(f"the size of {path} differs from the manifest", MAKE_AGAIN)
    return np.asarray(lengths, dtype=np.int64)
