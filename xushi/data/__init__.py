"""From raw text to batches, with a record of which bytes every token came from."""

from xushi.data.batches import (
    HeldoutText,
    TokenDataset,
    batch_hash,
    heldout_batches,
    joined_hash,
    row_hashes,
)
from xushi.data.config import DataConfig, SourceConfig
from xushi.data.corpus import (
    CorpusSummary,
    ExtraSource,
    SourceSummary,
    build_corpus,
    first_training_texts,
    heldout_bytes,
    load_summary,
    training_texts,
)
from xushi.data.documents import Document, find_documents, make_document, read_documents
from xushi.data.overlap import NOTABLE, heldout_overlap
from xushi.data.packing import Span, byte_span
from xushi.data.shared import (
    corpus_key,
    obtain_corpus,
    obtain_tokenizer,
    obtain_tokens,
    reading_corpus,
    tokenizer_key,
    tokens_key,
)
from xushi.data.tokens import TokenManifest, load_manifest, tokenize_corpus

__all__ = [
    "NOTABLE",
    "CorpusSummary",
    "DataConfig",
    "Document",
    "ExtraSource",
    "HeldoutText",
    "SourceConfig",
    "SourceSummary",
    "Span",
    "TokenDataset",
    "TokenManifest",
    "batch_hash",
    "build_corpus",
    "byte_span",
    "corpus_key",
    "find_documents",
    "first_training_texts",
    "heldout_batches",
    "heldout_bytes",
    "heldout_overlap",
    "joined_hash",
    "load_manifest",
    "load_summary",
    "make_document",
    "obtain_corpus",
    "obtain_tokenizer",
    "obtain_tokens",
    "read_documents",
    "reading_corpus",
    "row_hashes",
    "tokenize_corpus",
    "tokenizer_key",
    "tokens_key",
    "training_texts",
]
