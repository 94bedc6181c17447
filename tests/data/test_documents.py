"""Documents: uids, languages, and that what is read from shards is what was written."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xushi.base.errors import XushiError
from xushi.data import documents as module
from xushi.data import make_document, read_documents
from xushi.data.documents import language, write_documents


def test_uid_depends_on_source_content_and_place() -> None:
    one = make_document("s", "text", {"path": "a"})
    assert len(one.uid) == 16 and one.uid == make_document("s", "text", {"path": "a"}).uid
    others = [
        make_document("t", "text", {"path": "a"}),
        make_document("s", "texts", {"path": "a"}),
        make_document("s", "text", {"path": "b"}),
        make_document("s", "text", {"path": "a", "line": 1}),
    ]
    assert len({one.uid, *(other.uid for other in others)}) == 5


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("a.py", "天地", "python"),
        ("a.txt", "hello", "und"),
        ("a.txt", "天地玄黄，宇宙洪荒。ab", "zh"),
        ("a.txt", "naïve café 天", "und"),
        ("a.txt", "", "und"),
        ("a.txt", "ひらがなとカタカナ", "und"),
    ],
)
def test_language(path: str, text: str, expected: str) -> None:
    assert language(path, text) == expected


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=10))
def test_shards_keep_documents_and_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    documents = [
        make_document("s", text, {"path": f"路 {i}", "line": i}) for i, text in enumerate(texts)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROW_GROUP_BYTES", 20)
        patch.setattr(module, "_SHARD_BYTES", 50)
        write_documents(directory, "train", iter(documents))
    assert list(read_documents(directory, "train")) == documents


def test_missing_and_damaged_shards(tmp_path: Path) -> None:
    with pytest.raises(XushiError, match="has no train documents"):
        list(read_documents(tmp_path, "train"))
    write_documents(tmp_path, "train", [make_document("s", "text", {"path": "a"})])
    shard = tmp_path / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(XushiError, match=r"train-00000\.parquet is damaged"):
        list(read_documents(tmp_path, "train"))
