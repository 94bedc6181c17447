"""The form of a conversation in tokens: DeepSeek-V3.1's.

    <bos> system <｜User｜> question <｜Assistant｜> <think> reasoning </think> answer <eos>
    <bos> system <｜User｜> question <｜Assistant｜> </think> answer <eos>

The token after `<｜Assistant｜>` decides whether the assistant thinks. Texts are encoded apart from
special tokens, so no text can form one. Not here: the same form for other programs (template), and
which messages an API accepts (serve).
"""

from collections.abc import Sequence

from xushi.base.errors import BadInput
from xushi.base.messages import Message
from xushi.tokenizer.tokenizer import Tokenizer


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], generation_prompt: bool = True
) -> list[int]:
    """Ids of a conversation; with the generation prompt they end where the assistant goes on."""
    ids, _ = _render(tokenizer, messages)
    return [*ids, tokenizer.assistant_id] if generation_prompt else ids


def chat_examples(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> list[tuple[list[int], list[bool]]]:
    """Training examples from a demonstration: (ids, mask) pairs.

    The mask is True on what an assistant must produce: after its mark, through eos. System texts
    come first, joined by an empty line, wherever they were. An unknown role is a `XushiError`.
    """
    return [_render(tokenizer, messages)]


def _render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    ids, mask = [tokenizer.bos_id], [False]

    def add(more: list[int], learned: bool) -> None:
        ids.extend(more)
        mask.extend([learned] * len(more))

    add(tokenizer.encode("\n\n".join(m.content for m in messages if m.role == "system")), False)
    for message in messages:
        if message.role == "user":
            add([tokenizer.user_id, *tokenizer.encode(message.content)], False)
        elif message.role == "assistant":
            add([tokenizer.assistant_id], False)
            if message.reasoning:
                add([tokenizer.think_id, *tokenizer.encode(message.reasoning)], True)
            add(
                [tokenizer.end_think_id, *tokenizer.encode(message.content), tokenizer.eos_id],
                True,
            )
        elif message.role != "system":
            raise BadInput(
                f"message has the unknown role {message.role!r}", "use system, user or assistant"
            )
    return ids, mask


def parse_assistant(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[Message, bool]:
    """The message in an assistant's ids, and whether eos was reached.

    `ids` are what follows the generation prompt. Only what comes after the first `</think>` is
    content: everything before it is reasoning, with or without a `<think>` in front, and without a
    `</think>` the content is "". Ids after the first eos do not count.
    """
    ids = list(ids)
    finished = tokenizer.eos_id in ids
    if finished:
        ids = ids[: ids.index(tokenizer.eos_id)]
    closed = tokenizer.end_think_id in ids
    border = ids.index(tokenizer.end_think_id) if closed else len(ids)
    reasoning = tokenizer.decode(ids[:border], skip_special=True)
    thought = bool(reasoning) or tokenizer.think_id in ids[:border]
    content = tokenizer.decode(ids[border + 1 :], skip_special=True)
    return Message("assistant", content, reasoning if thought else None), finished
