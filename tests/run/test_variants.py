"""A newcomer's own text, Chinese included; plans that start nothing; and every control."""

import json
from pathlib import Path
from typing import Any

import pytest

from xushi.run import describe
from xushi.run.recipe import Recipe

from .conftest import MINIATURE, read_results, xushi, xushi_here

POEMS = """床前明月光，疑是地上霜。举头望明月，低头思故乡。
白日依山尽，黄河入海流。欲穷千里目，更上一层楼。
春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。
空山新雨后，天气晚来秋。明月松间照，清泉石上流。竹喧归浣女，莲动下渔舟。随意春芳歇，王孙自可留。
国破山河在，城春草木深。感时花溅泪，恨别鸟惊心。烽火连三月，家书抵万金。白头搔更短，浑欲不胜簪。
千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。
离离原上草，一岁一枯荣。野火烧不尽，春风吹又生。远芳侵古道，晴翠接荒城。又送王孙去，萋萋满别情。
""".splitlines()
SHORT = [
    "--set",
    "pretrain.steps=12",
    "--set",
    "pretrain.checkpoint_every=6",
    "--set",
    "evaluate.tasks=8",
]


def test_chinese_text_trains_exports_and_is_reported(tmp_path: Path) -> None:
    texts = tmp_path / "诗词"
    texts.mkdir()
    for number in range(12):  # every rotation of the lines: enough text, and no two files alike
        lines = [POEMS[(number * 3 + k * (number + 1)) % len(POEMS)] for k in range(20)]
        (texts / f"卷{number}.txt").write_text(f"卷{number}\n" + "\n".join(lines), encoding="utf-8")
    out = tmp_path / "run"
    done = xushi_here(
        "train",
        texts,
        "--recipe",
        MINIATURE,
        "--out",
        out,
        "--set",
        "tokenizer.vocab_size=320",
        *SHORT,
    )
    assert done.returncode == 0, done.stderr
    results = read_results(out)
    assert results["tokenizer.bytes_per_token"] > 1.5
    assert not [key for key in results if key.startswith(("rl.", "sft."))]
    assert (out / "export" / "base" / "model.safetensors").exists() and not (
        out / "export" / "reasoning"
    ).exists()
    assert "明" in json.dumps(json.loads((out / "samples.json").read_text()), ensure_ascii=False)
    assert (
        "reinforcement"
        not in (out / "report.html").read_text(encoding="utf-8").split("<body")[1].lower()
    )


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[dict[str, Any]] = []

    def measured_once(recipe: Recipe) -> dict[str, Any]:
        plans[:] = plans or [describe(recipe)]
        return plans[0]

    monkeypatch.setattr("xushi.run.describe", measured_once)
    done = xushi_here("run", MINIATURE, "--dry-run", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for said in (
        "[pretrain]",
        "model.parameters_total",
        "model.parameters_active",
        "memory.training_bytes",
        "memory.training_bytes_recompute",
        "seconds.step_recompute",
        "memory.whole_bytes",
        "seconds.evaluate",
        "seconds.total",
    ):
        assert said in done.stdout
    assert not (tmp_path / "run").exists()
    plan = json.loads(xushi_here("run", MINIATURE, "--dry-run", "--json").stdout)
    assert plan["seconds.total"] > plan["seconds.rl"] > 0


def test_doctor_speaks_json() -> None:
    findings = json.loads(xushi_here("doctor", "--json").stdout)
    assert {"cpu", "memory"} <= {finding["name"] for finding in findings}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["data", "tokenizer", "pretrain", "sft", "rl"])
def test_every_control_runs(stage: str, tmp_path: Path) -> None:
    done = xushi(
        "run",
        MINIATURE,
        "--without",
        stage,
        "--out",
        tmp_path / "run",
        *SHORT,
        "--set",
        "sft.steps=10",
        "--set",
        "rl.steps=2",
    )
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "run")
    assert results["run.without"] == stage and "evaluate.bits_per_byte" in results
    assert ("rl.greedy_after" in results) == (stage != "rl")
