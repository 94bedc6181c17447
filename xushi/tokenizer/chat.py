"""The form of a conversation in tokens: DeepSeek-V3.1's, with the tool calls of its model card.

    <bos> system and tools <｜User｜> question
    <｜Assistant｜> <think> reasoning </think> answer <eos>
    <｜Assistant｜> </think> answer <eos>

The token after `<｜Assistant｜>` decides whether the assistant thinks. An answer may end with tool
calls. The tools' outputs follow its <eos>, and the assistant goes on without another mark:

    answer <｜tool▁calls▁begin｜> call ... <｜tool▁calls▁end｜> <eos>
    <｜tool▁output▁begin｜> output <｜tool▁output▁end｜> <think> reasoning </think> answer <eos>

where a call is `<｜tool▁call▁begin｜> name <｜tool▁sep｜> arguments <｜tool▁call▁end｜>`.
Reasoning stays in the conversation through tool outputs. The next user message drops it
(DeepSeek-V3.2, arXiv:2512.02556, section 3.2.1), so a prompt after tool outputs extends what was
sampled before them.

Texts are encoded apart from special tokens, so no text can form one. Not here: the same form for
other programs (template), reading a reply (reply), which messages an API accepts (serve).
"""

import json
from collections.abc import Sequence

from xushi.base.errors import BadInput
from xushi.base.messages import Message, Tool, ToolCall
from xushi.tokenizer.template import TOOLS_HEAD, TOOLS_RULES
from xushi.tokenizer.tokenizer import Tokenizer
from xushi.tokenizer.vocabulary import ToolIds

ROLES = ("system", "user", "assistant", "tool")


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    generation_prompt: bool = True,
) -> list[int]:
    """Ids of a conversation; with the generation prompt they end where the assistant goes on.

    System texts come first, joined by an empty line, wherever they were; the tools follow them. An
    unknown role, or tools with a vocabulary that has no tool tokens, is a `XushiError`.
    """
    text = _Rendering(tokenizer)
    text.conversation(messages, tools)
    if generation_prompt and not _follows_tool(messages, len(messages)):
        text.add(tokenizer.assistant_id)
    return text.ids


def encode_outputs(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of tool messages, which continue a sequence that ended with an assistant's eos.

    After them the assistant goes on. So the sequence that was sampled is extended and never encoded
    again: a sampled reply may be written in other tokens than `encode_chat` would use.
    """
    text = _Rendering(tokenizer)
    for message in messages:
        if message.role != "tool":
            raise BadInput(
                f"a message of role {message.role!r} does not extend a sequence",
                "give tool messages, or encode the conversation again with encode_chat",
            )
        text.output(message)
    return text.ids


def chat_examples(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    learned_from: int = 0,
) -> list[tuple[list[int], list[bool]]]:
    """Training examples (ids, mask) from a demonstration, each as sampling would have it.

    The first `learned_from` messages are the conversation before it, from which nothing is learned.
    The mask is True on what an assistant must produce: everything after its mark or a tool's
    output, through eos, tool calls included. A user message that drops earlier reasoning begins
    another example, in which only what follows is learned. So each assistant message is learned
    once, after exactly what it would see. Errors as in `encode_chat`.
    """
    examples = []
    start = learned_from
    for end in range(learned_from + 1, len(messages) + 1):
        if end < len(messages) and not _drops_reasoning(messages, end):
            continue
        text = _Rendering(tokenizer)
        text.conversation(messages[:end], tools, learned_from=start)
        start = end
        if any(text.mask):
            examples.append((text.ids, text.mask))
    return examples


def _drops_reasoning(messages: Sequence[Message], place: int) -> bool:
    """Whether the message at `place` removes reasoning: of those since the user message before."""
    if messages[place].role != "user":
        return False
    users = [i for i, message in enumerate(messages[:place]) if message.role == "user"]
    last = users[-1] if users else 0
    return any(message.reasoning is not None for message in messages[last:place])


def _follows_tool(messages: Sequence[Message], place: int) -> bool:
    """Whether the last message before `place`, system messages aside, is a tool's output."""
    earlier = [message.role for message in messages[:place] if message.role != "system"]
    return earlier[-1:] == ["tool"]


class _Rendering:
    """Ids and mask while a conversation is written."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self._tokenizer = tokenizer

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Tool], learned_from: int = 0
    ) -> None:
        """Write all of it; assistant messages from number `learned_from` on are learned."""
        system = [message.content for message in messages if message.role == "system"]
        last_user = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
        self.add(self._tokenizer.bos_id)
        self._system(system, tools)
        for place, message in enumerate(messages):
            if message.role == "user":
                self.add(self._tokenizer.user_id, message.content)
            elif message.role == "tool":
                self.output(message)
            elif message.role == "assistant":
                if not _follows_tool(messages, place):
                    self.add(self._tokenizer.assistant_id)
                self._assistant(message, place > last_user, place >= learned_from)
            elif message.role != "system":
                raise BadInput(
                    f"message has the unknown role {message.role!r}", f"use {', '.join(ROLES)}"
                )

    def output(self, message: Message) -> None:
        """Write a tool's output."""
        marks = self._tool_ids()
        self.add(marks.output_begin, message.content, marks.output_end)

    def add(self, *parts: str | int, learned: bool = False) -> None:
        """Append texts and single ids."""
        for part in parts:
            more = self._tokenizer.encode(part) if isinstance(part, str) else [part]
            self.ids += more
            self.mask += [learned] * len(more)

    def _system(self, texts: list[str], tools: Sequence[Tool]) -> None:
        if not tools:
            self.add("\n\n".join(texts))
            return
        marks = self._tool_ids()
        described = TOOLS_HEAD + "".join(_description(tool) for tool in tools)
        before, after = TOOLS_RULES
        self.add("\n\n".join([*texts, described]) + before)
        self._call_marks(marks, [ToolCall("tool_call_name", "tool_call_arguments")])
        self.add("{additional_tool_calls}", marks.calls_end, after)

    def _assistant(self, message: Message, keeps_reasoning: bool, learned: bool) -> None:
        tokenizer = self._tokenizer
        if message.reasoning is not None and keeps_reasoning:
            self.add(tokenizer.think_id, message.reasoning, learned=learned)
        self.add(tokenizer.end_think_id, message.content, learned=learned)
        if message.tool_calls:
            marks = self._tool_ids()
            self._call_marks(marks, message.tool_calls, learned)
            self.add(marks.calls_end, learned=learned)
        self.add(tokenizer.eos_id, learned=learned)

    def _call_marks(self, marks: ToolIds, calls: Sequence[ToolCall], learned: bool = False) -> None:
        self.add(marks.calls_begin, learned=learned)
        for call in calls:
            self.add(marks.call_begin, call.name, marks.separator, learned=learned)
            self.add(call.arguments, marks.call_end, learned=learned)

    def _tool_ids(self) -> ToolIds:
        if self._tokenizer.tool_ids is None:
            raise BadInput(
                "the conversation has tools and the vocabulary has no tool tokens",
                "train the tokenizer with tools=True, or leave the tools out",
            )
        return self._tokenizer.tool_ids


def _description(tool: Tool) -> str:
    parameters = json.dumps(tool.parameters, ensure_ascii=False)
    return f"\n### {tool.name}\nDescription: {tool.description}\n\nParameters: {parameters}\n"
