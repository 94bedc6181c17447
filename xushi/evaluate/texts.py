"""Bits per byte of somebody's own text files, by the model of any directory.

Not here: the held-out text of a run (bits).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xushi.base.errors import BadInput
from xushi.base.progress import StepProgress, say
from xushi.data import HeldoutText, SourceConfig
from xushi.data.config import text_source
from xushi.data.left_out import counts, in_short
from xushi.data.packing import PackedSource
from xushi.data.sources import SourceDocuments, read_source
from xushi.engine import LLM
from xushi.evaluate.bits import DocumentBits, bits_of_documents
from xushi.evaluate.compressors import by_all_methods
from xushi.model import Deepseek, read_config
from xushi.tokenizer import Vocabulary

WINDOW = 2048  # tokens that are predicted from one another, or the model's context if it is smaller
ROWS_AT_ONCE = 4


def evaluate_texts(
    directory: Path, paths: Sequence[str], dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Bits per byte of the text files of `paths` (files, directories and patterns), beside those of
    compressors, under dotted keys. `directory` holds a model, `dtype` is as for `LLM`.

    What cannot be read as text is left out and counted; paths without any text are a `XushiError`.
    """
    named = text_source(paths)
    read_config(directory)  # before the text is read, which may take minutes
    source = _read(named)
    texts = [document.text for document in source.documents]
    if not any(texts):
        raise BadInput("the files have no text: 0 bytes", "give files with text")
    llm = LLM(directory, dtype, slots=1)  # nothing is generated, so a cache would be for nothing
    found = bits_of_texts(llm.engine.model, llm.tokenizer, texts)
    data = "".join(texts).encode()
    say("evaluate: the same bytes, by compressors")
    others = {f"bits_per_byte_{name}": bits for name, bits in by_all_methods(data).items()}
    return {
        "model": llm.name,
        "documents": len(texts),
        "bytes": len(data),
        "left_out": in_short(counts([source.left_out])),
        "window_tokens": _window(llm.engine.model),
        "bits_per_byte": found.total / len(data),
        **others,
    }


def _read(source: SourceConfig) -> SourceDocuments:
    """The text of a source. What is wrong with it is told without a recipe: there is none here."""
    try:
        return read_source(source)
    except BadInput as error:
        raise BadInput(
            error.problem,
            "give text files that may be read, or directories with some; convert others to text",
        ) from None


def bits_of_texts(model: Deepseek, tokenizer: Vocabulary, texts: Sequence[str]) -> DocumentBits:
    """What `model` needs for each text, in windows of `WINDOW` tokens that do not overlap.

    Each text begins with bos, or with an end token where the vocabulary has no bos. The end of a
    text is not predicted, since models differ in which token that is.
    """
    first = min(tokenizer.eos_ids, default=None) if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:
        raise BadInput(
            "the model's files name no token that begins or ends a text",
            "set eos_token_id in its config.json",
        )
    # What a text spells is its own: compressors count these characters, too.
    ids = [np.array([first, *tokenizer.encode_text(text)], dtype=np.uint32) for text in texts]
    starts = np.cumsum([0, *map(len, ids)])
    flat = np.concatenate(ids)
    uids = [number.to_bytes(16, "big") for number in range(len(ids))]
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    packed = PackedSource(flat, starts, uids, _window(model), first)
    heldout = HeldoutText(uids, sizes, packed)
    with StepProgress("evaluate", packed.sequences) as progress:
        return bits_of_documents(
            model, heldout, ROWS_AT_ONCE, lambda done: progress.update(done, "windows of text")
        )


def _window(model: Deepseek) -> int:
    return min(WINDOW, model.config.max_position_embeddings)
