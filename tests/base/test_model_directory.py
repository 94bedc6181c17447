"""What a model directory says beside its weights."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from xushi.base.errors import BadInput
from xushi.base.model_directory import (
    begins_with_bos,
    end_token_ids,
    model_name,
    named_tokens,
    read_templates,
    sampling_defaults,
    snapshot_remedy,
    tokenizer_settings,
)
from xushi.base.published_files import LARGEST_JSON, LARGEST_TEMPLATE


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")


NAMED = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "list tools"}]
PLACES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "nothing": ({}, {}),
    "no key": ({"tokenizer_config.json": {"eos_token": "x"}}, {}),
    "null": ({"tokenizer_config.json": {"chat_template": None}}, {}),
    "config": ({"tokenizer_config.json": {"chat_template": "config"}}, {"default": "config"}),
    "list": (
        {"tokenizer_config.json": {"chat_template": NAMED}},
        {"default": "list", "tool_use": "list tools"},
    ),
    "file": ({"chat_template.jinja": "file\r\n"}, {"default": "file\n"}),
    "json": ({"chat_template.json": {"chat_template": "json"}}, {"default": "json"}),
    "additional": (
        {"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "rag"},
        {"default": "file", "rag": "rag"},
    ),
    "file before config": (
        {"chat_template.jinja": "file", "tokenizer_config.json": {"chat_template": NAMED}},
        {"default": "file"},
    ),
    "additional before config": (
        {
            "additional_chat_templates/tool_use.jinja": "t",
            "tokenizer_config.json": {"chat_template": "config"},
        },
        {"tool_use": "t"},
    ),
    "config before json": (
        {
            "chat_template.json": {"chat_template": "json"},
            "tokenizer_config.json": {"chat_template": "config"},
        },
        {"default": "config"},
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_templates_are_found_in_every_place(place: str, tmp_path: Path) -> None:
    files, wanted = PLACES[place]
    for name, content in files.items():
        put(tmp_path / name, content)
    assert read_templates(tmp_path) == wanted


@pytest.mark.parametrize("value", [7, ["text"], [{"name": "default"}], {"default": "text"}])
def test_another_form_of_template_is_refused(value: Any, tmp_path: Path) -> None:
    put(tmp_path / "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(BadInput, match="neither a text nor a list"):
        read_templates(tmp_path)


def test_a_template_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=r"chat_template\.jinja cannot be read"):
        read_templates(tmp_path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("some/DeepSeek-V2-Lite", "DeepSeek-V2-Lite"),
        ("hub/models--deepseek-ai--DeepSeek-V3/snapshots/0a1b", "deepseek-ai/DeepSeek-V3"),
        ("hub/models--gpt2/snapshots/0a1b", "gpt2"),
        ("hub/models--a--b/other/0a1b", "0a1b"),
        ("hub/other--a--b/snapshots/0a1b", "0a1b"),
    ],
)
def test_names(path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / path
    directory.mkdir(parents=True)
    assert model_name(directory) == name
    monkeypatch.chdir(directory)
    assert model_name(Path(".")) == name


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    assert end_token_ids(tmp_path) == []
    put(tmp_path / "config.json", {"eos_token_id": 1})
    assert end_token_ids(tmp_path) == [1]
    put(tmp_path / "generation_config.json", {"eos_token_id": [7, 1, 0]})
    assert end_token_ids(tmp_path) == [7, 1, 0]
    put(tmp_path / "generation_config.json", {"eos_token_id": 7})
    assert end_token_ids(tmp_path) == [7]  # config.json's may be its class's default
    put(tmp_path / "generation_config.json", {"eos_token_id": None})
    assert end_token_ids(tmp_path) == [1]
    put(tmp_path / "config.json", {"eos_token_id": None})
    put(tmp_path / "generation_config.json", {"eos_token_id": 3})
    assert end_token_ids(tmp_path) == [3]


@pytest.mark.parametrize("value", ["1", True, [1, None, 2.0], -1, {"a": 1}])
def test_other_end_tokens_are_refused(value: Any, tmp_path: Path) -> None:
    put(tmp_path / "generation_config.json", {"eos_token_id": value})
    with pytest.raises(BadInput, match="eos_token_id"):
        end_token_ids(tmp_path)


def test_named_tokens_and_the_older_file(tmp_path: Path) -> None:
    put(
        tmp_path / "tokenizer_config.json",
        {
            "eos_token": {"content": "</s>", "lstrip": False},
            "bos_token": "<s>",
            "unk_token": None,
            "add_bos_token": True,
            "image_token": "<i>",
        },
    )
    put(tmp_path / "special_tokens_map.json", {"eos_token": "<end>"})
    found = named_tokens(tokenizer_settings(tmp_path), tmp_path)
    assert found == {"bos_token": "<s>", "eos_token": "<end>", "image_token": "<i>"}
    assert list(found)[:2] == ["bos_token", "eos_token"]
    put(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {}, "eos_token": "</s>"})
    assert named_tokens(tokenizer_settings(tmp_path), tmp_path) == {"eos_token": "</s>"}
    with pytest.raises(BadInput, match="eos_token is 3"):
        named_tokens({"eos_token": 3}, tmp_path)


def test_what_puts_bos_before_a_text() -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
    }
    at_the_end = {"type": "TemplateProcessing", "single": template["single"][::-1]}
    byte_level = {"type": "ByteLevel"}
    both = {"type": "Sequence", "processors": [byte_level, template]}
    for step, wanted in [
        (template, True),
        (both, True),
        (byte_level, False),
        (at_the_end, False),
        (None, False),
    ]:
        table = {"post_processor": step}
        assert begins_with_bos(table, {}, "<s>") is wanted
        assert begins_with_bos(table, {"add_bos_token": False}, "<s>") is wanted
        assert begins_with_bos(table, {"add_bos_token": True}, "<s>")
        assert not begins_with_bos(table, {"add_bos_token": True}, None)
    assert not begins_with_bos({"post_processor": template}, {}, "<other>")


def test_a_download_in_the_cache_names_its_newest_snapshot(tmp_path: Path) -> None:
    assert snapshot_remedy(tmp_path) is None
    (tmp_path / "snapshots" / "zz").mkdir(parents=True)  # a download that has not begun
    assert snapshot_remedy(tmp_path) is None
    for age, name in enumerate(("0b", "0a", "0c")):
        directory = tmp_path / "snapshots" / name
        directory.mkdir()
        put(directory / "config.json", {})
        os.utime(directory, (age % 2, age % 2))
    told = f"give the directory of a snapshot, such as {tmp_path / 'snapshots' / '0a'}"
    assert snapshot_remedy(tmp_path) == told


def test_sampling_defaults(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}
    asks = {"do_sample": True, "temperature": 0.3, "top_p": None, "top_k": 5}
    put(tmp_path / "generation_config.json", asks)
    assert sampling_defaults(tmp_path) == {"temperature": 0.3}
    put(tmp_path / "generation_config.json", {"do_sample": True, "temperature": 1, "top_p": 0.9})
    assert sampling_defaults(tmp_path) == {"temperature": 1, "top_p": 0.9}
    for asked in ({"do_sample": False}, {"do_sample": None}, {}):
        put(tmp_path / "generation_config.json", {**asked, "temperature": 0.3})
        assert sampling_defaults(tmp_path) == {}


READ: dict[str, Any] = {
    "chat_template.jinja": read_templates,
    "additional_chat_templates/default.jinja": read_templates,
    "tokenizer_config.json": tokenizer_settings,
    "special_tokens_map.json": tokenizer_settings,
    "generation_config.json": end_token_ids,
    "config.json": end_token_ids,
}


@pytest.mark.parametrize("name", READ)
def test_no_file_of_a_directory_is_a_link_out_of_it(name: str, tmp_path: Path) -> None:
    put(tmp_path / "secret", '{"chat_template": "secret"}')
    directory = tmp_path / "model"
    file = directory / name
    file.parent.mkdir(parents=True)
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="a link that leads out of its directory"):
        READ[name](directory)
    file.unlink()
    file.symlink_to("gone")
    with pytest.raises(BadInput, match="does not exist"):
        READ[name](directory)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(BadInput, match="it is not a file"):
        READ[name](directory)
    file.unlink()
    limit = LARGEST_TEMPLATE if name.endswith("jinja") else LARGEST_JSON
    with open(file, "wb") as stream:
        stream.truncate(limit + 1)
    with pytest.raises(BadInput, match=f"the limit is {limit}"):
        READ[name](directory)


def test_a_folder_of_templates_is_no_link_out_either(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "default.jinja", "secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="a link that leads out"):
        read_templates(tmp_path / "model")


def test_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "0a1b"
    put(model / "blobs" / "1", "text")
    put(model / "blobs" / "2", {"eos_token_id": 5})
    for name, blob in (
        ("chat_template.jinja", "1"),
        ("additional_chat_templates/tool_use.jinja", "1"),
        ("generation_config.json", "2"),
    ):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(model / "blobs" / blob)
    assert read_templates(snapshot) == {"default": "text", "tool_use": "text"}
    assert end_token_ids(snapshot) == [5]
