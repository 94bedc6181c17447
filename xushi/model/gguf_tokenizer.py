"""The tokenizer of a GGUF file: tokens, merges, special tokens and chat template for llama.cpp."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xushi.base.errors import BadInput
from xushi.base.files import read_json
from xushi.model.config import ModelConfig

if TYPE_CHECKING:
    import gguf

# llama.cpp knows pre-tokenizers only by name. DeepSeek-V3's differs from ours in two patterns. It
# takes up to three digits together, which changes nothing, since none of our merges joins two
# digits. And it delimits Chinese and Japanese by code points instead of scripts.
PRE_TOKENIZER = "deepseek-v3"
_OURS = (r"\p{N}", r"[\p{Han}\p{Hiragana}\p{Katakana}]+")
PRE_TOKENIZER_NOTE = (
    "the closest that llama.cpp knows; Japanese with 々 and rare characters may split differently"
)


def add_tokenizer(writer: "gguf.GGUFWriter", config: ModelConfig, directory: Path) -> None:
    """Add tokenizer.json and the chat template of tokenizer_config.json under llama.cpp's keys."""
    path = directory / "tokenizer.json"
    remedy = "give a directory with an undamaged tokenizer, such as runs/NAME/export/base"
    table = read_json(path, remedy)
    settings = read_json(directory / "tokenizer_config.json", remedy)
    try:
        _check_pre_tokenizer(table["pre_tokenizer"], path)
        tokens, types = _tokens(table, config.vocab_size, path)
        merges = [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in table["model"]["merges"]
        ]
        template = settings.get("chat_template")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{path} or its tokenizer_config.json is not of a byte-level BPE tokenizer: {error!r}",
            "use a tokenizer that xushi trained",
        ) from None
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for token, add in (
        (config.bos_token_id, writer.add_bos_token_id),
        (config.eos_token_id, writer.add_eos_token_id),
        (config.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token[0] if isinstance(token, list) else token)
    # xushi's engine also puts bos before a text, because every training document begins with it.
    # llama.cpp does not add a second one if a chat template has written it.
    writer.add_add_bos_token(config.bos_token_id is not None)
    writer.add_add_eos_token(False)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _check_pre_tokenizer(pre_tokenizer: dict[str, Any], path: Path) -> None:
    """Refuse a pre-tokenizer other than ours: `PRE_TOKENIZER` might split its text differently."""
    patterns = tuple(
        step["pattern"]["Regex"]
        for step in pre_tokenizer["pretokenizers"]
        if step["type"] == "Split"
    )
    if patterns[:2] != _OURS:
        raise BadInput(
            f"{path}: its pre-tokenizer was never compared with llama.cpp's",
            "use a tokenizer that xushi trained",
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
            gguf.TokenType.CONTROL if each["special"] else gguf.TokenType.USER_DEFINED,
        )
        for each in table["added_tokens"]
    ]
    for token, index, kind in entries:
        if not 0 <= index < size:
            raise BadInput(
                f"{path}: token {token!r} has the id {index}, but config.json's vocab_size is "
                f"{size}",
                "the tokenizer does not belong to this model; get both from one place",
            )
        tokens[index] = token
        types[index] = int(kind)
    return tokens, types
