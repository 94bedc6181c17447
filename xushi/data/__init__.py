"""From raw text to batches, with a record of which bytes every token came from."""

from xushi.data.batches import (
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
    heldout_bytes,
    load_summary,
    training_texts,
)
from xushi.data.documents import Document, find_documents, make_document, read_documents
from xushi.data.packing import Span, byte_span
from xushi.data.tokens import TokenManifest, load_manifest, tokenize_corpus

__all__ = [
    "CorpusSummary",
    "DataConfig",
    "Document",
    "ExtraSource",
    "SourceConfig",
    "SourceSummary",
    "Span",
    "TokenDataset",
    "TokenManifest",
    "batch_hash",
    "build_corpus",
    "byte_span",
    "find_documents",
    "heldout_batches",
    "heldout_bytes",
    "joined_hash",
    "load_manifest",
    "load_summary",
    "make_document",
    "read_documents",
    "row_hashes",
    "tokenize_corpus",
    "training_texts",
]
