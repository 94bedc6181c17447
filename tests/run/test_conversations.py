"""What fine-tuning learns from: each demonstration once, after the conversation that it would have
been asked in.
"""

from collections.abc import Iterator

import pytest

from xushi.base.messages import Message
from xushi.base.tracking import BatchRecord
from xushi.envs import DigitSum
from xushi.model import Batch
from xushi.run.recipe import load_recipe
from xushi.run.stages import Costs
from xushi.run.stages.conversations import (
    conversation,
    demonstration_spans,
    demonstrations,
    mean_conversation_tokens,
)
from xushi.tokenizer import Tokenizer, encode_chat
from xushi.train import SFTConfig

from ..contracts.game import Counting
from .conftest import ROOT

ENVIRONMENT = DigitSum(DigitSum.Config(min_digits=3, max_digits=3))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["0"], 263)


def config(**changed: float) -> SFTConfig:
    values = {"steps": 1, "batch_examples": 8, "learning_rate": 0.1, "warmup_steps": 0}
    return SFTConfig(
        **{
            **values,
            "thinking_share": 0.5,
            "follow_up_share": 0.5,
            "sequence_length": 64,
            **changed,
        }
    )


def length(messages: list[Message]) -> int:
    """Of three digits: 8 tokens for a question and its answer, 4 more for the thinking."""
    return 1 + 4 * len(messages) + 4 * sum(m.reasoning is not None for m in messages)


def examples(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """(ids before the learned ones, learned ids) of each example in a batch."""
    for row in range(len(batch.tokens)):
        for segment in range(int(batch.segments[row].max()) + 1):
            inside = batch.segments[row] == segment
            learned = batch.loss_mask[row][inside]
            first = int(learned.int().argmax())
            assert bool(learned[first:].all())
            yield (
                batch.tokens[row][inside][: first + 1].tolist(),
                batch.targets[row][inside][first:].tolist(),
            )


def test_each_demonstration_is_learned_after_the_prompt_that_it_would_answer(tokenizer) -> None:
    """The prompt is encoded from whole demonstrations, thinking and all, as a chat would do it."""
    chosen = config()
    batch = demonstrations(ENVIRONMENT, tokenizer, chosen, first=7).batches(3, 60)
    found = list(examples(batch))
    assert len(found) == 60
    counts = []
    for index, (prompt, learned) in enumerate(found, start=10):
        before, own = conversation(ENVIRONMENT, chosen, index, length)
        turns = len(before) // 2
        whole = [
            message
            for number in range(index - turns, index + 1)
            for message in ENVIRONMENT.demonstration("train", number, 0.5)
        ]
        assert own == whole[-2:] == list(ENVIRONMENT.demonstration("train", index, 0.5))
        assert prompt == encode_chat(tokenizer, whole[:-1])
        worked = [tokenizer.think_id, *tokenizer.encode(own[-1].reasoning or "")]
        answer = [tokenizer.end_think_id, *tokenizer.encode(own[-1].content), tokenizer.eos_id]
        assert learned == [*(worked if own[-1].reasoning is not None else []), *answer]
        counts.append(turns)
    assert {0, 1, 2} <= set(counts)


def test_the_share_of_conversations() -> None:
    """Of 2,000 demonstrations: five standard errors of a share are 0.056 at most."""
    turns = [
        len(conversation(ENVIRONMENT, config(follow_up_share=0.4), index, lambda _: 0)[0]) // 2
        for index in range(100, 2100)
    ]
    for count, share in ((1, 0.4), (2, 0.16), (3, 0.064)):
        assert sum(each >= count for each in turns) / 2000 == pytest.approx(share, abs=0.056)
    never = config(follow_up_share=0.0)
    assert not any(conversation(ENVIRONMENT, never, i, length)[0] for i in range(50))


def test_a_conversation_begins_with_the_first_demonstration() -> None:
    often = config(follow_up_share=0.99)
    for index in range(4):
        assert len(conversation(ENVIRONMENT, often, index, length)[0]) == 2 * index


def test_as_many_come_before_as_fit() -> None:
    """With 0.99 nearly all would have more: a demonstration of 9 or 13 tokens, then 8 for each."""
    often = config(follow_up_share=0.99)
    fits = 0
    for index in range(50, 80):
        before, own = conversation(ENVIRONMENT, often, index, length)
        room = often.sequence_length - length([*before, *own])
        assert room >= 0
        fits += room < 8
    assert fits >= 25


def test_the_tools_count(tokenizer) -> None:
    """The description of the game's tool takes hundreds of tokens, in which nothing else fits."""
    game = Counting(Counting.Config(fewest=3, most=3))
    tools = Tokenizer.train(["0"], 270, tools=True)
    spans = {}
    for limit in (64, 2048):
        chosen = config(sequence_length=limit, follow_up_share=0.99)
        record = BatchRecord(1, 1, 10, 1, "", "")
        [span] = demonstration_spans(game, tools, chosen, record)
        spans[limit] = span["text"]
    own = [m for m in game.demonstration("train", 10, 0.5) if m.role == "user"]
    assert spans[64].count("user: ") == len(own)
    assert spans[2048].count("user: ") > 2 * len(own)


def test_spans_show_the_conversation(tokenizer) -> None:
    chosen = config(follow_up_share=0.99)
    record = BatchRecord(1, 1, 4, 2, "", "")
    [first, second] = demonstration_spans(ENVIRONMENT, tokenizer, chosen, record, first=20)
    assert (first["sequence"], first["meta"], second["meta"]) == (4, {"task": 24}, {"task": 25})
    before, own = conversation(ENVIRONMENT, chosen, 24, length)
    lines = first["text"].split("\n")
    assert len(before) >= 4
    assert lines == [f"{m.role}: {m.reasoning or ''}{m.content}" for m in [*before, *own]]
    assert first["end_byte"] == len(first["text"].encode())


def test_spans_are_measured_in_bytes(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [Message("user", "数"), Message("assistant", "字", "想")]
    monkeypatch.setattr(DigitSum, "demonstration", lambda *_: own)
    record = BatchRecord(1, 1, 0, 1, "", "")
    [span] = demonstration_spans(ENVIRONMENT, tokenizer, config(follow_up_share=0.0), record)
    assert span["text"] == "user: 数\nassistant: 想字"
    assert (span["first_byte"], span["end_byte"]) == (0, 6 + 3 + 1 + 11 + 6)


def test_an_estimate_counts_the_conversation() -> None:
    """One of two is followed by another on average: 11 tokens of its own and 8 of what is before."""
    alone = mean_conversation_tokens(ENVIRONMENT, config(follow_up_share=0.0))
    assert 9 < alone < 13
    assert mean_conversation_tokens(ENVIRONMENT, config()) == pytest.approx(alone + 8, abs=4)
    # The first demonstrations have too few before them: at most 16 of the first 32 on average.
    long = config(follow_up_share=0.99, sequence_length=4096)
    assert mean_conversation_tokens(ENVIRONMENT, long) > alone + 8 * 20
    recipe = load_recipe(ROOT / "recipes" / "demo.toml", ["sft.follow_up_share=0"])
    more = load_recipe(ROOT / "recipes" / "demo.toml", ["sft.follow_up_share=0.9"])
    stages = [{s.name: s for s in each.run_stages()}["sft"] for each in (recipe, more)]
    costs = Costs(1e-3, 1e-4, 1.0, 2.0, 3.0, 10_000, 50_000_000)
    assert stages[1].seconds(costs) > 2 * stages[0].seconds(costs) > 0
