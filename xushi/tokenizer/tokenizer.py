"""Byte-level BPE over the `tokenizers` library: train, encode, decode, and save for transformers.

Lossless: decode(encode(text)) == text for every text without lone surrogates. No text can produce a
special token. Not here: the choice of the training text (the caller's), and the form of a
conversation (chat).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from xushi.base.errors import BadInput, XushiError
from xushi.base.files import write_atomic, write_json
from xushi.tokenizer.config import SPECIAL_TOKENS, TOOL_TOKENS, smallest_vocabulary
from xushi.tokenizer.template import chat_template

if TYPE_CHECKING:
    import tokenizers

# Each digit is a token, so that a number of any length is written in one way only. Runs of Chinese
# and Japanese script are separated from Latin text. The rest is as in DeepSeek-V3's tokenizer.json:
# a punctuation mark with the letters after it (`.append`, `_name`), a word with the space before
# it, punctuation with its line ends, line ends, indentation.
_DIGIT = r"\p{N}"
_CJK = r"[\p{Han}\p{Hiragana}\p{Katakana}]+"
_WORD = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)

# The library needs dozens of bytes of memory per byte of a text, so a long text is encoded in
# chunks.
_CHUNK_CHARACTERS = 1 << 20
_GET_AGAIN = "copy it again, or remove stages/tokenizer.json of its run and run the recipe again"
_BORDER = re.compile(r"\n(?=\S)")


class ToolIds(NamedTuple):
    """Ids of the tool tokens, in the order of `TOOL_TOKENS`."""

    calls_begin: int
    calls_end: int
    call_begin: int
    call_end: int
    output_begin: int
    output_end: int
    separator: int


class TooFewMerges(BadInput):
    """The text does not allow a vocabulary of `wanted`, but one of `reached`."""

    def __init__(self, wanted: int, reached: int) -> None:
        super().__init__(
            f"tokenizer.vocab_size={wanted} is larger than the text allows: it gives {reached}",
            f"set tokenizer.vocab_size to {reached} or less, or add text",
        )
        self.reached = reached


class Tokenizer:
    """Made by `train` or `load`. Ids from 0 to `vocab_size` - 1: special tokens, the 256 bytes, and
    merges.

    Attributes: `bos_id`, `eos_id`, `pad_id`, `user_id`, `assistant_id`, `think_id`, `end_think_id`,
    `tool_ids` (`ToolIds`, None in a vocabulary without tool tokens), `vocab_size`, `hash` (hex
    SHA-256 of `tokenizer.json`), `byte_lengths` (int64 [V], how many bytes of text a token has; 0
    for special tokens).
    """

    def __init__(self, serialized: str) -> None:
        """Private: `serialized` is the content of a `tokenizer.json` that `train` wrote."""
        from tokenizers import Tokenizer as Backend

        self._serialized = serialized
        self._backend = Backend.from_str(serialized)
        # The library does not save this switch. With it, special tokens spelled in a text are
        # ordinary characters.
        self._backend.encode_special_tokens = True
        self._special = _special_tokens(self._backend)
        (
            self.bos_id,
            self.eos_id,
            self.pad_id,
            self.user_id,
            self.assistant_id,
            self.think_id,
            self.end_think_id,
        ) = range(len(SPECIAL_TOKENS))
        tool_ids = range(len(SPECIAL_TOKENS), len(self._special))
        self.tool_ids = ToolIds(*tool_ids) if tool_ids else None
        self.vocab_size: int = self._backend.get_vocab_size()
        self.hash = hashlib.sha256(serialized.encode()).hexdigest()
        self._bytes = _token_bytes(self._backend, len(self._special))
        self.byte_lengths: npt.NDArray[np.int64] = np.array(
            [len(b) for b in self._bytes], dtype=np.int64
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, tools: bool = False) -> "Tokenizer":
        """Learn merges from `texts`, deterministically. A merge must occur at least twice.

        With `tools` the vocabulary has the tool tokens. `XushiError` if the vocabulary cannot even
        hold the bytes, or if the text does not allow so many merges.
        """
        special = SPECIAL_TOKENS + TOOL_TOKENS if tools else SPECIAL_TOKENS
        smallest = smallest_vocabulary(tools)
        if vocab_size < smallest:
            raise BadInput(
                f"tokenizer.vocab_size={vocab_size} is less than {smallest}, the 256 bytes and "
                f"{len(special)} special tokens",
                f"set it to {smallest} or more",
            )
        backend = _train(
            (chunk for text in texts for chunk in _chunks(_encodable(text))), vocab_size, special
        )
        reached = backend.get_vocab_size()
        if reached < vocab_size:
            raise TooFewMerges(vocab_size, reached)
        return cls(backend.to_str(pretty=True))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without bos or eos and without special tokens.

        A lone surrogate is a `XushiError`.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on the threads of the library."""
        chunks = [list(_chunks(_encodable(text))) for text in texts]
        encodings = iter(
            self._backend.encode_batch_fast(
                [chunk for parts in chunks for chunk in parts], add_special_tokens=False
            )
        )
        return [[token for _ in parts for token in next(encodings).ids] for parts in chunks]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.spelling(token, skip_special) for token in ids).decode(
            "utf-8", errors="replace"
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes of text of a token; b"" for a special token."""
        return self._bytes[token]

    def is_special(self, token: int) -> bool:
        """Whether a token is special: no text encodes to it."""
        return token < len(self._special)

    def spelling(self, token: int, skip_special: bool = False) -> bytes:
        """The text of a token for a reader: `token_bytes`, or the name of a special token.

        `skip_special` hides the first seven special tokens and never a tool token: a reader should
        see a tool token that is no part of a well-formed call.
        """
        if self.is_special(token) and not (skip_special and token < len(SPECIAL_TOKENS)):
            return self._special[token].encode()
        return self._bytes[token]

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer`
        loads.

        transformers reads special tokens in plain text unless asked not to:
        `split_special_tokens=True` when encoding a text, `sanitize_control_tokens=True` in
        `apply_chat_template`. Setting the first for good in the config would also take apart the
        tokens that the chat template writes, so it stays off there.
        """
        write_atomic(directory / "tokenizer.json", self._serialized)
        write_json(
            directory / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL_TOKENS[0],
                "eos_token": SPECIAL_TOKENS[1],
                "pad_token": SPECIAL_TOKENS[2],
                "add_bos_token": False,
                "add_eos_token": False,
                "clean_up_tokenization_spaces": False,
                "split_special_tokens": False,
                "chat_template": chat_template(self.tool_ids is not None),
            },
        )

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read what `save` wrote; a missing, damaged or foreign file is a `XushiError`."""
        path = directory / "tokenizer.json"
        try:
            serialized = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BadInput(
                f"{path} does not exist",
                "give the directory of a tokenizer, such as runs/demo/tokenizer",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{path} cannot be read: {error}", _GET_AGAIN) from None
        try:
            json.loads(serialized)
            return cls(serialized)
        except XushiError as error:
            raise BadInput(f"{path}: {error.problem}", error.remedy) from None
        except Exception as error:  # the library raises plain Exception for a file it cannot read
            message = " ".join(str(error).split())
            raise BadInput(f"{path} is damaged: {message}", _GET_AGAIN) from None


def _train(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (_DIGIT, _CJK, _WORD)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return backend


def _special_tokens(backend: "tokenizers.Tokenizer") -> tuple[str, ...]:
    """The special tokens in the order of their ids, with or without the tool tokens."""
    added = {
        index: token.content
        for index, token in backend.get_added_tokens_decoder().items()
        if token.special
    }
    for special in (SPECIAL_TOKENS, SPECIAL_TOKENS + TOOL_TOKENS):
        if added == dict(enumerate(special)):
            return special
    raise BadInput("the special tokens are not xushi's", "use a tokenizer that xushi trained")


def _token_bytes(backend: "tokenizers.Tokenizer", special: int) -> list[bytes]:
    """The bytes behind each token. Byte-level BPE writes printable Latin-1 bytes as themselves and
    the other 68 as the characters from U+0100 on, in order (Radford et al. 2019, `bytes_to_unicode`
    of GPT-2's published encoder).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }
    tokens: list[bytes] = [b""] * backend.get_vocab_size()
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index >= special:
            tokens[index] = bytes(table[character] for character in token)
    if not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise BadInput("the vocabulary lacks single bytes", "use a tokenizer that xushi trained")
    return tokens


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(
            f"text has a lone surrogate at character {error.start}, which is not valid Unicode",
            "remove it, or write the character that was meant",
        ) from None
    return text


def _chunks(text: str, limit: int = _CHUNK_CHARACTERS) -> Iterator[str]:
    """Cut a long text where the pre-tokenizer always cuts: after a line feed that no white space
    follows.
    """
    start = 0
    while border := _BORDER.search(text, start + limit):
        yield text[start : border.end()]
        start = border.end()
    yield text[start:]
