"""What a directory in Hugging Face's layout says beside its weights: its name, chat templates, end
tokens and sampling defaults.

Not here: config and weights (model), the vocabulary (tokenizer), rendering a template
(tokenizer.rendering).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xushi.base.config import shorten
from xushi.base.errors import BadInput
from xushi.base.published_files import (
    DAMAGED,
    LARGEST_TEMPLATE,
    checked_file,
    read_published_json,
)

DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"
# Special tokens that transformers knows by name, in the order in which it adds missing ones.
NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# What the table of a token in tokenizer.json or tokenizer_config.json says beside its text.
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def is_model_directory(path: Path) -> bool:
    """Whether `path` holds a model itself, as against a run with exports in it."""
    return (path / "config.json").is_file()


def snapshot_remedy(path: Path) -> str | None:
    """What to do where `path`, which is no model directory, is a download of Hugging Face's cache:
    its newest snapshot is the model. None where it is no such download.
    """
    snapshots = [each for each in (path / "snapshots").glob("*") if is_model_directory(each)]
    if not snapshots:
        return None
    newest = max(snapshots, key=lambda each: each.stat().st_mtime)
    return f"give the directory of a snapshot, such as {newest}"


def model_name(directory: Path) -> str:
    """The name of a model directory: ORG/NAME within Hugging Face's cache, else the last part of
    its path.

    The cache keeps a download as models--ORG--NAME/snapshots/HASH.
    """
    path = Path(os.path.abspath(directory))
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def read_settings(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in file `name` of `directory`; {} if there is no such file."""
    return read_published_json(directory, name) if os.path.lexists(directory / name) else {}


def read_templates(directory: Path) -> dict[str, str]:
    """The chat templates of `directory` by name, from any of the places where they are published.

    As in transformers 5, the files chat_template.jinja and additional_chat_templates/NAME.jinja
    replace what tokenizer_config.json says, which is one template or a list of named ones.
    chat_template.json, which transformers' processors once wrote, counts if there is no other. The
    main template is called "default".
    """
    found = {}
    if os.path.lexists(directory / "chat_template.jinja"):
        file, _ = checked_file(directory, "chat_template.jinja", LARGEST_TEMPLATE)
        found[DEFAULT_TEMPLATE] = read_template(file)
    more = "additional_chat_templates"
    for path in sorted((directory / more).glob("*.jinja")):
        file, _ = checked_file(directory, path.name, LARGEST_TEMPLATE, more)
        found[path.stem] = read_template(file)
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = found or _named(
            read_settings(directory, name).get("chat_template"), directory / name
        )
    return found


def has_chat_template(templates: Mapping[str, str]) -> bool:
    """Whether conversations without tools have a template: the one called "default"."""
    return DEFAULT_TEMPLATE in templates


def read_template(path: Path) -> str:
    """The text of any file with a template. An unreadable one is a `XushiError`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"chat template {path} cannot be read: {error}", "give a text file in UTF-8"
        ) from None


def end_token_ids(directory: Path) -> list[int]:
    """The ids that end a reply: one or several of generation_config.json or, where that names none,
    of config.json, as in transformers.
    """
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_settings(directory, name).get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise BadInput(
                    f"{directory / name}: eos_token_id is {json.dumps(value)}",
                    "give a token id, or a list of them",
                )
            ids.append(token)
        if ids:
            break
    return list(dict.fromkeys(ids))


def tokenizer_settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special_tokens_map.json that older directories have."""
    settings = read_settings(directory, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read_settings(directory, "special_tokens_map.json")
    return settings


def named_tokens(settings: dict[str, Any], directory: Path) -> dict[str, str]:
    """The texts of all `..._token` keys of `tokenizer_settings`: those of `NAMED_TOKENS` first,
    then those that this model alone has, also as a table under extra_special_tokens.
    """
    more = settings.get("extra_special_tokens")
    own = {key: value for key, value in sorted(settings.items()) if key.endswith("_token")}
    given = {key: own.get(key) for key in NAMED_TOKENS} | own
    found = {}
    for key, value in (given | (more if isinstance(more, dict) else {})).items():
        if value is None or isinstance(value, bool):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise BadInput(
                f"{directory / 'tokenizer_config.json'}: {key} is {shorten(value)}",
                "give the text of a token",
            )
        found[key] = text
    return found


def added_tokens(
    settings: dict[str, Any], directory: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """What `tokenizer_settings` adds to tokenizer.json beside the named tokens: the tables of
    added_tokens_decoder in the order of their ids, and the texts of further special tokens.
    """
    listed = settings.get("added_tokens_decoder") or {}
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    try:
        tables = [listed[key] for key in sorted(listed, key=int)]
        texts = [each["content"] if isinstance(each, dict) else each for each in more]
        texts = [] if isinstance(more, dict) else texts  # these are named ones
        contents = [*texts, *(table["content"] for table in tables)]
        flags = [table[key] for table in tables for key in TOKEN_FLAGS if key in table]
    except (LookupError, TypeError, ValueError):
        contents, flags = [None], []
    if (
        not isinstance(more, list | dict)
        or not all(isinstance(text, str) for text in contents)
        or not all(isinstance(flag, bool) for flag in flags)
    ):
        raise BadInput(
            f"{directory / 'tokenizer_config.json'}: its special tokens cannot be read", DAMAGED
        )
    return tables, texts


def begins_with_bos(table: dict[str, Any], settings: dict[str, Any], bos: str | None) -> bool:
    """Whether a text gets the token `bos` in front: add_bos_token in the settings, or the
    post-processor of the tokenizer.json `table`, asks for it.
    """
    return bos is not None and (
        settings.get("add_bos_token") is True or _first_added(table.get("post_processor")) == bos
    )


def _first_added(step: Any) -> str | None:
    """The special token that a post-processor of tokenizer.json puts in front of one text."""
    if not isinstance(step, dict):
        return None
    if step.get("type") == "Sequence":
        firsts = [_first_added(each) for each in step.get("processors") or []]
        return next((first for first in firsts if first is not None), None)
    single = step.get("single")
    first = single[0] if isinstance(single, list) and single else None
    token = first.get("SpecialToken") if isinstance(first, dict) else None
    return token.get("id") if isinstance(token, dict) else None


def sampling_defaults(directory: Path) -> dict[str, Any]:
    """`temperature` and `top_p` of generation_config.json, as far as it has them and asks for
    sampling. As in transformers, without `do_sample: true` it does not.
    """
    table = read_settings(directory, "generation_config.json")
    if table.get("do_sample") is not True:
        return {}
    return {key: table[key] for key in ("temperature", "top_p") if table.get(key) is not None}


def _named(value: Any, path: Path) -> dict[str, str]:
    """The templates of a file's key `chat_template`: one, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    if isinstance(value, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("name"), str)
        and isinstance(each.get("template"), str)
        for each in value
    ):
        return {each["name"]: each["template"] for each in value}
    raise BadInput(
        f"{path}: chat_template is neither a text nor a list of named templates", DAMAGED
    )
