"""What a run's text and model cost on this machine, measured on parts before the run.

Not here: what the stages make of it (`Stage.seconds`), and the plan that is printed (`estimate`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xushi.data import (
    CorpusSummary,
    first_training_texts,
    heldout_bytes,
    load_summary,
    training_texts,
)
from xushi.data.left_out import counts
from xushi.data.overlap import shared_fraction
from xushi.data.read_files import look_at
from xushi.evaluate import by_all_methods, total_bits, xz_primed
from xushi.evaluate.compressors import PRIMED_MEMORY_BYTES
from xushi.model import Batch, Deepseek
from xushi.run.benchmark import Shape, training_step
from xushi.run.recipe import Recipe
from xushi.run.stages.data import Data, left_out_of
from xushi.run.stages.evaluate import ROWS_AT_ONCE
from xushi.tokenizer import Tokenizer, TooFewMerges

SAMPLE = 1 << 20  # characters of training text, and bytes of held-out text


@dataclass(frozen=True)
class TextCosts:
    """The corpus, and the seconds that the stages which read it take. `primed_bytes`: memory that
    the compressors need. `left_out`: how many the sources leave out, by reason.
    """

    summary: CorpusSummary
    data: float
    tokenizer: float
    compressors: float
    primed_bytes: int
    heldout_tokens: int
    left_out: dict[str, int]


def measure_text(recipe: Recipe) -> TextCosts:
    """Read the text as the run will (it then lies in the cache), and try a part of it."""
    began = time.perf_counter()
    stage = Data(recipe)
    files = look_at(stage.config)
    with stage.reading(files) as corpus:
        summary = load_summary(corpus)
        data = time.perf_counter() - began
        sample = list(first_training_texts(corpus, SAMPLE))
        trained = sum(len(text.encode()) for text in training_texts(corpus))
        heldout = heldout_bytes(corpus)[:SAMPLE]
    size, whole = sum(len(text.encode()) for text in sample), trained + summary.heldout_bytes
    began = time.perf_counter()
    shared_fraction([heldout.decode(errors="ignore")], sample)
    data += (time.perf_counter() - began) * whole / (size + len(heldout))
    began = time.perf_counter()
    tokenizer = _tokenizer(sample, recipe.sized_model.vocab_size)
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(sample))
    spent = time.perf_counter() - began
    compressors, primed_bytes = _compressors(recipe, sample, heldout, summary, trained)
    return TextCosts(
        summary,
        data,
        spent * whole / size,
        compressors,
        primed_bytes,
        round(summary.heldout_bytes * tokens / size),
        counts(left_out_of(summary, files).values()),
    )


def _tokenizer(sample: Sequence[str], vocabulary: int) -> Tokenizer:
    try:
        return Tokenizer.train(sample, vocabulary)
    except TooFewMerges as error:  # a part may allow less than the whole
        return Tokenizer.train(sample, error.reached)


def _compressors(
    recipe: Recipe, sample: Sequence[str], heldout: bytes, summary: CorpusSummary, trained: int
) -> tuple[float, int]:
    """(seconds, bytes of memory) that evaluation's compressors take on the whole corpus."""
    began = time.perf_counter()
    by_all_methods(heldout)
    seconds = (time.perf_counter() - began) * summary.heldout_bytes / len(heldout)
    if not recipe.evaluate.xz_primed:
        return seconds, 0
    text = "".join(sample).encode()
    began = time.perf_counter()
    part = xz_primed(text, heldout)
    per_byte = (time.perf_counter() - began) / (len(text) + len(heldout))
    whole = trained + summary.heldout_bytes
    encoders = part.encoder_bytes * whole // part.dictionary_bytes
    return seconds + per_byte * whole, min(encoders, PRIMED_MEMORY_BYTES) + 2 * whole


def training_token_seconds(shape: Shape, device: str) -> float:
    """Seconds a token: the faster of two optimizer steps on random tokens, after one to warm up."""
    step, tokens, times = training_step(shape, device), shape.tokens(), []
    for _ in range(3):
        began = time.perf_counter()
        step(tokens)
        times.append(time.perf_counter() - began)
    return min(times[1:]) / shape.settings.batch_tokens


def forward_token_seconds(shape: Shape, device: str) -> float:
    """Seconds a token of evaluation, of a batch as large as evaluation's."""
    model = Deepseek(shape.config).initialise(0).to(device)
    stream = torch.Generator().manual_seed(0)
    size = (ROWS_AT_ONCE, shape.length)
    tokens = torch.randint(0, shape.config.vocab_size, size, generator=stream)
    batch = Batch(
        tokens,
        targets=tokens.roll(-1, 1),
        loss_mask=torch.ones_like(tokens, dtype=torch.bool),
        positions=torch.arange(shape.length).expand_as(tokens),
        segments=torch.zeros_like(tokens),
    )
    began = time.perf_counter()
    total_bits(model, [batch])
    return (time.perf_counter() - began) / tokens.numel()
