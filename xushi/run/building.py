"""The stages that make a model: data, tokenizer, pretraining, fine-tuning, reinforcement learning,
and its control.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xushi.base.seeds import derive
from xushi.data import (
    ExtraSource,
    TokenDataset,
    build_corpus,
    heldout_batches,
    load_manifest,
    load_summary,
    make_document,
    tokenize_corpus,
    training_texts,
)
from xushi.data.config import DataConfig
from xushi.envs import Environment
from xushi.evaluate import total_bits
from xushi.rl import reinforce
from xushi.run.context import RunContext
from xushi.tokenizer import Tokenizer, chat_examples
from xushi.tokenizer.config import SMALLEST_VOCABULARY
from xushi.train import (
    Data,
    ObjectiveConfig,
    PretrainConfig,
    SFTConfig,
    pack_examples,
    run_stage,
    train,
)

TRANSCRIPTS = "transcripts"  # the name of the environment's source


def _transcripts(context: RunContext) -> dict[str, ExtraSource]:
    """Worked solutions as plain text, each a document of its own: among other lines the sums are
    learnt far later.
    """
    config = context.recipe.environment
    if config is None or not config.transcripts:
        return {}
    environment = context.environment()
    documents = [
        make_document(
            TRANSCRIPTS,
            environment.text(environment.demonstration("train", index, 1.0)),
            {"path": f"{environment.name}/{index}"},
        )
        for index in range(config.transcripts)
    ]
    return {TRANSCRIPTS: ExtraSource(documents, config.transcript_weight)}


def data(context: RunContext) -> dict[str, Any]:
    """Read, divide and write the corpus."""
    config: DataConfig = context.recipe.data
    build_corpus(config, _transcripts(context), context.path("data", "corpus"))
    summary = load_summary(context.path("data", "corpus"))
    return {
        "data.bytes": summary.bytes,
        "data.documents": summary.documents,
        "data.files": summary.files,
        "data.sha256": summary.sha256,
        "data.heldout_bytes": summary.heldout_bytes,
        "data.heldout_fraction": summary.heldout_bytes / summary.bytes,
        "data.heldout_rule": summary.rule,
        "data.heldout_groups": ", ".join(summary.heldout_groups),
    }


def tokenizer(context: RunContext) -> dict[str, Any]:
    """Train the tokenizer on the training text and write the corpus as tokens."""
    corpus, recipe = context.path("data", "corpus"), context.recipe
    size = recipe.tokenizer.vocab_size if recipe.runs("tokenizer") else SMALLEST_VOCABULARY
    trained = Tokenizer.train(training_texts(corpus), size)
    trained.save(context.path("tokenizer"))
    tokenize_corpus(corpus, trained, context.path("data", "tokens"), recipe.data.sequence_length)
    manifest, summary = load_manifest(context.path("data", "tokens")), load_summary(corpus)
    return {
        "tokenizer.vocab_size": trained.vocab_size,
        "tokenizer.sha256": trained.hash,
        "tokenizer.bytes_per_token": summary.heldout_bytes / max(1, manifest.heldout.tokens),
        "data.train_tokens": sum(source.tokens for source in manifest.train),
        "data.heldout_tokens": manifest.heldout.tokens,
    }


def dataset_of(context: RunContext) -> TokenDataset:
    """The training sequences; the control without data sees the environment's transcripts alone."""
    directory = context.path("data", "tokens")
    sources = None if context.recipe.runs("data") else [TRANSCRIPTS]
    return TokenDataset.open(directory, derive(context.recipe.seed, "data") >> 1, sources)


def _heldout_part(
    context: RunContext, config: PretrainConfig
) -> tuple[list[dict[str, Tensor]], float]:
    """About `evaluate_tokens` of the held-out stream, spread over it, and their share of its bytes."""
    length = context.recipe.data.sequence_length
    rows = max(1, config.evaluate_tokens // length)
    batches = [vars(batch) for batch in heldout_batches(context.path("data", "tokens"), 8)]
    step = max(1, len(batches) * 8 // rows)
    chosen = batches[::step]
    wanted = sum(int(batch["loss_mask"].sum()) for batch in chosen)
    total = sum(int(batch["loss_mask"].sum()) for batch in batches)
    return chosen, load_summary(context.path("data", "corpus")).heldout_bytes * wanted / total


@dataclass(frozen=True)
class TrainingInputs:
    """What a training stage starts from: how it is trained, after which stage, and on what."""

    config: ObjectiveConfig
    after: str | None
    data: Data


def training_inputs(context: RunContext, stage: str) -> TrainingInputs:
    """Those of stage "pretrain" or "sft"."""
    if stage == "pretrain":
        pretraining, dataset = context.recipe.pretrain, dataset_of(context)
        length = context.recipe.data.sequence_length
        return TrainingInputs(
            pretraining,
            None,
            Data(
                lambda cursor, count: vars(dataset.batch(cursor, count)),
                lambda step: pretraining.rows_at(step, length),
                piecewise=True,
            ),
        )
    config = context.recipe.sft
    assert stage == "sft" and config is not None, "the recipe's validation asks for [sft]"
    return TrainingInputs(
        config, context.last_stage("pretrain"), demonstrations(context, context.tokenizer(), config)
    )


def train_pretrain(context: RunContext) -> None:
    """Train on the corpus from random weights."""
    config, inputs, layout = (
        context.recipe.pretrain,
        training_inputs(context, "pretrain"),
        context.layout,
    )
    some, some_bytes = _heldout_part(context, config)
    model = context.trained_model(inputs.after)

    def evaluate() -> dict[str, float]:
        run = partial(run_stage, model, layout) if layout.pipeline > 1 else None
        bits = torch.tensor(
            total_bits(model, [layout.rows(batch) for batch in some], run), dtype=torch.float64
        )
        return {"heldout_bits_per_byte": float(layout.grand_total(bits)) / some_bytes}

    train(
        "pretrain",
        model,
        config,
        inputs.data,
        context.checkpoints("pretrain"),
        context.tracking,
        (config.evaluate_every, evaluate),
        layout,
    )


def pretrain(context: RunContext) -> dict[str, Any]:
    """Train on the corpus; what came of it."""
    train_pretrain(context)
    config = context.recipe.pretrain
    tokens = config.tokens(context.recipe.data.sequence_length)
    return {
        "pretrain.steps": config.steps,
        "pretrain.tokens": tokens,
        "pretrain.epochs": tokens / dataset_of(context).tokens_per_epoch,
        **_last(context, "pretrain", "loss", "mtp_loss"),
        "pretrain.tokens_per_second": tokens / training_seconds(context, "pretrain"),
    }


def _last(context: RunContext, stage: str, *names: str) -> dict[str, float]:
    """The mean of the last tenth of some metrics: a single step's value is mostly noise."""
    values = {}
    for name in names:
        series = [
            value for _, value in context.tracking.series(stage, name) if math.isfinite(value)
        ]
        tail = series[-max(1, len(series) // 10) :]
        values[f"{stage}.{name}"] = sum(tail) / len(tail)
    return values


def training_seconds(context: RunContext, stage: str) -> float:
    """Seconds of all steps of a training stage, whether or not it was interrupted between them."""
    return sum(value for _, value in context.tracking.series(stage, "seconds"))


def demonstrations(
    context: RunContext, tokens: Tokenizer, config: SFTConfig, first: int = 0
) -> Data:
    """Demonstrations, fresh ones at every step; the cursor counts them from number `first` on."""
    environment: Environment = context.environment()

    def batch(cursor: int, count: int) -> dict[str, Tensor]:
        examples = [
            example
            for index in range(first + cursor, first + cursor + count)
            for example in chat_examples(
                tokens, environment.demonstration("train", index, config.thinking_share)
            )
        ]
        return pack_examples(examples, config.sequence_length, tokens.pad_id).batch

    return Data(batch, lambda _: config.batch_examples)


def train_sft(context: RunContext) -> None:
    """Fine-tune the pretrained model on demonstrations."""
    inputs = training_inputs(context, "sft")
    train(
        "sft",
        context.trained_model(inputs.after),
        inputs.config,
        inputs.data,
        context.checkpoints("sft"),
        context.tracking,
        layout=context.layout,
    )


def sft(context: RunContext) -> dict[str, Any]:
    """Fine-tune; what came of it."""
    train_sft(context)
    config = context.recipe.sft
    assert config is not None, "the recipe's validation asks for [sft]"
    return {
        "sft.steps": config.steps,
        "sft.examples": config.steps * config.batch_examples,
        **_last(context, "sft", "loss"),
    }


def rl(context: RunContext) -> dict[str, Any]:
    """Reinforce what the verifier finds right."""
    config = context.recipe.rl
    assert config is not None, "the recipe's validation asks for [rl]"
    model = context.trained_model(context.last_stage("pretrain", "sft"))
    reinforce(
        model,
        context.tokenizer(),
        context.environment(),
        config,
        derive(context.recipe.seed, "rl"),
        context.checkpoints("rl"),
        context.tracking,
    )
    differences = [value for _, value in context.tracking.series("rl", "logprob_difference")]
    return {
        "rl.steps": config.steps,
        "rl.answers": config.steps * config.prompts * config.samples,
        "rl.max_logprob_difference": max(differences),
        **_last(context, "rl", "reward"),
    }


def train_control(context: RunContext, steps: int = 0) -> None:
    """Continue the fine-tuning for so many steps, of which the first process knows."""
    config, steps = context.recipe.sft, context.layout.team.broadcast(steps)
    assert config is not None, "control runs only after sft"
    train(
        "control",
        context.trained_model("sft"),
        config.model_copy(update={"steps": steps}),
        demonstrations(context, context.tokenizer(), config, config.steps * config.batch_examples),
        context.checkpoints("control"),
        context.tracking,
        layout=context.layout,
    )


def control(context: RunContext) -> dict[str, Any]:
    """Continue the fine-tuning for as long as reinforcement learning took: what mere further
    training would give.

    The number of steps is taken from the measured times once and kept, so that a resumed run does
    the same work.
    """
    config = context.recipe.sft
    assert config is not None, "control runs only after sft"
    per_step = training_seconds(context, "sft") / config.steps
    steps = context.tracking.decide(
        "control", "steps", max(1, round(training_seconds(context, "rl") / per_step))
    )
    train_control(context, steps)
    return {"control.steps": steps}


# What all processes do together; the rest the first one does alone.
TOGETHER: dict[str, Callable[[RunContext], None]] = {
    "pretrain": train_pretrain,
    "sft": train_sft,
    "control": train_control,
}
