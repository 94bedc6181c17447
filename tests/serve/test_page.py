import re
import shutil
import subprocess

import pytest


@pytest.fixture(scope="module")
def page(http):
    return http.get("/")


def test_nothing_comes_from_elsewhere(page):
    assert page.status_code == 200
    # The icon's SVG has no namespace either, since that is a URL. The only scheme is data:.
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|<link(?![^>]*href=\"data:)|\bsrc=", page.text
    )
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_no_text_becomes_markup(page):
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|\son\w+=[\"']"
    )
    assert not re.search(ways, page.text)


def test_both_languages_have_the_same_words(page):
    words = re.search(r"const words = \{(.*?)\n\};", page.text, re.DOTALL).group(1)
    english, chinese = words.split("\n  zh:")
    names = [set(re.findall(r"[{,]\s*(\w+): \"", part)) for part in (english, chinese)]
    assert names[0] == names[1]
    assert len(names[0]) > 15


def test_the_script_is_valid(page, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    script = tmp_path / "page.mjs"
    script.write_text(re.search(r"<script>(.*?)</script>", page.text, re.DOTALL).group(1))
    subprocess.run([node, "--check", script], check=True)
