"""The tokenizer of a model directory that somebody else made: `tokenizer.json` with what the files
next to it say, as transformers 5 reads them.

Byte-level BPE only, which all of DeepSeek's models have. Not here: xushi's own (tokenizer), the
form of a conversation (conversation).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xushi.base.config import shorten
from xushi.base.errors import BadInput
from xushi.base.model_directory import (
    TOKEN_FLAGS,
    added_tokens,
    begins_with_bos,
    end_token_ids,
    named_tokens,
    tokenizer_settings,
)
from xushi.base.published_files import DAMAGED, read_published_json, shown
from xushi.tokenizer.config import TOOL_TOKENS
from xushi.tokenizer.tokenizer import encodable, is_own
from xushi.tokenizer.vocabulary import Beginning, ToolIds, Vocabulary, token_bytes

if TYPE_CHECKING:
    import tokenizers

MARKS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
# Files of tokenizers that only their own code or another library reads.
_SLOW = ("tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt", "spiece.model")


class PublishedTokenizer(Vocabulary):
    """The tokenizer of `directory`; `table` is its tokenizer.json. One of another kind is a
    `XushiError`.

    Attributes, besides those of `Vocabulary`: `named` (the special tokens by the names that
    templates know, such as "bos_token"), `begins_with_bos` (whether a text gets bos in front).
    """

    def __init__(self, directory: Path, table: dict[str, Any]) -> None:
        settings = tokenizer_settings(directory)
        self._table = table
        self._backend = _backend(table, directory / "tokenizer.json")
        self._text_backend: tokenizers.Tokenizer | None = None
        self.named = named_tokens(settings, directory)
        _add_tokens(self._backend, settings, list(self.named.values()), directory)
        self._set_roles(directory)
        spelled = token_bytes(self._backend)
        self._bytes = [b"" if i in self._hidden else text for i, text in enumerate(spelled)]
        self.vocab_size = len(spelled)
        self.longest_token = max(map(len, spelled))
        # xushi's own with another template: every training document begins with bos, and no text
        # may become a special token.
        self._own = is_own(table)
        bos = self.named.get("bos_token")
        self.begins_with_bos = self._own or begins_with_bos(table, settings, bos)

    def _set_roles(self, directory: Path) -> None:
        added = self._backend.get_added_tokens_decoder()
        ids = {token.content: index for index, token in added.items()}
        find = self._backend.token_to_id
        bos = self.named.get("bos_token")
        eos = self.named.get("eos_token")
        self.bos_id = find(bos) if bos else None
        ends = end_token_ids(directory)
        named_end = find(eos) if eos else None
        self.eos_ids = frozenset([*ends, *([] if named_end is None else [named_end])])
        self.user_id, self.assistant_id, self.think_id, self.end_think_id = (
            ids.get(mark) for mark in MARKS
        )
        tools = [ids[name] for name in TOOL_TOKENS if name in ids]
        self.tool_ids = ToolIds(*tools) if len(tools) == len(TOOL_TOKENS) else None
        self._names = {index: token.content for index, token in added.items()}
        special = {index for index, token in added.items() if token.special} | self.eos_ids
        self._hidden = frozenset(special - set(self.tool_ids or ()))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without bos or eos; special tokens that it spells are read as such.

        A lone surrogate is a `XushiError`.
        """
        return list(self._backend.encode(encodable(text), add_special_tokens=False).ids)

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` with all of it read as ordinary characters."""
        from tokenizers import Tokenizer as Backend

        if self._text_backend is None:
            plain = self._table | {"added_tokens": [], "post_processor": None}
            self._text_backend = Backend.from_str(json.dumps(plain))
            self._text_backend.no_truncation()
            self._text_backend.no_padding()
        return list(self._text_backend.encode(encodable(text), add_special_tokens=False).ids)

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of `text`, after bos if the directory asks for it: add_bos_token in
        tokenizer_config.json, or the post-processor of tokenizer.json.

        transformers 5 reads only the second; transformers 4 and llama.cpp's converter read both.
        """
        begin = [self.bos_id] if self.bos_id is not None and self.begins_with_bos else []
        return begin + (self.encode_text(text) if self._own else self.encode(text))

    def reply_begins(self, prompt_ids: Sequence[int]) -> Beginning:
        """Where the last message of the prompt has a `<think>` or a `</think>` the later of them
        says it, else the reply's first token.
        """
        borders = {self.user_id, self.assistant_id, *self.eos_ids}
        for token in reversed(prompt_ids):
            if token == self.think_id:
                return "reasoning"
            if token == self.end_think_id:
                return "content"
            if token in borders:
                break
        return "either"

    def control_tokens(self, template: str) -> list[str]:
        """The tokens that a user's text must not form in a conversation: special ones, and those
        that the template writes. Where a normalizer changes a token, its other form is one too.
        """
        found: list[str] = []
        for token in self._backend.get_added_tokens_decoder().values():
            forms = {token.content, self.normalised(token.content)} - {""}
            written = any(form in template and not form.isspace() for form in forms)
            if token.special or written:
                found += sorted(forms)
        return found

    def normalised(self, text: str) -> str:
        """`text` as the tokenizer's normalizer, if it has one, changes it before it is cut."""
        normalizer = self._backend.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(encodable(text)))


def read_tokenizer_file(directory: Path) -> dict[str, Any]:
    """The table in tokenizer.json. A directory that has another kind of tokenizer is a `XushiError`
    that names it.
    """
    path = directory / "tokenizer.json"
    if not os.path.lexists(path):
        slow = [name for name in _SLOW if (directory / name).exists()]
        if slow:
            raise BadInput(
                f"{directory} has no tokenizer.json, only {', '.join(slow)}, whose form is not "
                "implemented",
                "get the tokenizer.json of this model, or make one with transformers: "
                f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained(...)",
            )
        raise BadInput(
            f"{path} does not exist",
            "give a directory with a tokenizer: a downloaded model, or runs/demo/export/base",
        )
    return read_published_json(directory, "tokenizer.json")


def _backend(table: dict[str, Any], path: Path) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Backend

    model = table.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    decoders = _kinds(table.get("decoder"), "decoders")
    if kind != "BPE" or decoders != ["ByteLevel"]:
        raise BadInput(
            f"{path} is not a byte-level BPE tokenizer: its model is {shorten(kind)} and its "
            f"decoder {', '.join(decoders) or 'missing'}",
            "use a model with a byte-level BPE tokenizer, as all of DeepSeek's have",
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a file it cannot read
        raise BadInput(f"{path} is damaged: {shown(str(error))}", DAMAGED) from None
    # The file may have a length to cut or to fill texts to; nobody asks for that here.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _kinds(step: Any, key: str) -> list[str]:
    """The types of a step of tokenizer.json, which may be a sequence of steps."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence":
        inner = step.get(key)
        return [kind for each in inner for kind in _kinds(each, key)] if inner else []
    return [str(step.get("type"))]


def _add_tokens(
    backend: "tokenizers.Tokenizer", settings: dict[str, Any], named: list[str], directory: Path
) -> None:
    """Add the special tokens that tokenizer_config.json has and tokenizer.json lacks, as
    transformers does.
    """
    from tokenizers import AddedToken

    tables, others = added_tokens(settings, directory)
    listed = [
        AddedToken(table["content"], **{key: table[key] for key in TOKEN_FLAGS if key in table})
        for table in tables
    ]
    present = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    new = [token for token in listed if repr(token) not in present]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known |= {token.content for token in new}
    for text in dict.fromkeys([*named, *others]):
        if text not in known:
            new.append(AddedToken(text, special=True))
    for token in new:
        token.special = token.special or token.content in named
    if new:
        backend.add_tokens(new)
