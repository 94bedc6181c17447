"""Bits per byte of text files, against the model's own logits and through the command."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from xushi.base.errors import BadInput
from xushi.engine import LLM
from xushi.evaluate import bits_of_texts, evaluate_texts, texts
from xushi.model import load_pretrained
from xushi.tokenizer import Tokenizer
from xushi.tokenizer.config import SPECIAL_TOKENS
from xushi.tokenizer.published import PublishedTokenizer

from ..miniature import xushi_here

TEXTS = ["12345 and 67", "", "是的, 12\n" * 30]


@pytest.fixture
def base(chain) -> Path:
    return chain.directory / "export" / "base"


def test_each_text_costs_what_the_logits_say(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 16 tokens: each begins anew, and no text sees another."""
    monkeypatch.setattr(texts, "WINDOW", 16)
    model, tokenizer = load_pretrained(base), Tokenizer.load(base)
    found = bits_of_texts(model, tokenizer, TEXTS)
    offset = 0
    for number, text in enumerate(TEXTS):
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        bits, begin = 0.0, 0
        while begin < len(ids) - 1:  # to the next border of the windows
            end = min(begin + 16 - (offset + begin) % 16, len(ids) - 1)
            logits = (
                model(torch.tensor([ids[begin:end]])).logits[0].detach().double().log_softmax(-1)
            )
            wanted = torch.tensor(ids[begin + 1 : end + 1])
            bits -= float(logits[range(end - begin), wanted].sum()) / math.log(2)
            begin = end
        offset += len(ids) - 1
        # Two float32 forms of the same sum of some hundred terms.
        assert found.bits_D[number] == pytest.approx(bits, rel=1e-5, abs=1e-5)
    assert found.bytes_D.tolist() == [len(text.encode()) for text in TEXTS]
    assert found.total == pytest.approx(found.bits_D.sum(), rel=1e-5)


def test_the_command(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[2])
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    done = xushi_here("evaluate", base, tmp_path, "--json")
    figures = json.loads(done.stdout)
    assert figures["documents"] == 1 and figures["bytes"] == len(TEXTS[2].encode())
    assert figures["left_out"] == "1 binary file"
    model, tokenizer = load_pretrained(base), Tokenizer.load(base)
    wanted = bits_of_texts(model, tokenizer, [TEXTS[2]]).total / figures["bytes"]
    assert figures["bits_per_byte"] == pytest.approx(wanted, rel=1e-6)
    assert figures["bits_per_byte_xz"] > 0 and figures["model"] == "base"


def test_the_dtype_is_the_one_asked_for(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[2])
    found = evaluate_texts(base, [str(tmp_path / "a.txt")], torch.bfloat16)["bits_per_byte"]
    size = len(TEXTS[2].encode())
    narrow, wide = (
        bits_of_texts(load_pretrained(base, dtype=dtype), Tokenizer.load(base), [TEXTS[2]]).total
        / size
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert found == pytest.approx(narrow, rel=1e-6) and narrow != pytest.approx(wide, rel=1e-5)


def test_what_cannot_be_evaluated(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing"):
        evaluate_texts(base, [str(tmp_path / "nothing.txt")])
    (tmp_path / "a.txt").write_text("12")
    with pytest.raises(BadInput, match=r"config\.json"):
        evaluate_texts(tmp_path, [str(tmp_path / "a.txt")])


def test_a_run_stands_for_its_base_model(chain, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("12345")
    assert (chain.directory / "export" / "reasoning").is_dir()
    done = xushi_here("evaluate", chain.directory, tmp_path / "a.txt", "--json")
    assert json.loads(done.stdout)["model"] == "base"


def test_no_remedy_speaks_of_a_recipe(base: Path, tmp_path: Path) -> None:
    (tmp_path / "table.jsonl").write_text('{"text": "12"}')
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "a.bin").write_bytes(b"\0")
    for path, problem in (
        ("table.jsonl", "is not read as text: it is a table"),
        ("table", "has no text; left out: 1 binary file"),
        ("gone", "no file matches"),
    ):
        with pytest.raises(BadInput, match=problem) as refused:
            evaluate_texts(base, [str(tmp_path / path)])
        assert refused.value.remedy.startswith("give text files that may be read")


def test_what_a_text_spells_is_its_own(base: Path, tmp_path: Path) -> None:
    """Also where the tokenizer of a published model reads a spelled token as that token."""
    shutil.copytree(base, tmp_path / "model")
    edited = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    # A digit's own step of the pre-tokenizer, spelled otherwise: no longer xushi's own form.
    edited["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[0-9]"
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(edited))
    tokenizer = LLM(tmp_path / "model", slots=1).tokenizer
    spelled = SPECIAL_TOKENS[1]
    assert isinstance(tokenizer, PublishedTokenizer)
    assert set(tokenizer.encode(f"a{spelled}b")) & tokenizer.eos_ids
    found = bits_of_texts(load_pretrained(base), tokenizer, [f"a{spelled}b"])
    own = bits_of_texts(load_pretrained(base), Tokenizer.load(base), [f"a{spelled}b"])
    assert found.total == pytest.approx(own.total, rel=1e-6)


def test_files_without_text(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(BadInput, match="the files have no text"):
        evaluate_texts(base, [str(tmp_path / "a.txt")])
    with pytest.raises(BadInput, match="a PATH is empty"):
        evaluate_texts(base, [""])
    with pytest.raises(BadInput, match="too long a name"):
        evaluate_texts(base, ["a" * 5000])
