"""Byte-level BPE over the `tokenizers` library: train, encode, decode, and save for transformers.

Lossless: decode(encode(text)) == text for every text without lone surrogates. No text can produce a
special token. Not here: the choice of the training text (the caller's), and the form of a
conversation (chat).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from xushi.base.errors import BadInput, XushiError
from xushi.base.files import write_atomic, write_json
from xushi.base.published_files import shown
from xushi.tokenizer.config import SPECIAL_TOKENS, TOOL_TOKENS, smallest_vocabulary
from xushi.tokenizer.template import chat_template
from xushi.tokenizer.unbroken import UnbrokenText
from xushi.tokenizer.vocabulary import Beginning, ToolIds, Vocabulary, token_bytes

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
_CHUNK_CHARACTERS = 1 << 16
# Training takes time in proportion to the square of a pre-token's length (of what the pre-tokenizer
# cuts out), so it learns from blocks of a long one. Encoding has no blocks: other programs do not.
_TRAINING_BLOCKS = r"(?m).{1,256}"  # (?m) is Oniguruma's way to have . match a line feed
_GET_AGAIN = "copy it again, or remove stages/tokenizer.json of its run and run the recipe again"
_BORDER = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?=[ \t])|(?<=[0-9])(?!\Z)")


class TooFewMerges(BadInput):
    """The text does not allow a vocabulary of `wanted`, but one of `reached`."""

    def __init__(self, wanted: int, reached: int) -> None:
        super().__init__(
            f"tokenizer.vocab_size={wanted} is larger than the text allows: it gives {reached}",
            f"set tokenizer.vocab_size to {reached} or less, or add text",
        )
        self.reached = reached


class Tokenizer(Vocabulary):
    """Made by `train` or `load`. Ids from 0 to `vocab_size` - 1: special tokens, the 256 bytes, and
    merges.

    Attributes: `bos_id`, `eos_id`, `pad_id`, `user_id`, `assistant_id`, `think_id`, `end_think_id`,
    `tool_ids` (`ToolIds`, None in a vocabulary without tool tokens), `vocab_size`, `hash` (hex
    SHA-256 of `tokenizer.json`), `byte_lengths` (int64 [V], how many bytes of text a token has; 0
    for special tokens).
    """

    bos_id: int
    think_id: int
    end_think_id: int

    def __init__(self, serialized: str) -> None:
        """Private: `serialized` is the content of a `tokenizer.json` that `train` wrote."""
        from tokenizers import Tokenizer as Backend

        self._serialized = serialized
        self._backend = Backend.from_str(serialized)
        # The library does not save this switch. With it, special tokens spelled in a text are
        # ordinary characters.
        self._backend.encode_special_tokens = True
        special = _special_tokens(self._backend)
        self._names = dict(enumerate(special))
        # A tool token is never hidden.
        self._hidden = frozenset(range(len(SPECIAL_TOKENS)))
        (
            self.bos_id,
            self.eos_id,
            self.pad_id,
            self.user_id,
            self.assistant_id,
            self.think_id,
            self.end_think_id,
        ) = range(len(SPECIAL_TOKENS))
        self.eos_ids = frozenset({self.eos_id})
        tool_ids = range(len(SPECIAL_TOKENS), len(special))
        self.tool_ids = ToolIds(*tool_ids) if tool_ids else None
        self.vocab_size = self._backend.get_vocab_size()
        self.hash = hashlib.sha256(serialized.encode()).hexdigest()
        self._bytes = _token_bytes(self._backend, len(special))
        self.longest_token = max(map(len, self._bytes))
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
        chunks = (part for text in texts for part in _training_chunks(encodable(text)))
        backend = _train(chunks, vocab_size, special)
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
        chunks = [list(_chunks(encodable(text), _CHUNK_CHARACTERS)) for text in texts]
        ordinary = [chunk for parts in chunks for chunk in parts if not _is_long(chunk)]
        encodings = iter(self._backend.encode_batch_fast(ordinary, add_special_tokens=False))
        unbroken = UnbrokenText(
            self._backend, self.byte_lengths, _CHUNK_CHARACTERS, _CHUNK_CHARACTERS // 16
        )
        return [
            [
                token
                for chunk in parts
                for token in (unbroken.encode(chunk) if _is_long(chunk) else next(encodings).ids)
            ]
            for parts in chunks
        ]

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of `text` after bos, with which every training document begins."""
        return [self.bos_id, *self.encode(text)]

    def reply_begins(self, prompt_ids: Sequence[int]) -> Beginning:
        """Reasoning, whatever the reply begins with, unless the prompt has closed it already."""
        borders = {self.assistant_id, self.think_id, self.eos_id}
        for token in reversed(prompt_ids):
            if token == self.end_think_id:
                return "content"
            if token in borders:
                break
        return "reasoning"

    def save(self, directory: Path, chat: bool = True) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer`
        loads; with `chat` they have the chat template, which a model needs that is to converse.

        transformers reads special tokens in plain text unless asked not to:
        `split_special_tokens=True` when encoding a text, `sanitize_control_tokens=True` in
        `apply_chat_template`. Setting the first for good in the config would also take apart the
        tokens that the chat template writes, so it stays off there.
        """
        write_atomic(directory / "tokenizer.json", self._serialized)
        template = {"chat_template": chat_template(self.tool_ids is not None)} if chat else {}
        write_json(
            directory / "tokenizer_config.json",
            {
                **template,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL_TOKENS[0],
                "eos_token": SPECIAL_TOKENS[1],
                "pad_token": SPECIAL_TOKENS[2],
                "add_bos_token": False,
                "add_eos_token": False,
                "clean_up_tokenization_spaces": False,
                "split_special_tokens": False,
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
            raise BadInput(f"{path} is damaged: {shown(str(error))}", _GET_AGAIN) from None


def is_own(table: Mapping[str, Any]) -> bool:
    """Whether the content of a tokenizer.json is of a tokenizer that `Tokenizer.train` made."""
    try:
        names = [token["content"] for token in table["added_tokens"]]
        steps = table["pre_tokenizer"]["pretokenizers"]
        patterns = [step["pattern"]["Regex"] for step in steps[:3]]
    except (AttributeError, KeyError, TypeError):
        return False
    specials = (list(SPECIAL_TOKENS), list(SPECIAL_TOKENS + TOOL_TOKENS))
    return names in specials and patterns == [_DIGIT, _CJK, _WORD]


def _train(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (_DIGIT, _CJK, _WORD)]
    blocks = pre_tokenizers.Split(Regex(_TRAINING_BLOCKS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, blocks, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer=trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, to_bytes])
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
    """The bytes of text of each token: none of the `special` first ones."""
    tokens = [b""] * special + token_bytes(backend)[special:]
    if not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise BadInput("the vocabulary lacks single bytes", "use a tokenizer that xushi trained")
    return tokens


def encodable(text: str) -> str:
    """`text` itself. A lone surrogate is a `XushiError`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(
            f"text has a lone surrogate at character {error.start}, which is not valid Unicode",
            "remove it, or write the character that was meant",
        ) from None
    return text


def _is_long(chunk: str) -> bool:
    """Whether a chunk has a line too long to be encoded whole."""
    return len(chunk) > 2 * _CHUNK_CHARACTERS


def _training_chunks(text: str) -> Iterator[str]:
    """Chunks to learn from; those with a long line are cut anywhere."""
    for chunk in _chunks(text, _CHUNK_CHARACTERS):
        size = _CHUNK_CHARACTERS if _is_long(chunk) else max(1, len(chunk))
        for start in range(0, len(chunk), size):
            yield chunk[start : start + size]


def _chunks(text: str, limit: int) -> Iterator[str]:
    """Cut a long text where the pre-tokenizer always cuts: between a line feed and what is no white
    space, between what is no white space and a space or tab, and behind a digit.
    """
    start = 0
    while border := _BORDER.search(text, start + limit):
        yield text[start : border.end()]
        start = border.end()
    yield text[start:]
