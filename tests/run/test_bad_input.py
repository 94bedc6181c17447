"""What bad input gets: a line that says what and where, a line that says what to do, and nothing
half-written.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from xushi.base.errors import XushiError
from xushi.base.tracking import Tracking
from xushi.engine import LLM, SamplingParams
from xushi.run.own_text import OwnText, own_text_recipe
from xushi.run.place import RunPlace, read_record
from xushi.run.recipe import Recipe, load_recipe
from xushi.train.checkpoint import latest_checkpoint

from .conftest import MINIATURE, ROOT, XUSHI, Chain, xushi, xushi_here


def refused(
    text: str, *arguments: str | Path, command: Callable[..., CompletedProcess[str]] = xushi_here
) -> None:
    """The command says `text` in two lines, without a traceback, and leaves with 2."""
    done = command("run", *arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2, done.stderr


SECOND = [
    "model.model_type='deepseek_v2'",
    "model.topk_method='greedy'",
    "model.norm_topk_prob=false",
    "model.num_nextn_predict_layers=0",
]


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("pretrain.stepz=3", "unknown key pretrain.stepz"),
        ("pretrain.steps='many'", "pretrain.steps"),
        ("pretrain.steps=0", "pretrain.steps: must be at least 1 (got 0)"),
        ("nonsense", "is not of the form key=value"),
        ("pretrain.batch_tokens=1000", "not a multiple of"),
        ("model.num_experts_per_tok=99", "exceeds the experts"),
        ("model.max_position_embeddings=32", "exceeds model.max_position_embeddings"),
        ("pretrain.bias_speed=0.0\npretrain.balance_weight=0.0", "would train unbalanced"),
        (
            "\n".join([*SECOND, "pretrain.balance_weight=0.0"]),
            "pretrain would train the experts of a deepseek_v2",
        ),
        (
            "\n".join([*SECOND, "sft.balance_weight=0.0"]),
            "sft would train the experts of a deepseek_v2 unbalanced",
        ),
        ("pretrain.indexer_warmup_steps=3", "needs a model with indexers"),
        ("stages=['data']", "must name data, tokenizer, pretrain"),
        ("without='sleep'", "not one of this run's stages"),
        ("environment.min_digits=1", "environment.min_digits: must be at least 2 (got 1)"),
        ("data.heldout=0.5", "data.heldout: must be at most 0.08 (got 0.5)"),
        ("tokenizer.vocab_size=100", "tokenizer.vocab_size: must be at least 263 (got 100)"),
        ("sft.thinking_share=2.0", "thinking_share"),
        ("rl.samples=1", "rl.samples: must be at least 2 (got 1)"),
    ],
)
def test_a_wrong_recipe_is_refused(assignment: str, said: str) -> None:
    with pytest.raises(XushiError) as caught:
        load_recipe(MINIATURE, assignment.split("\n"))
    assert said in caught.value.problem
    assert caught.value.remedy and "\n" not in caught.value.problem + caught.value.remedy


def test_balancing_off_is_allowed_when_the_recipe_says_so() -> None:
    recipe = load_recipe(
        MINIATURE,
        [
            "pretrain.bias_speed=0.0",
            "pretrain.balance_weight=0.0",
            "pretrain.allow_unbalanced=true",
        ],
    )
    assert recipe.pretrain.allow_unbalanced


def test_a_mistyped_key_gets_a_suggestion(tmp_path: Path) -> None:
    """In a process of its own, as a user meets it: what leaves `main` reaches the shell."""
    wrong = ("--set", "pretrain.stepz=3", "--out", tmp_path / "run")
    refused("did you mean steps?", MINIATURE, *wrong, command=xushi)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"), [(None, "does not exist"), ("name = ", "is not valid TOML")]
)
def test_a_recipe_file_that_is_none(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_text(content)
    refused(said, path, "--out", tmp_path / "run")


LONG = "x" * 300
VAST = "1" + "0" * 400


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", MINIATURE, "--out", "FILE"], "FILE cannot be written: File exists"),
        (["run", MINIATURE, "--out", "FILE/x/y"], "FILE/x/y cannot be written: Not a directory"),
        (["run", MINIATURE, "--out", LONG], "is too long a name"),
        (["train", LONG * 20, "--dry-run"], "is too long a name"),
        (["run", MINIATURE, "--dry-run", "--set", f"pretrain.steps={VAST}"], "must be at most"),
        (["launch", MINIATURE, "--slurm", "--out", "FILE/x"], "x.sbatch cannot be written"),
        (["launch", MINIATURE, "--slurm", "--nodes", VAST], "'--nodes'"),
        (["launch", MINIATURE, "--slurm", "--processes", "0"], "'--processes'"),
        (["launch", MINIATURE, "--slurm", "--restarts", "-1"], "'--restarts'"),
        (["replay", ".", "--step", VAST], "'--step'"),
        (["replay", LONG, "--step", "1"], "is too long a name"),
        (["chat", LONG], "is too long a name"),
        (["report", LONG], "is too long a name"),
        (["inspect", LONG], "is too long a name"),
        (["bench", "train", "--rounds", VAST], "'--rounds'"),
    ],
)
def test_values_that_no_command_takes(
    arguments: list[str | Path], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lines and exit code 2, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    done = xushi_here(*arguments)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


@pytest.mark.parametrize("rank", ["abc", "-1", "9" * 5000])
def test_a_rank_that_is_none_gets_two_lines_too(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only processes of torchrun but the first leave the second line to that one."""
    monkeypatch.setenv("RANK", rank)
    refused("environment variable RANK=", MINIATURE, "--out", "nowhere")
    assert not Path("nowhere").exists()


def text_recipe(path: Path, *sets: str) -> Recipe:
    asked = OwnText([str(path)], MINIATURE, [], list(sets))
    return own_text_recipe(asked, path.parent / "run", update=False)[0]


def test_text_that_cannot_be_used(tmp_path: Path) -> None:
    """All of it is refused before a run directory is made."""
    with pytest.raises(XushiError, match="no file matches"):
        text_recipe(tmp_path / "no" / "*.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 2000)
    with pytest.raises(XushiError, match=r"latin\.txt"):
        text_recipe(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(XushiError):
        text_recipe(tmp_path / "empty.txt")
    (tmp_path / "short.txt").write_text("the same words again and again\n" * 200)
    with pytest.raises(XushiError, match="vocab"):  # 512 tokens are more than so few words allow
        text_recipe(tmp_path / "short.txt", "tokenizer.vocab_size=512")
    assert not (tmp_path / "run").exists()


def test_directories_that_are_not_this_runs(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("do not touch")
    refused("is not empty and is not a run directory", MINIATURE, "--out", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir() if path.name != ".lock"] == [
        "thesis.doc"
    ]
    refused("was made by another recipe", MINIATURE, "--out", chain.directory, "--set", "seed=1")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "run.json").write_text(json.dumps({"format": 99, "recipe_hash": "", "version": "9.0"}))
    refused("was made by xushi 9.0", MINIATURE, "--out", newer)


def test_a_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = xushi_here("run", MINIATURE, "--out", tmp_path / "run")
    assert done.returncode == 1 and "in use by another xushi run" in done.stderr


def test_damaged_checkpoints(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(chain.directory / "checkpoints" / "rl", copy)
    newest, older = sorted(copy.glob("step-*"), reverse=True)
    with open(newest / "model.safetensors", "r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    found = latest_checkpoint(copy)
    assert found is not None and f"step-{found.step:09d}" == older.name
    assert "is damaged" in capsys.readouterr().err
    (older / "manifest.json").write_text("{")
    with pytest.raises(XushiError, match="no checkpoint"):
        latest_checkpoint(copy)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: the write fails in the middle of a checkpoint."""
    from xushi.base.files import directory_in_place

    with directory_in_place(tmp_path / "step-000000001") as aside:
        (aside / "data").write_bytes(b"whole")
    script = (
        "import resource, signal, sys, pathlib\n"
        "from xushi.base.files import directory_in_place\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"with directory_in_place(pathlib.Path({str(tmp_path / 'step-000000002')!r})) as aside:\n"
        "    (aside / 'data').write_bytes(b'x' * 5000)\n"
    )
    done = subprocess.run([XUSHI[0], "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert (tmp_path / "step-000000001" / "data").read_bytes() == b"whole"


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("mount"), reason="needs to mount a small file system"
)
def test_a_disk_that_fills_up_is_said_plainly(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = xushi("run", MINIATURE, "--out", small / "run", "--set", "pretrain.steps=20")
        assert done.returncode == 1, done.stderr
        assert "no space left" in done.stderr and "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_port_in_use(chain: Chain) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = xushi_here("serve", chain.directory, "--port", port)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert port in done.stderr and len(done.stderr.strip().splitlines()) == 2


def test_a_prompt_longer_than_the_context(chain: Chain) -> None:
    llm = LLM(chain.directory / "export" / "base")
    with pytest.raises(XushiError, match="64"):
        llm.generate("x = 1\n" * 100, SamplingParams(max_tokens=4))


def test_chat_and_report_without_a_run(tmp_path: Path) -> None:
    for verb in ("chat", "serve", "report"):
        done = xushi_here(verb, tmp_path / "nothing")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": 1}'])
def test_a_damaged_record_of_a_stage_is_told(content: str, tmp_path: Path) -> None:
    place = RunPlace(tmp_path, Tracking(None))
    assert read_record(place, "data") is None
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "data.json").write_text(content)
    with pytest.raises(XushiError, match=r"data\.json") as error:
        read_record(place, "data")
    assert "remove it" in error.value.remedy
