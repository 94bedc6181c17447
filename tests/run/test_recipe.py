"""A recipe is read, overridden, written down and read again, and is the same all the way."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from xushi.base.config import read_toml
from xushi.base.errors import BadInput, XushiError
from xushi.base.messages import Message
from xushi.envs import DigitSum
from xushi.run.recipe import Recipe, load_recipe
from xushi.run.stages import RECIPE_STAGES
from xushi.run.stages.lengths import fewest_tokens
from xushi.tokenizer import Tokenizer, chat_examples

ROOT = Path(__file__).parent.parent.parent
MINIATURE = ROOT / "tests" / "miniature.toml"
RECIPES = [MINIATURE, *sorted((ROOT / "recipes").glob("*.toml"))]
TEXT_STAGES = ["data", "tokenizer", "pretrain"]


def read_again(recipe: Recipe, directory: Path) -> Recipe:
    path = directory / "again.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    return load_recipe(path, [])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_written_down_reads_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, [])
    again = read_again(recipe, tmp_path)
    assert again == recipe and again.hash == recipe.hash
    assert again.to_toml() == recipe.to_toml()


ASSIGNMENTS = st.fixed_dictionaries({}, optional={
    "name": st.from_regex(r"[a-z][a-z0-9_.-]{0,8}", fullmatch=True).map(lambda name: f"'{name}'"),
    "seed": st.integers(-2**40, 2**40),
    "threads": st.integers(1, 64),
    "stages": st.integers(3, 5).map(lambda n: list(RECIPE_STAGES[:n])),
    "without": st.sampled_from(RECIPE_STAGES[:3]).map(lambda stage: f"'{stage}'"),
    "data.salt": st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="'\\\"")).map(
        lambda s: f"'{s}'"
    ),
    "tokenizer.vocab_size": st.integers(263, 1 << 20),
    "model.q_lora_rank": st.sampled_from([0, 16]),
    "model.tie_word_embeddings": st.sampled_from(["true", "false"]),
    "model.rope_scaling": st.just("{factor = 4, original_max_position_embeddings = 64}"),
    "pretrain.learning_rate": st.floats(1e-12, 1e3),
    "pretrain.adamw_learning_rate": st.floats(1e-12, 1e3),
    "pretrain.optimizer": st.sampled_from(["'muon'", "adamw"]),
    "sft.thinking_share": st.floats(0, 1),
    "environment.transcript_weight": st.floats(1e-6, 1e6),
    "evaluate.xz_primed": st.sampled_from(["true", "false"]),
})  # fmt: skip


@given(ASSIGNMENTS)
def test_any_recipe_written_down_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, object]
) -> None:
    recipe = load_recipe(MINIATURE, [f"{key}={value}" for key, value in chosen.items()])
    again = read_again(recipe, tmp_path_factory.getbasetemp())
    assert again == recipe and again.hash == recipe.hash


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("seed=7", lambda recipe: recipe.seed == 7),
        ("name=other", lambda recipe: recipe.name == "other"),  # no quotes: a text nevertheless
        ("pretrain.learning_rate=1", lambda recipe: recipe.pretrain.learning_rate == 1.0),
        ("rl.clip_high=0.5", lambda recipe: recipe.rl is not None and recipe.rl.clip_high == 0.5),
        ("stages=['data', 'tokenizer', 'pretrain']", lambda recipe: recipe.stages == TEXT_STAGES),
        (
            "data.sources=[{name = 'a', kind = 'jsonl', glob = '*.jsonl', field = 'body', exclude "
            "= ['x']}]",
            lambda recipe: (
                [(s.name, s.field, s.exclude) for s in recipe.data.sources]
                == [("a", "body", ["x"])]
            ),
        ),
        (
            "model.rope_scaling={factor = 2, original_max_position_embeddings = 32}",
            lambda recipe: (
                recipe.model.rope_scaling is not None and recipe.model.rope_scaling.factor == 2.0
            ),
        ),
        ("model.q_lora_rank=0", lambda recipe: recipe.model.q_lora_rank is None),
    ],
)
def test_set_overrides_any_key(assignment: str, read) -> None:
    before, after = load_recipe(MINIATURE, []), load_recipe(MINIATURE, [assignment])
    assert not read(before) and read(after)
    assert after.hash != before.hash


def test_the_last_set_wins_and_dots_reach_tables_that_are_not_there(tmp_path: Path) -> None:
    assert load_recipe(MINIATURE, ["seed=1", "seed=2"]).seed == 2
    table = read_toml(MINIATURE)
    del table["evaluate"]
    path = tmp_path / "short.toml"
    path.write_text(tomli_w.dumps(table))
    short = load_recipe(path, ["evaluate.tasks=9", "evaluate.longer.max_digits=4"])
    assert short.evaluate.tasks == 9 and short.evaluate.longer == {"max_digits": 4}


def test_the_hash_is_of_what_the_recipe_says_and_not_of_how_it_is_written(tmp_path: Path) -> None:
    table = read_toml(MINIATURE)
    path = tmp_path / "turned.toml"
    path.write_text("# another order\n" + tomli_w.dumps(dict(reversed(table.items()))))
    expected = load_recipe(MINIATURE, []).hash
    assert load_recipe(path, []).hash == expected
    spelled_out = load_recipe(MINIATURE, ["rl.clip_low=0.2"])  # the default
    assert spelled_out.hash == expected


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("pretrain.stepz=3", "unknown key pretrain.stepz"),
        (
            "data.sources=[{name = 'a', kind = 'text', globb = 'x'}]",
            "unknown key data.sources.0.globb",
        ),
        ("pretrain=3", "pretrain: must be a table (got 3)"),
        ("pretrain.steps=2.5", "pretrain.steps: must be a whole number (got 2.5)"),
        ("pretrain.steps=true", "pretrain.steps: must be a whole number (got True)"),
        ("pretrain.allow_unbalanced=1", "pretrain.allow_unbalanced: must be true or false (got 1)"),
        ("data.sources='notes'", "data.sources: must be a list"),
        ("model.vocab_size=4096", "it follows from the tokenizer"),
        ("model.eos_token_id=1", "it follows from the tokenizer"),
        ("name='a/b'", "cannot name a directory"),
        ("name='..'", "cannot name a directory"),
        ("name=''", "cannot name a directory"),
        ("threads=0", "threads: must be at least 1 (got 0)"),
        # Numbers that are too large for anything are refused here, not after an hour of counting.
        ("threads=1_000_000_000_000", "threads: must be at most 10000 (got 1000000000000)"),
        ("pretrain.steps=1_000_000_000_000_000_000", "pretrain.steps: must be at most 100000000"),
        ("pretrain.steps=0x" + "f" * 5000, "pretrain.steps: must be at most"),
        ("pretrain.learning_rate=0x" + "f" * 5000, "pretrain.learning_rate: must be a number"),
        ("pretrain.learning_rate=inf", "pretrain.learning_rate: must be a finite number (got inf)"),
        ("pretrain.learning_rate=nan", "pretrain.learning_rate: must be a finite number (got nan)"),
        ("rl.temperature=1e-300", "rl.temperature: must be at least 0.01 (got 1e-300)"),
        ("name='" + "a" * 300 + "'", "name: must have at most 100 characters"),
        ("pretrain.optimizer='sgd'", "pretrain.optimizer: must be 'muon' or 'adamw' (got 'sgd')"),
        ("'a\\nb'=3", "unknown key"),
        (
            "environment.max_digits=40",
            "takes 87 tokens, more than model.max_position_embeddings=64",
        ),
        ("evaluate.longer.max_digits=29", "takes 65 tokens, more than"),
        ("environment.kind=chess", "there is no environment 'chess'"),
        ("environment.kind=3", "key environment.kind is missing"),
        ("environment.max_digit=4", "unknown key environment.max_digit"),
        ("environment.max_digits=1", "environment.max_digits: must be at least 2"),
        ("evaluate.longer.max_digit=4", "evaluate.longer.max_digit is no key of the environment"),
        ("evaluate.environment.max_digits=1", "evaluate.environment.max_digits"),
        ("environment.code=x", "unknown key environment.code"),
        ("stages=['data', 'tokenizer', 'pretrain', 'rl']", "needs stage sft"),
    ],
)
def test_what_a_recipe_may_not_say(assignment: str, said: str) -> None:
    with pytest.raises(XushiError) as caught:
        load_recipe(MINIATURE, [assignment])
    assert said in caught.value.problem and caught.value.exit_code == 2
    assert "\n" not in caught.value.problem + caught.value.remedy
    assert len(caught.value.problem) < 400


def bounds_of(config: type[BaseModel], path: str = "") -> Iterator[tuple[str, type, set[str]]]:
    """(key, type, names of its bounds) of every field of a config and of the configs inside it."""
    for name, field in config.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        kinds |= {inner for kind in kinds for inner in get_args(kind)}
        limits = {limit for part in field.metadata for limit in ("ge", "gt", "le", "lt", "max_length")
                  if hasattr(part, limit)}  # fmt: skip
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from bounds_of(kind, f"{path}{name}.")
            elif kind in (int, float):
                yield path + name, kind, limits
            elif get_origin(kind) is list:
                yield path + name, list, limits


def test_every_number_of_a_recipe_is_bounded_where_it_is_declared() -> None:
    found = list(bounds_of(type(load_recipe(MINIATURE, []))))
    assert len(found) > 100 and sum(kind is list for _, kind, _ in found) >= 6
    for key, kind, limits in found:
        if key == "model.compress_ratios":
            assert "max_length" in limits  # its numbers are checked against the two rates
        elif key == "model.eos_token_id":  # a number or a list: each has its own bounds
            for wrong in ("-1", "10_000_001", "[]", "[-1]"):
                with pytest.raises(BadInput, match="eos_token_id"):
                    load_recipe(MINIATURE, [f"{key}={wrong}"])
        elif kind is list:
            assert "max_length" in limits, key
        else:
            assert limits & {"ge", "gt"} and limits & {"le", "lt"}, key


def test_the_largest_numbers_are_counted_at_once() -> None:
    most = ["pretrain.steps=100_000_000", "pretrain.batch_tokens=1_000_000_000_000"]
    pretrain = load_recipe(MINIATURE, most).pretrain
    assert pretrain.tokens(64) == 10**20
    growing = pretrain.model_copy(update={"steps": 7, "batch_tokens": 640,
                                          "batch_tokens_first": 128, "batch_ramp_steps": 5})  # fmt: skip
    assert growing.tokens(64) == 64 * sum(growing.rows_at(step, 64) for step in range(7))


def test_a_stage_needs_its_table(tmp_path: Path) -> None:
    table = read_toml(MINIATURE)
    del table["sft"]
    path = tmp_path / "short.toml"
    path.write_text(tomli_w.dumps(table))
    with pytest.raises(XushiError, match=r"stage sft needs the tables \[sft\] and \[environment\]"):
        load_recipe(path, [])


def test_the_length_of_a_worked_answer_is_counted_right() -> None:
    """Exactly where every character is a digit; never more than the tokenizer makes of it."""
    environment = DigitSum(DigitSum.Config(min_digits=9, max_digits=9))
    episode = environment.demonstration("train", 0, 1.0)
    tokenizer = Tokenizer.train(["0"], 263)
    [(ids, _)] = chat_examples(tokenizer, episode)
    assert len(ids) == 2 * 9 + 7 == fewest_tokens(episode)
    words = [Message("user", "how many 12 cats?"), Message("assistant", "two, or so", "12 cats")]
    [(ids, _)] = chat_examples(tokenizer, words)
    assert fewest_tokens(words) <= len(ids)
