"""Which model evaluation asks what: each figure is of the model, the tasks and the kind of answer
that its key names. How answers are sampled and counted is tested in tests/evaluate.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xushi.base.tracking import Tracking
from xushi.evaluate.measure import Sampled
from xushi.run.place import RunPlace
from xushi.run.recipe import load_recipe
from xushi.run.stages import evaluate as module
from xushi.run.stages.evaluate import Evaluate

from .conftest import MINIATURE

SCORED, LONGER = (2, 3), (4, 4)  # the digits of the tasks


def digits(environment: Any) -> tuple[int, int]:
    return environment.config.min_digits, environment.config.max_digits


def greedy(model, tokenizer, environment, config, seed, *, think=False, ended) -> list[Any]:
    ended()
    return [("greedy", model, digits(environment), "made to think" if think else "as it likes")]


def sampled(model, tokenizer, environment, config, seed, ended) -> Any:
    ended()
    return "sampled", model, digits(environment)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Its models are the names of the stages that trained them, its rates what they are of."""
    monkeypatch.setattr(module, "play_greedily", greedy)
    monkeypatch.setattr(module, "play_sampled", sampled)
    monkeypatch.setattr(module, "accuracy", lambda episodes: episodes[0])
    monkeypatch.setattr(module, "shown", lambda episode: episode)
    monkeypatch.setattr(
        module,
        "summarise",
        lambda found: Sampled(("mean", *found), ("any", *found), 7.0, 0.5, 0.25),
    )
    monkeypatch.setattr(Evaluate, "trained_model", lambda self, place, name: name)
    monkeypatch.setattr(RunPlace, "tokenizer", lambda self: None)
    return Evaluate(load_recipe(MINIATURE, ["evaluate.environment.min_digits=2"]))


def test_every_rate_is_of_the_model_and_the_tasks_that_it_names(
    stage: Evaluate, tmp_path: Path
) -> None:
    samples: dict[str, Any] = {}
    ended: list[None] = []
    place = RunPlace(tmp_path, Tracking(None))
    figures = stage._answers(place, samples, lambda: ended.append(None))
    assert len(ended) == 2 * 3 + 2  # each measurement is told of
    wanted = {}
    for when, model in (("before", "sft"), ("after", "rl")):
        wanted[f"greedy_{when}"] = ("greedy", model, SCORED, "as it likes")
        wanted[f"avg8_{when}"] = ("mean", "sampled", model, SCORED)
        wanted[f"pass8_{when}"] = ("any", "sampled", model, SCORED)
        wanted[f"longer_greedy_{when}"] = ("greedy", model, LONGER, "as it likes")
        assert samples[when] == [wanted[f"greedy_{when}"]]
    wanted["forced_before"] = ("greedy", "sft", SCORED, "made to think")
    wanted["sft_equal_flops"] = ("greedy", "control", SCORED, "as it likes")
    assert figures.rates == wanted
    assert figures.means == {
        f"{name}_{when}": value
        for when in ("before", "after")
        for name, value in (("length", 7.0), ("thinking", 0.5), ("verifier_errors", 0.25))
    }
    assert figures.tasks_are == "numbers of 2 to 3 digits"
    assert figures.longer_tasks_are == "numbers of 4 digits" and figures.tasks == 100


def test_bits_are_the_pretrained_models_beside_each_compressors(
    stage: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def bits(model: Any, tokens: Path, rows: int, progress: Callable[[int], None]) -> Any:
        asked.append(model)
        progress(5)
        return SimpleNamespace(total=6.0, write=lambda path: asked.append(path.name))

    packed = SimpleNamespace(packed=SimpleNamespace(sequences=5))
    monkeypatch.setattr(module, "HeldoutText", SimpleNamespace(open=lambda tokens: packed))
    monkeypatch.setattr(module, "heldout_bytes", lambda corpus: b"abc")
    monkeypatch.setattr(module, "training_texts", lambda corpus: ["what ", "was read"])
    monkeypatch.setattr(module, "bits_by_document", bits)
    values = {"gzip": 8.0, "xz": 4.0, "zstd": 5.0}
    monkeypatch.setattr(module, "by_all_methods", lambda text: values)
    monkeypatch.setattr(
        module,
        "xz_primed",
        lambda training, text: SimpleNamespace(
            bits_per_byte=3.0, training_bytes_used=len(training)
        ),
    )
    found = stage._bits(RunPlace(tmp_path, Tracking(None)))
    assert asked == ["pretrain", "heldout_bits.parquet"]
    assert found.flat() == {
        "bits_per_byte": 2.0,
        "bits_per_byte_gzip": 8.0,
        "bits_per_byte_xz": 4.0,
        "bits_per_byte_zstd": 5.0,
        "bits_per_byte_xz_primed": 3.0,
        "xz_primed_training_bytes": 13,
        "ratio_to_xz": 0.5,
    }
