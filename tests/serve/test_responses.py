"""A response from the events of a job, without a server."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from xushi.engine import Delta
from xushi.serve.logprobs import CompletionLogprobs, Scored
from xushi.serve.responses import Counts, ResponseFormat
from xushi.serve.worker import Event, Job
from xushi.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(run_directory):
    return Tokenizer.load(run_directory / "export" / "base")


@pytest.mark.parametrize("chat", [True, False])
def test_a_token_whose_event_has_several_texts_has_one_log_probability(tokenizer, chat):
    """The last token may bring text that was held back as a possible stop string."""
    token = tokenizer.encode("a")[0]
    form = ResponseFormat("id", 0, "base", chat, tokenizer, alternatives=0)

    async def chunks():
        job = Job([([5], [None])], chat)
        texts = [Delta("content", "held back"), Delta("content", "a")]
        job.events.put_nowait(Event(0, texts, "length", token, -0.5))
        return [chunk async for chunk in form.stream(job, Counts(1))]

    *sent, done = asyncio.run(chunks())
    assert done == b"data: [DONE]\n\n"
    choices = [json.loads(chunk.removeprefix(b"data: "))["choices"][0] for chunk in sent]
    texts = [c["delta"].get("content", "") if chat else c["text"] for c in choices]
    assert [text for text in texts if text] == ["held back", "a"]
    assert sum(choice["logprobs"] is not None for choice in choices) == 1


@pytest.mark.parametrize("chat", [True, False])
def test_the_end_token_has_a_log_probability_in_completions_only(tokenizer, chat):
    """Who sums a completion's log-probabilities, or cuts off its last, counts on every token."""
    form = ResponseFormat("id", 0, "base", chat, tokenizer, alternatives=0)

    async def whole():
        job = Job([([5], [None])], False)
        job.events.put_nowait(Event(0, [Delta("content", "a")], None, tokenizer.encode("a")[0], -1))
        job.events.put_nowait(Event(0, [], "stop", tokenizer.eos_id, -2.0))
        return await form.whole(job, Counts(1))

    answer = asyncio.run(whole())
    assert answer["usage"]["completion_tokens"] == 2
    logprobs = answer["choices"][0]["logprobs"]
    if chat:
        assert [each["logprob"] for each in logprobs["content"]] == [-1]
    else:
        assert logprobs["token_logprobs"] == [-1, -2]
        assert logprobs["tokens"] == ["a", tokenizer.decode([tokenizer.eos_id])]
        assert logprobs["text_offset"] == [0, 1]


def test_tokens_that_are_no_utf8_have_names_of_their_own(tokenizer):
    """Their places in the text are counted in whole characters."""
    tokens = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    ids = [tokens[bytes([byte])] for byte in "é€".encode()]
    found = CompletionLogprobs(tokenizer, True).of(
        [Scored(token, -1.0, [(ids[0], -0.5)]) for token in ids]
    )
    assert found["tokens"] == [
        r"bytes:\xc3",
        r"bytes:\xa9",
        r"bytes:\xe2",
        r"bytes:\x82",
        r"bytes:\xac",
    ]
    assert found["text_offset"] == [0, 0, 1, 1, 1]
    assert found["top_logprobs"][1] == {r"bytes:\xc3": -0.5, r"bytes:\xa9": -1.0}


def test_each_byte_of_a_name_has_two_digits():
    half = SimpleNamespace(spelling=lambda token, skip_special=False: b"\n\xc3")
    assert CompletionLogprobs(half, False).of([Scored(0, -1.0)])["tokens"] == [r"bytes:\x0a\xc3"]


def test_a_special_token_takes_no_place_in_the_text(tokenizer):
    letter = tokenizer.encode("a")[0]
    tokens = [Scored(token, -1.0) for token in (letter, tokenizer.eos_id, letter)]
    assert CompletionLogprobs(tokenizer, False).of(tokens)["text_offset"] == [0, 1, 1]
