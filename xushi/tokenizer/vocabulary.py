"""The tokens of a byte-level BPE tokenizer: their bytes, their names and the roles of the special
ones.

Not here: training (tokenizer), the tokenizers of other publishers (published).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from xushi.base.errors import BadInput

if TYPE_CHECKING:
    import tokenizers

LARGEST_ID = 10_000_000  # a file with a larger one is damaged and must not make us fill the memory


# "either": in the reasoning if the reply's first token opens it, else in the content.
Beginning = Literal["reasoning", "content", "either"]


class ToolIds(NamedTuple):
    """Ids of the tool tokens, in the order of `TOOL_TOKENS`."""

    calls_begin: int
    calls_end: int
    call_begin: int
    call_end: int
    output_begin: int
    output_end: int
    separator: int


class Vocabulary(ABC):
    """What generation needs of a tokenizer, whoever made it.

    Attributes: `bos_id`, `think_id`, `end_think_id` (None where the vocabulary has no such token),
    `eos_ids` (each of them ends a text), `tool_ids` (`ToolIds`, None in a vocabulary without tool
    tokens), `vocab_size` (one more than the largest id), `longest_token` (the most bytes of
    text that become one token).
    """

    bos_id: int | None
    think_id: int | None
    end_think_id: int | None
    eos_ids: frozenset[int]
    tool_ids: ToolIds | None
    vocab_size: int
    longest_token: int
    # Of each id; b"" for tokens that give no text.
    _bytes: Sequence[bytes]
    # Spellings of special tokens, and which of them a reader does not see.
    _names: Mapping[int, str]
    _hidden: frozenset[int]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone."""

    def encode_text(self, text: str) -> list[int]:
        """Ids of `text` with all of it read as ordinary characters."""
        return self.encode(text)

    @abstractmethod
    def prompt_ids(self, text: str) -> list[int]:
        """Ids of `text` as the beginning of what a model continues."""

    @abstractmethod
    def reply_begins(self, prompt_ids: Sequence[int]) -> Beginning:
        """Where the reply to a conversation's prompt begins."""

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.spelling(token, skip_special) for token in ids).decode(
            "utf-8", errors="replace"
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes of text of a token; b"" for a special token, and for an id without a token."""
        return self._bytes[token] if token < len(self._bytes) else b""

    def is_special(self, token: int) -> bool:
        """Whether a token stands for something else than its spelling."""
        return token in self._names

    def spelling(self, token: int, skip_special: bool = False) -> bytes:
        """The text of a token for a reader: `token_bytes`, or the name of a special token.

        `skip_special` hides special tokens but never a tool token: a reader should see a tool token
        that is no part of a well-formed call.
        """
        if token in self._names and not (skip_special and token in self._hidden):
            return self._names[token].encode()
        return self.token_bytes(token)


def token_bytes(backend: "tokenizers.Tokenizer") -> list[bytes]:
    """The bytes behind the name of each token, as the library's byte-level decoder has them.

    Byte-level BPE writes printable Latin-1 bytes as themselves and the other 68 as the characters
    from U+0100 on, in order (Radford et al. 2019, `bytes_to_unicode` of GPT-2's published encoder).
    A name with another character means its own UTF-8 bytes. Ids without a token have b"".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }
    names = backend.get_vocab(with_added_tokens=True)
    largest = max(names.values(), default=-1)
    if largest > LARGEST_ID:
        raise BadInput(f"a token has the id {largest}", "get tokenizer.json again, it is damaged")
    tokens = [b""] * (1 + largest)
    for name, index in names.items():
        try:
            tokens[index] = bytes([table[character] for character in name])
        except KeyError:
            tokens[index] = name.encode()
    return tokens
