"""A model and its tokenizer from a directory in Hugging Face's layout: text in, text out.

Not here: many clients at once (serve), training-time sampling on bare ids (batch).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xushi.base.errors import BadInput
from xushi.base.messages import Message, Tool, ToolCall
from xushi.base.model_directory import model_name
from xushi.base.published_files import OTHER_TOKENIZER
from xushi.engine.engine import Engine
from xushi.engine.memory import plan_memory
from xushi.engine.params import SamplingParams
from xushi.engine.request import FinishReason, Request
from xushi.engine.text import Delta, TextStream
from xushi.model import load_pretrained
from xushi.model.weights import open_directory
from xushi.tokenizer import Conversations

# Messages, or mappings in the OpenAI form.
Conversation = Sequence[Message | Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Completion:
    """A continued text. `token_ids`, `logprobs` and `sampling_logprobs` are as in `Request`.

    `text` ends before a stop string; `token_ids` include the tokens of that stop string.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    weights_version: int
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """An answer: its reasoning or None, its content and its tool calls; the rest as in
    `Completion`.
    """

    reasoning_content: str | None
    content: str
    tool_calls: tuple[ToolCall, ...]
    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    weights_version: int
    finish_reason: FinishReason


class LLM:
    """Loads the model directory `path`: config.json, safetensors, tokenizer.json, and a chat
    template if it is to answer conversations. A run's exports and published models are alike.

    Attributes: `name` (the directory's, or ORG/NAME within Hugging Face's cache), `can_chat`
    (whether it has a form of conversations; else it only completes text), `memory` (a
    `MemoryPlan`: what weights and cache take).

    Only one thread may use it at a time.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype | None = None,
        slots: int | None = None,
        template: str | Path | None = None,
    ) -> None:
        """`dtype` of the weights and `slots`, the tokens that the cache holds, follow from the
        files and the machine's memory if they are None (`plan_memory`). `template` is a file with a
        chat template to use instead of the directory's own.

        What cannot fit into memory is a `XushiError`, raised before the weights are read.
        """
        directory = Path(path)
        self.name = model_name(directory)
        config = open_directory(directory)[0].without_mtp()  # generation uses no MTP layers
        self._conversations = Conversations(directory, Path(template) if template else None)
        self.tokenizer = self._conversations.tokenizer
        self.can_chat = self._conversations.can_chat
        if self.tokenizer.vocab_size > config.vocab_size:
            raise BadInput(
                f"{path}: the tokenizer has {self.tokenizer.vocab_size} tokens and the model "
                f"{config.vocab_size}",
                OTHER_TOKENIZER,
            )
        self.memory = plan_memory(directory, config, dtype, slots)
        model = load_pretrained(directory, self.memory.dtype, mtp=False)
        self.engine = Engine(model, self.tokenizer.eos_ids, self.memory.slots)
        # A cache smaller than the model's context bounds what one request may hold.
        self.engine.context = min(self.engine.context, self.memory.slots)

    @property
    def context(self) -> int:
        """The largest number of tokens of prompt and answer together."""
        return self.engine.context

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """Continue texts or lists of ids, which become prompts as in `prompt_ids`."""
        listed: Sequence[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else prompts
        each = [params] * len(listed) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(listed):
            raise BadInput(
                f"{len(listed)} prompts and {len(each)} sampling parameters",
                "give one for all or one each",
            )
        ids = [self.prompt_ids(prompt) for prompt in listed]
        for prompt_ids, p in zip(ids, each, strict=True):
            self.engine.check(prompt_ids, p)  # all before any is queued
        requests = [self.engine.add(prompt_ids, p) for prompt_ids, p in zip(ids, each, strict=True)]
        streams = [TextStream(self.tokenizer, p.stop) for p in each]
        texts = [""] * len(requests)
        for index, delta in self._run(requests, streams):
            texts[index] += delta.text
        return [
            Completion(text, *_figures(request, stream))
            for text, request, stream in zip(texts, requests, streams, strict=True)
        ]

    def chat(
        self, messages: Conversation, params: SamplingParams, tools: Sequence[Tool] = ()
    ) -> ChatCompletion:
        """The model's answer to a conversation of messages, or of mappings in the OpenAI form.

        `tools` are what the model may call; a caller runs them and sends the outputs as messages of
        role "tool" after the answer.
        """
        prompt = self.conversation_ids(messages, tools)
        request = self.engine.add(prompt, params)
        stream = TextStream(self.tokenizer, params.stop, chat=True, calls=True, prompt_ids=prompt)
        parts = {"reasoning": "", "content": ""}
        for _, delta in self._run([request], [stream]):
            parts[delta.channel] += delta.text
        return ChatCompletion(
            parts["reasoning"] if stream.thought else None,
            parts["content"],
            stream.tool_calls,
            *_figures(request, stream),
        )

    def stream(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[Delta]:
        """The text of `generate` for one prompt as it arrives; closing the iterator ends the
        request.
        """
        request = self.engine.add(self.prompt_ids(prompt), params)
        for _, delta in self._run([request], [TextStream(self.tokenizer, params.stop)]):
            yield delta

    def stream_chat(
        self, messages: Conversation, params: SamplingParams, tools: Sequence[Tool] = ()
    ) -> Iterator[Delta]:
        """The text of `chat` as it arrives; closing the iterator ends the request. A tool call is
        content here: there is no other place for it.
        """
        prompt = self.conversation_ids(messages, tools)
        request = self.engine.add(prompt, params)
        stream = TextStream(self.tokenizer, params.stop, chat=True, prompt_ids=prompt)
        for _, delta in self._run([request], [stream]):
            yield delta

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The prompt for a text, which gets the beginning-of-text token in front if the tokenizer
        asks for it, or for ids as they are.
        """
        return self.tokenizer.prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)

    def conversation_ids(self, messages: Conversation, tools: Sequence[Tool] = ()) -> list[int]:
        """The prompt for the next answer; see `Conversations.ids`. Mappings are read by
        `Message.from_dict`.
        """
        if not messages:
            raise BadInput("the conversation has no messages", "give at least one of role user")
        return self._conversations.ids(_read(messages), tools)

    def continued_ids(self, messages: Conversation) -> list[int]:
        """The prompt that ends inside the last message, of role assistant, which the model goes on
        with: in its content, or in its reasoning if it has no content yet.
        """
        return self._conversations.continued_ids(_read(messages))

    def _run(
        self, requests: list[Request], streams: list[TextStream]
    ) -> Iterator[tuple[int, Delta]]:
        """Step the engine until all are finished; yields the text of request i as (i, delta)."""
        read = [0] * len(requests)
        open_ = list(range(len(requests)))
        try:
            while open_:
                for index in open_:
                    request, stream = requests[index], streams[index]
                    for token in request.token_ids[read[index] :]:
                        read[index] += 1
                        yield from ((index, delta) for delta in stream.push(token))
                        if stream.stopped:
                            self.engine.abort(request, "stop")
                            break
                    if request.finish_reason is not None:
                        yield from ((index, delta) for delta in stream.flush())
                open_ = [index for index in open_ if requests[index].finish_reason is None]
                if open_:
                    self.engine.step()
        finally:
            for request in requests:
                self.engine.abort(request)


def _read(messages: Conversation) -> list[Message]:
    return [each if isinstance(each, Message) else Message.from_dict(each) for each in messages]


def _figures(
    request: Request, stream: TextStream
) -> tuple[list[int], list[float], list[float], int, FinishReason]:
    # "stop" also if the same token reached the limit.
    reason = "stop" if stream.stopped else request.finish_reason
    assert reason is not None
    return (
        request.token_ids,
        request.logprobs,
        request.sampling_logprobs,
        request.weights_version,
        reason,
    )
