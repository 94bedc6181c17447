"""The tokenizer of a GGUF file: tokens, merges, special tokens and chat templates for llama.cpp."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xushi.base.errors import BadInput
from xushi.base.model_directory import (
    added_tokens,
    begins_with_bos,
    end_token_ids,
    named_tokens,
    read_settings,
    read_templates,
    tokenizer_settings,
)
from xushi.base.published_files import OTHER_TOKENIZER, read_published_json, shown
from xushi.model.config import ModelConfig

if TYPE_CHECKING:
    import gguf

# llama.cpp knows pre-tokenizers only by name. This is DeepSeek-V3's, of V3, R1, V3.1, V3.2 and V4.
PRE_TOKENIZER = "deepseek-v3"
_WORD = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_THEIRS = (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _WORD)
# xushi's differs in two patterns. It takes digits one by one, which changes nothing, since none of
# its merges joins two digits. And it delimits Chinese and Japanese by scripts, not by code points.
_OURS = (r"\p{N}", r"[\p{Han}\p{Hiragana}\p{Katakana}]+", _WORD)
_NOTES: dict[tuple[str, ...], str] = {
    _THEIRS: "the model's own",
    _OURS: "the closest that llama.cpp knows; Japanese with 々 and rare characters may split "
    "differently",
}


def add_tokenizer(
    writer: "gguf.GGUFWriter", config: ModelConfig, directory: Path
) -> dict[str, Any]:
    """Add tokenizer.json, the special tokens and the chat templates under llama.cpp's keys.

    Returns a description: `pre_tokenizer` with a note on it, the names of the `chat_templates`, and
    `end_tokens_left_out`, the ids that end a reply and for which llama.cpp has no key.
    """
    path = directory / "tokenizer.json"
    if not os.path.lexists(path):
        raise BadInput(
            f"{path} does not exist",
            "give a directory with a tokenizer, such as runs/NAME/export/base",
        )
    table = read_published_json(directory, "tokenizer.json")
    patterns, tokens = _add_vocabulary(writer, config, table, path)
    settings = tokenizer_settings(directory)
    named = named_tokens(settings, directory)
    _refuse_other_tokens(table, settings, named, directory)
    # Every training document of xushi's begins with bos, and its engine puts it before a text.
    # llama.cpp does not add a second one if a chat template has written it.
    add_bos = patterns == _OURS or begins_with_bos(table, settings, named.get("bos_token"))
    left_out = _add_special_tokens(writer, directory, tokens, named, add_bos)
    templates = read_templates(directory)
    if templates:
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in templates.items()]
        )
    return {
        "pre_tokenizer": PRE_TOKENIZER,
        "pre_tokenizer_note": _NOTES[patterns],
        "chat_templates": ", ".join(templates) or "none: the directory has none",
        "end_tokens_left_out": left_out,
    }


def _add_vocabulary(
    writer: "gguf.GGUFWriter", config: ModelConfig, table: dict[str, Any], path: Path
) -> tuple[tuple[str, ...], list[str]]:
    """Add tokens and merges; returns the pre-tokenizer's patterns and the tokens."""
    try:
        patterns = _patterns(table)
        tokens, types = _tokens(table, config.vocab_size, path)
        merges = [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in table["model"]["merges"]
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{path} is not of a byte-level BPE tokenizer: {error!r}",
            "use a model with such a tokenizer, as DeepSeek's and xushi's have",
        ) from None
    if patterns not in _NOTES:
        raise BadInput(
            f"{path}: its pre-tokenizer was never compared with one that llama.cpp knows",
            "export a model with DeepSeek-V3's or xushi's tokenizer",
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    return patterns, tokens


def _refuse_other_tokens(
    table: dict[str, Any], settings: dict[str, Any], named: dict[str, str], directory: Path
) -> None:
    """Raise if a file beside tokenizer.json adds a token to it. The ids of such tokens depend on
    the program that adds them.
    """
    known = {each["content"] for each in table["added_tokens"]}
    tables, others = added_tokens(settings, directory)
    for text in (*named.values(), *others, *(each["content"] for each in tables)):
        if text not in known:
            raise BadInput(
                f"{directory / 'tokenizer.json'} lacks the token {shown(text)}, which only a file "
                "beside it has (tokenizer_config.json or special_tokens_map.json)",
                "write the tokenizer again with transformers: "
                f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained(...)",
            )


def _add_special_tokens(
    writer: "gguf.GGUFWriter",
    directory: Path,
    tokens: list[str],
    named: dict[str, str],
    add_bos: bool,
) -> list[int]:
    """Add bos, pad and up to two end tokens; returns the ids of further end tokens."""
    bos, eos, pad = (
        tokens.index(named[key]) if named.get(key) in tokens else None
        for key in ("bos_token", "eos_token", "pad_token")
    )
    stated = read_settings(directory, "config.json")  # the fields of `config` also have defaults
    ends = list(dict.fromkeys([*([] if eos is None else [eos]), *end_token_ids(directory)]))
    for token, add in (
        (stated.get("bos_token_id") if bos is None else bos, writer.add_bos_token_id),
        (ends[0] if ends else None, writer.add_eos_token_id),
        (ends[1] if len(ends) > 1 else None, writer.add_eot_token_id),
        (stated.get("pad_token_id") if pad is None else pad, writer.add_pad_token_id),
    ):
        if token is not None and token >= 0:
            add(token)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(False)
    return ends[2:]


def _patterns(table: dict[str, Any]) -> tuple[str, ...]:
    """The regular expressions by which a text is cut before merging; () where anything else than
    these and the bytes changes the text.
    """
    steps = table["pre_tokenizer"]["pretokenizers"]
    splits = [step for step in steps if step["type"] == "Split"]
    last = steps[-1]
    plain = (
        steps == [*splits, last]
        and last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
        and not last.get("use_regex", True)
        and all(step["behavior"] == "Isolated" and not step["invert"] for step in splits)
        and not (table.get("normalizer") or {}).get("normalizers", table.get("normalizer"))
    )
    if not plain:
        return ()
    # Published files have line ends themselves where others have the escapes for them.
    return tuple(
        step["pattern"]["Regex"].replace("\r", "\\r").replace("\n", "\\n") for step in splits
    )


def _tokens(table: dict[str, Any], size: int, path: Path) -> tuple[list[str], list[int]]:
    """The text and type of each of the `size` token ids. Ids without a token are marked unused."""
    import gguf

    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    entries = [
        (token, index, gguf.TokenType.NORMAL) for token, index in table["model"]["vocab"].items()
    ]
    entries += [
        (
            each["content"],
            each["id"],
            gguf.TokenType.CONTROL if _is_control(each) else gguf.TokenType.USER_DEFINED,
        )
        for each in table["added_tokens"]
    ]
    for token, index, kind in entries:
        if not 0 <= index < size:
            raise BadInput(
                f"{path}: token {token!r} has the id {index}, but config.json's vocab_size is "
                f"{size}",
                OTHER_TOKENIZER,
            )
        tokens[index] = token
        types[index] = int(kind)
    return tokens, types


def _is_control(token: dict[str, Any]) -> bool:
    """Whether llama.cpp must not read a token where a user's text spells it. Like its converter,
    which also takes marks such as <｜User｜> that are not flagged as special.
    """
    text = token["content"]
    marks = (("<｜", "｜>"), ("<|", "|>"))
    return token["special"] or any(text.startswith(a) and text.endswith(b) for a, b in marks)
