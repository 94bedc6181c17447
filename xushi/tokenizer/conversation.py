"""Opening the tokenizer of any model directory, and the form of its conversations.

A directory of xushi's own has xushi's form (chat), in which no text can become a special token. Any
other has the form of its chat template, and there neither can a message: the special tokens that it
spells are marked before the template is rendered, and encoded as ordinary characters.
"""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput
from xushi.base.messages import Message, Tool
from xushi.base.model_directory import (
    DEFAULT_TEMPLATE,
    TOOL_TEMPLATE,
    has_chat_template,
    read_template,
    read_templates,
)
from xushi.tokenizer.chat import encode_chat
from xushi.tokenizer.marks import END, Marks
from xushi.tokenizer.published import PublishedTokenizer, read_tokenizer_file
from xushi.tokenizer.rendering import ChatTemplate
from xushi.tokenizer.template import chat_template
from xushi.tokenizer.tokenizer import Tokenizer, is_own
from xushi.tokenizer.vocabulary import Vocabulary


class Conversations:
    """How a model directory writes conversations: its tokenizer, and its chat templates if they are
    not xushi's own.

    `tokenizer` is a `Tokenizer` of xushi's or a `PublishedTokenizer`. `can_chat` says whether there
    is any form: a directory without a template called "default" only completes text.
    """

    def __init__(self, directory: Path, template: Path | None = None) -> None:
        """`template` is a file that replaces the directory's own templates. What cannot be read is
        a `XushiError`.
        """
        self._directory = directory
        sources = (
            read_templates(directory)
            if template is None
            else {DEFAULT_TEMPLATE: read_template(template)}
        )
        self.tokenizer: Vocabulary = _open(directory, sources)
        self._templates = {}
        if isinstance(self.tokenizer, PublishedTokenizer):
            where = str(template or directory)
            self._templates = {
                name: ChatTemplate(
                    source, where if name == DEFAULT_TEMPLATE else f"{where}: {name}"
                )
                for name, source in sources.items()
                if name in (DEFAULT_TEMPLATE, TOOL_TEMPLATE)
            }
        self.can_chat = has_chat_template(sources)
        self._others = sorted(sources)

    def ids(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The prompt for the next answer.

        A template that refuses the messages, or that does not write the tools or tool calls, is a
        `XushiError`: a model must not be asked with less than was given.
        """
        self._check()
        if isinstance(self.tokenizer, Tokenizer):
            return encode_chat(self.tokenizer, messages, tools)
        assert isinstance(self.tokenizer, PublishedTokenizer)
        template = self._choose(bool(tools))
        marks = Marks(self.tokenizer, template.source)
        return marks.encode(self._render(template, messages, tools, marks))

    def continued_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that ends inside the last message, of role assistant, which the model goes on
        with: in its content, or in its reasoning if it has no content yet.

        A template that does not write that text is a `XushiError`.
        """
        if not messages or messages[-1].role != "assistant" or messages[-1].tool_calls:
            raise BadInput(
                "the conversation does not end in a message of the assistant without tool calls",
                "end it in one, or ask for the next message",
            )
        self._check()
        last = messages[-1]
        in_reasoning = last.reasoning is not None and not last.content
        if isinstance(self.tokenizer, Tokenizer):
            # The last message ends with </think>, its content and eos.
            ids = encode_chat(self.tokenizer, messages, generation_prompt=False)
            return ids[:-2] if in_reasoning else ids[:-1]
        assert isinstance(self.tokenizer, PublishedTokenizer)
        template = self._choose(False)
        marks = Marks(self.tokenizer, template.source)
        tables = _message_tables(messages, marks)
        for key in ("reasoning_content", "thinking") if in_reasoning else ("content",):
            tables[-1][key] += END
        rendered = template.render(self._variables(tables, None, False))
        begin, mark, _ = rendered.rpartition(END)
        if not mark:
            raise BadInput(
                f"the chat template of {self._directory} does not write the text to go on with",
                "ask for the next message instead",
            )
        return marks.encode(begin)

    def _check(self) -> None:
        if self.can_chat:
            return
        others = f", only some called {', '.join(self._others)}," if self._others else ""
        raise BadInput(
            f"{self._directory} has no chat template for conversations{others} so its model only "
            "completes text",
            "give a template with --template FILE (LLM: template=FILE), or complete text",
        )

    def _choose(self, tools: bool) -> ChatTemplate:
        """The template for conversations with or without tools, as transformers chooses."""
        name = TOOL_TEMPLATE if tools and TOOL_TEMPLATE in self._templates else DEFAULT_TEMPLATE
        return self._templates[name]

    def _render(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        marks: Marks,
    ) -> str:
        names = [call.name for message in messages for call in message.tool_calls]
        names += [tool.name for tool in tools]
        described = _tool_tables(tools, marks)
        lost = []
        # Some templates write tool calls only of messages without content, not of those with "".
        for empty in ("", None):
            tables = _message_tables(messages, marks, empty)
            lost = self._left_out(template, tables, described, names)
            if not lost:
                return template.render(self._variables(tables, described, True))
        raise BadInput(
            f"the chat template of {self._directory} leaves out the tool {lost[0]!r}",
            "leave tools out, or give a template that writes them with --template FILE",
        )

    def _left_out(
        self,
        template: ChatTemplate,
        tables: list[dict[str, Any]],
        described: list[dict[str, Any]] | None,
        names: list[str],
    ) -> list[str]:
        """Those of `names`, of the tool calls and then of the tools, that the template does not
        write. It is rendered with other names, which occur nowhere else.
        """
        if not names:
            return []
        others = [f"f{secrets.token_hex(15)}" for _ in names]
        given = iter(others)

        def rename(each: dict[str, Any]) -> dict[str, Any]:
            return each | {"function": each["function"] | {"name": next(given)}}

        tables = [
            table | {"tool_calls": [rename(call) for call in table["tool_calls"]]}
            if table.get("tool_calls")
            else table
            for table in tables
        ]
        described = [rename(tool) for tool in described or []] or None
        rendered = template.render(self._variables(tables, described, True))
        return [name for name, other in zip(names, others, strict=True) if other not in rendered]

    def _variables(
        self, messages: list[Any], tools: list[Any] | None, generation_prompt: bool
    ) -> dict[str, Any]:
        """What a template can read, as in transformers."""
        assert isinstance(self.tokenizer, PublishedTokenizer)
        return {
            **self.tokenizer.named,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }


def _open(directory: Path, sources: Mapping[str, str]) -> Vocabulary:
    """xushi's own tokenizer if it has xushi's own form of conversations, or none."""
    table = read_tokenizer_file(directory)
    if is_own(table):
        tokenizer = Tokenizer.load(directory)
        own = {DEFAULT_TEMPLATE: chat_template(tokenizer.tool_ids is not None)}
        if not sources or sources == own:
            return tokenizer
    return PublishedTokenizer(directory, table)


def _message_tables(
    messages: Sequence[Message], marks: Marks, empty: str | None = ""
) -> list[dict[str, Any]]:
    """The mappings that templates read, with marks. Reasoning also has another name that some use
    for it, and `empty` is the content of a message that only calls tools.

    What templates compare stays as it is: roles and types.
    """
    tables = []
    for message in messages:
        table = marks.put(message.to_dict()) | {"role": message.role}
        if message.reasoning is not None:
            table["thinking"] = table["reasoning_content"]
        for call in table.get("tool_calls", ()):
            call["type"] = "function"
        if message.tool_calls and not message.content:
            table["content"] = empty
        tables.append(table)
    return tables


def _tool_tables(tools: Sequence[Tool], marks: Marks) -> list[dict[str, Any]] | None:
    """The tools that templates read, with marks; None if there are none."""
    return [marks.put(tool.to_dict()) | {"type": "function"} for tool in tools] or None
