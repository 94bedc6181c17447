"""The whole chain in miniature, from raw text to a served reasoning model, with thresholds that
fail it.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from xushi.base.tracking import Tracking
from xushi.engine import LLM, SamplingParams
from xushi.model import load_pretrained
from xushi.run.place import RunPlace
from xushi.run.recipe import load_recipe
from xushi.run.stages.control import Control
from xushi.run.stages.sft import SFT

from .conftest import MINIATURE, Chain, read_results, xushi_here

disable_progress_bar()

KEYS = {
    *(f"evaluate.bits_per_byte{name}" for name in ("", "_gzip", "_xz", "_zstd", "_xz_primed")),
    *(
        f"rl.{name}_{when}"
        for name in ("greedy", "avg8", "pass8", "length", "longer_greedy")
        for when in ("before", "after")
    ),
    "rl.forced_before",
    "rl.sft_equal_flops",
    "seconds.total",
    "memory.peak_bytes",
    "data.sha256",
    "run.recipe_hash",
}


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_every_number_is_there(chain: Chain) -> None:
    assert set(chain.results) >= KEYS
    assert chain.results["export.max_logit_difference"] == 0.0


def test_evaluation_shows_how_far_it_is(chain: Chain) -> None:
    """The last line of a stage's progress comes when everything is done, and says so."""
    recipe = load_recipe(MINIATURE, [])
    tasks, samples = recipe.evaluate.tasks, recipe.evaluate.samples
    # Before and after: greedy, sampled, longer ones; then made to think, and the control.
    episodes = 2 * tasks * (1 + samples + 1) + 2 * tasks
    assert re.search(rf"^evaluate +{episodes}/{episodes}  answers  0 s left$", chain.said, re.M)
    assert re.search(r"^evaluate +(\d+)/\1  sequences of held-out text", chain.said, re.M)


def test_pretraining_learnt_the_text(chain: Chain) -> None:
    # An untrained model needs log2(512) bits per token, about 4.6 bits per byte here; one that
    # knows only how often each token occurs about 4.0.
    assert chain.results["evaluate.bits_per_byte"] < 3.4


def test_no_expert_is_dead(chain: Chain) -> None:
    from xushi.base.tracking import Tracking

    store = Tracking(chain.directory / "tracking.sqlite")
    for layer in ("1", "2"):  # the trunk's mixture and the MTP layer's
        assert store.series("pretrain", f"router.{layer}.dead_experts")[-1][1] == 0
        assert store.series("pretrain", f"router.{layer}.max_violation")[-1][1] < 2.5


def test_rewards_elicit_thinking(chain: Chain) -> None:
    results = chain.results
    assert (
        results["rl.greedy_before"] < 0.4
    )  # fine-tuning reproduces the mixture: greedy answers do not think
    assert results["rl.forced_before"] > 0.8  # though the model could
    assert results["rl.greedy_after"] >= 0.95
    assert results["rl.greedy_after_low"] > results["rl.greedy_before_high"]
    assert results["rl.sft_equal_flops"] < 0.5  # and mere further fine-tuning does not do it
    assert results["rl.length_after"] > results["rl.length_before"]
    assert results["rl.max_logprob_difference"] < 1e-4  # sampler and trainer are one model


def test_the_report_is_one_file(chain: Chain) -> None:
    page = (chain.directory / "report.html").read_text(encoding="utf-8")
    assert (
        "虚实" in page
        and "http://" not in page.replace("http://www.w3.org", "")
        and "src=" not in page
    )


@pytest.mark.parametrize("name", ["base", "reasoning"])
def test_transformers_loads_the_export(chain: Chain, name: str) -> None:
    path = chain.directory / "export" / name
    theirs = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits
        got = load_pretrained(path)(tokens).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_transformers_answers_with_the_same_tokens(chain: Chain) -> None:
    path = chain.directory / "export" / "reasoning"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    )
    llm = LLM(path)
    for number in ("123", "998", "407"):
        messages = [{"role": "user", "content": number}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == llm.conversation_ids(messages)
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[
            0, len(ids) :
        ].tolist()
        assert (
            llm.generate([ids], SamplingParams(max_tokens=10, temperature=0.0))[0].token_ids
            == theirs
        )


def test_the_second_start_does_nothing_and_a_run_can_be_moved(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(chain.directory, moved)
    before = hashes(moved / "export")
    again = xushi_here("run", MINIATURE, "--out", moved)
    assert again.returncode == 0, again.stderr
    assert "op forms" not in again.stderr
    monkeypatch.setenv("XUSHI_OPS", "reference")
    again = xushi_here("run", MINIATURE, "--out", moved)
    assert f"began with other op forms ({chain.results['machine.op_forms']})" in again.stderr
    assert again.stderr.count("done before") == 8 and "started" not in again.stderr
    assert hashes(moved / "export") == before
    assert read_results(moved)["rl.greedy_after"] == chain.results["rl.greedy_after"]


@pytest.mark.slow
def test_a_run_whose_tracking_store_is_damaged_goes_on(chain: Chain, tmp_path: Path) -> None:
    """Two lines say to move it away; when that is done, every stage tells again what does not
    depend on the clock.
    """
    copy = tmp_path / "run"
    shutil.copytree(chain.directory, copy)
    store = copy / "tracking.sqlite"
    for stage in ("pretrain", "sft", "rl"):
        (copy / "stages" / f"{stage}.json").unlink()
    store.write_bytes(store.read_bytes()[: store.stat().st_size // 2])
    done = xushi_here("run", MINIATURE, "--out", copy)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: tracking store" in done.stderr and "move it away" in done.stderr, done.stderr
    for path in copy.glob("tracking.sqlite*"):
        path.unlink()
    done = xushi_here("run", MINIATURE, "--out", copy)
    assert done.returncode == 0, done.stderr
    results = read_results(copy)
    for key in ("rl.steps", "rl.answers", "control.steps", "pretrain.tokens", "sft.examples"):
        assert results[key] == chain.results[key], key


def test_no_pickle_anywhere(chain: Chain) -> None:
    for path in chain.directory.rglob("*"):
        if not path.is_file():
            continue
        start = path.read_bytes()[:8]
        assert not start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")), (
            path
        )
        assert path.suffix not in (".pt", ".pth", ".pkl", ".pickle"), path


def test_the_stored_recipe_is_the_whole_recipe(chain: Chain) -> None:
    stored = load_recipe(chain.directory / "recipe.toml", [])
    assert stored == load_recipe(MINIATURE, [])
    assert stored.hash == json.loads((chain.directory / "run.json").read_text())["recipe_hash"]


def test_the_control_trains_on_demonstrations_that_fine_tuning_did_not_see(chain: Chain) -> None:
    recipe = load_recipe(chain.directory / "recipe.toml", [])
    place = RunPlace(chain.directory, Tracking(None))
    first = Control(recipe).data(place).batches(0, 8)
    after = SFT(recipe).data(place).batches(160 * 64, 8)
    assert all(map(torch.equal, first, after))
