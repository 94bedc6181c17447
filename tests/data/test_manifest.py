"""Missing and damaged JSON files of `xushi.data`."""

from pathlib import Path

import pytest

from xushi.base.errors import XushiError
from xushi.data.manifest import read_manifest


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_damage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.json"
    with pytest.raises(XushiError, match=r"m\.json does not exist"):
        read_manifest(path)
    path.write_bytes(content)
    with pytest.raises(XushiError, match=r"m\.json is damaged"):
        read_manifest(path)
    path.write_bytes(b'{"a": 1}')
    assert read_manifest(path) == {"a": 1}
