"""The form of a conversation in tokens: DeepSeek-V3.1's, in which one token after `<｜Assistant｜>`
decides the mode.

    <bos> system <｜User｜> question <｜Assistant｜> <think> reasoning </think> answer <eos>
    <bos> system <｜User｜> question <｜Assistant｜> </think> answer <eos>

Every text is encoded apart from its neighbours, so no text can form a special token.
`CHAT_TEMPLATE` says the same to other programs. Not here: which messages an API accepts, and
whether earlier reasoning is sent again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from xushi.base.errors import BadInput

if TYPE_CHECKING:
    from xushi.tokenizer.tokenizer import Tokenizer


class Message(TypedDict):
    """One turn. `reasoning_content` is what an assistant wrote between `<think>` and `</think>`."""

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning_content: NotRequired[str | None]


CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set system = namespace(parts=[]) -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- set system.parts = system.parts + [message['content']] -%}
{%- endfor -%}
{{- system.parts | join('\\n\\n') -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<｜Assistant｜>' -}}
{%- if message.get('reasoning_content') -%}{{- '<think>' + message['reasoning_content'] -}}{%- endif -%}
{{- '</think>' + message['content'] + eos_token -}}
{%- elif message['role'] != 'system' -%}
{{- raise_exception('unknown role ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""


def chat_example(
    tokenizer: "Tokenizer", messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and a mask that is True on what an assistant must produce (after its
    mark, through eos).

    System texts stand first, joined by an empty line, wherever they were. An unknown role is a
    `XushiError`.
    """
    ids, mask = [tokenizer.bos_id], [False]

    def add(more: list[int], learned: bool) -> None:
        ids.extend(more)
        mask.extend([learned] * len(more))

    add(
        tokenizer.encode("\n\n".join(m["content"] for m in messages if m["role"] == "system")),
        False,
    )
    for message in messages:
        if message["role"] == "user":
            add([tokenizer.user_id, *tokenizer.encode(message["content"])], False)
        elif message["role"] == "assistant":
            add([tokenizer.assistant_id], False)
            reasoning = message.get("reasoning_content")
            if reasoning:
                add([tokenizer.think_id, *tokenizer.encode(reasoning)], True)
            add(
                [tokenizer.end_think_id, *tokenizer.encode(message["content"]), tokenizer.eos_id],
                True,
            )
        elif message["role"] != "system":
            raise BadInput(
                f"message has the unknown role {message['role']!r}", "use system, user or assistant"
            )
    return ids, mask


def parse_assistant(tokenizer: "Tokenizer", ids: Sequence[int]) -> tuple[str | None, str, bool]:
    """What follows `<｜Assistant｜>`, taken apart: (reasoning or None, answer, whether eos was
    reached).

    Only what stands after the first `</think>` is an answer: everything before it is reasoning,
    with or without a `<think>` in front, and without a `</think>` the answer is "". Ids after the
    first eos do not count.
    """
    ids = list(ids)
    finished = tokenizer.eos_id in ids
    if finished:
        ids = ids[: ids.index(tokenizer.eos_id)]
    closed = tokenizer.end_think_id in ids
    border = ids.index(tokenizer.end_think_id) if closed else len(ids)
    reasoning = tokenizer.decode(ids[:border], skip_special=True)
    thought = bool(reasoning) or tokenizer.think_id in ids[:border]
    return (
        reasoning if thought else None,
        tokenizer.decode(ids[border + 1 :], skip_special=True),
        finished,
    )
