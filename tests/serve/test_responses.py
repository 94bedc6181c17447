"""A response from the events of a job, without a server."""

import asyncio
import json

import pytest

from xushi.engine import Delta
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
