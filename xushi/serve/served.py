"""A model that is served: its worker, its card, and prompts from what a request holds.

Not here: requests and responses (protocol, responses), routes (app, completions).
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from xushi.base.errors import XushiError
from xushi.base.messages import Message
from xushi.engine import ContextLengthError
from xushi.serve.cards import ModelCard
from xushi.serve.protocol import ApiError
from xushi.serve.worker import Job, Worker

# How many prompts of a model are encoded at the same time. Each takes a hundred times its own size
# in memory meanwhile.
ENCODED_AT_ONCE = 2

PromptT = TypeVar("PromptT")


@dataclass(frozen=True)
class Served:
    """One model of the server. `chat` says whether it answers conversations."""

    name: str
    worker: Worker
    card: ModelCard
    created: int
    chat: bool
    _encoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(ENCODED_AT_ONCE))

    def describe(self) -> dict[str, Any]:
        """The model's entry in /v1/models. The key `xushi` holds what the chat page needs."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "xushi",
            "xushi": {
                "chat": self.chat,
                "context": self.worker.llm.context,
                **self.card.model_dump(),
            },
        }

    @cached_property
    def _longest_token(self) -> int:
        return self.worker.llm.tokenizer.longest_token

    async def conversation(self, messages: Sequence[Message], continued: bool) -> list[int]:
        """The prompt for the next message, or for the rest of the last one. Errors as in
        `_encode`.
        """
        llm = self.worker.llm
        texts = [text for m in messages for text in (m.content, m.reasoning) if text]
        encode = llm.continued_ids if continued else llm.conversation_ids
        return await self._encode(encode, messages, texts, "messages")

    async def prompt(self, prompt: str | list[int]) -> list[int]:
        """The prompt of a completion. Errors as in `_encode`."""
        texts = [prompt] if isinstance(prompt, str) else []
        return await self._encode(self.worker.llm.prompt_ids, prompt, texts, "prompt")

    async def _encode(
        self, encode: Callable[[PromptT], list[int]], prompt: PromptT, texts: list[str], param: str
    ) -> list[int]:
        """The ids of a prompt. An `ApiError` that names `param` if it cannot be encoded, or if its
        texts, with the longest tokens there are, would not fit into the context.
        """
        context = self.worker.llm.context
        fewest = sum(len(text.encode()) for text in texts) // self._longest_token
        try:
            if fewest > context:
                raise self.worker.llm.engine.too_long(fewest, at_least=True)
            async with self._encoding:
                return await run_in_threadpool(encode, prompt)
        except XushiError as error:
            raise refusal(error, param) from None

    def check(self, job: Job, param: str) -> None:
        """An `ApiError` that names `param` if the engine would refuse the job."""
        limit = self.worker.queue_limit
        if job.choices > limit:
            raise ApiError(
                400,
                f"the request asks for {job.choices} choices and this server allows {limit}",
                "n",
                "invalid_value",
            )
        try:
            for prompt, choices in job.prompts:
                self.worker.check(prompt, choices[0])
        except XushiError as error:
            raise refusal(error, param) from None


def refusal(error: XushiError, param: str) -> ApiError:
    """What the client is told of an error in its prompt."""
    is_length = isinstance(error, ContextLengthError)
    code = "context_length_exceeded" if is_length else "invalid_value"
    return ApiError(400, f"{error.problem}; {error.remedy}", param, code)


def find(served: Mapping[str, Served], name: str) -> Served:
    """The model with this name, or an `ApiError` 404."""
    if name not in served:
        raise ApiError(
            404,
            f"model {name!r} does not exist; this server has {', '.join(served)}",
            "model",
            "model_not_found",
        )
    return served[name]
