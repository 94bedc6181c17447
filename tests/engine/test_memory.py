"""Which dtype and cache fit the machine, and what is refused before anything is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from xushi.base.errors import BadInput
from xushi.base.machine import inspect
from xushi.engine import LLM, memory
from xushi.engine.memory import default_slots, plan_memory, slot_bytes, weight_bytes
from xushi.model import Deepseek, save_pretrained
from xushi.model.names import stays_float32

from ..published import edit, of_kind, shape, write_tokenizer
from ..tiny import TINY


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets the available memory in bytes, and whether the CPU multiplies bf16."""

    def make(available: int | None, bf16: bool = False) -> None:
        features = frozenset({"avx512_bf16"} if bf16 else ())
        found = replace(
            inspect(), memory_available=available, memory_total=available, features=features
        )
        monkeypatch.setattr(memory, "inspect", lambda: found)

    return make


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    """A function that writes a config.json that names a dtype."""

    def make(**table: Any) -> Path:
        edit(tmp_path / "config.json", **table)
        return tmp_path

    return make


@pytest.mark.parametrize("kind", ["v3", "tied", "v4"])
def test_weights_and_cache_are_counted_to_the_byte(kind: str) -> None:
    config = TINY
    if kind == "tied":
        config = TINY.model_copy(update={"tie_word_embeddings": True})
    if kind == "v4":
        config = of_kind("deepseek_v4")
    for dtype in (torch.float32, torch.bfloat16):
        model = Deepseek(config).initialise(0)
        for name, parameter in model.named_parameters():
            if not stays_float32(name, config):
                parameter.data = parameter.data.to(dtype)
        tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
        assert weight_bytes(config, dtype) == sum(tensors.values())
        cache = memory_of_cache(model, 5)
        assert slot_bytes(config, dtype) * 5 == cache


def memory_of_cache(model: Deepseek, slots: int) -> int:
    from xushi.engine import Engine

    return sum(layer.nbytes for layer in Engine(model, 1, slots)._cache.layers)


@pytest.mark.parametrize(
    ("table", "bf16", "wanted"),
    [
        ({"torch_dtype": "float32"}, True, torch.float32),
        ({"torch_dtype": "bfloat16"}, True, torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, False, torch.float32),
        ({"dtype": "bfloat16"}, True, torch.bfloat16),
        ({"torch_dtype": "float16"}, True, torch.bfloat16),
        ({"torch_dtype": "float32", "quantization_config": {"fmt": "e4m3"}}, True, torch.bfloat16),
        ({}, True, torch.float32),
    ],
)
def test_the_dtype_is_the_stored_one_where_the_processor_has_it(
    table: dict[str, Any], bf16: bool, wanted: torch.dtype, machine: Any, stored: Any
) -> None:
    machine(1 << 40, bf16)
    assert plan_memory(stored(**table), TINY).dtype is wanted


@pytest.mark.parametrize(
    ("table", "bf16", "reason"),
    [
        ({"torch_dtype": "float32"}, True, "as stored"),
        ({"torch_dtype": "bfloat16"}, True, "as stored; this processor multiplies it"),
        ({"torch_dtype": "float16"}, True, "nearest to what is stored; this processor multip"),
        ({"torch_dtype": "bfloat16", "quantization_config": {"fmt": "e4m3"}}, True, "nearest to"),
        ({"torch_dtype": "float64"}, True, "stored as float64"),
        ({}, True, "no dtype is stated"),
        ({"torch_dtype": "bfloat16"}, False, "without instructions for bf16 it is faster"),
    ],
)
def test_the_reason_of_a_dtype_is_true(
    table: dict[str, Any], bf16: bool, reason: str, machine: Any, stored: Any
) -> None:
    machine(1 << 40, bf16)
    assert plan_memory(stored(**table), TINY).reason.startswith(reason)


def test_memory_decides_where_it_is_short(machine: Any, stored: Any) -> None:
    config = shape(max_position_embeddings=4096)
    directory = stored(torch_dtype="float32")
    wide, narrow = torch.float32, torch.bfloat16
    least = weight_bytes(config, wide) + 1024 * slot_bytes(config, wide)

    def available(need: int) -> int:
        return int(need / memory.SHARE) + 1

    machine(available(least))
    plan = plan_memory(directory, config)
    assert (plan.dtype, plan.slots) == (wide, 1024) and "as stored" in str(plan)
    assert plan.weight_bytes + plan.cache_bytes <= least
    machine(available(least - 1000))
    plan = plan_memory(directory, config)
    assert plan.dtype is narrow and plan.slots > 1024 and "does not fit" in str(plan)
    machine(available(weight_bytes(config, narrow) + 1024 * slot_bytes(config, narrow)) - 50)
    with pytest.raises(BadInput, match="does not fit into memory") as caught:
        plan_memory(directory, config)
    assert "--cache-tokens 1023" in caught.value.remedy
    assert plan_memory(directory, config, slots=1023).dtype is narrow
    with pytest.raises(BadInput, match="weights in float32 take") as caught:
        plan_memory(directory, config, wide)
    fewer = int(caught.value.remedy.split()[2])
    assert plan_memory(directory, config, wide, fewer).slots == fewer < 1023
    with pytest.raises(BadInput):
        plan_memory(directory, config, wide, fewer + 1)
    # Only with both changes anything fits.
    machine(available(weight_bytes(config, narrow) + 10 * slot_bytes(config, narrow)))
    with pytest.raises(BadInput, match="weights in float32 take") as caught:
        plan_memory(directory, config, wide)
    assert "--dtype bf16 and --cache-tokens 10 or less" in caught.value.remedy
    assert plan_memory(directory, config, narrow, 10).slots == 10
    machine(available(weight_bytes(config, narrow)))
    with pytest.raises(BadInput, match="does not fit into memory") as caught:
        plan_memory(directory, config)
    assert caught.value.remedy == "use a machine with more memory, or a smaller model"
    machine(None)
    assert plan_memory(directory, config).slots == default_slots(config)


def test_where_no_free_memory_is_told_the_whole_counts(
    stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(inspect(), memory_available=None, memory_total=1000)
    monkeypatch.setattr(memory, "inspect", lambda: small)
    with pytest.raises(BadInput, match=r"0\.0 MB can be used of 0\.0 MB available"):
        plan_memory(stored(), TINY)


def test_a_tenth_of_a_gigabyte_is_written_as_that() -> None:
    found = [memory.gigabytes(count) for count in (62_840_000_000, 100_000_000, 99_900_000)]
    assert found == ["62.8 GB", "0.1 GB", "99.9 MB"]


def test_choices_are_obeyed_or_refused_with_what_fits(machine: Any, stored: Any) -> None:
    config = shape(max_position_embeddings=4096)
    directory = stored(torch_dtype="float32")
    wide, narrow = torch.float32, torch.bfloat16
    machine(int((weight_bytes(config, wide) + 2000 * slot_bytes(config, wide)) / memory.SHARE) + 1)
    plan = plan_memory(directory, config, narrow, 10)
    assert (plan.dtype, plan.slots) == (narrow, 10) and "as asked for" in str(plan)
    with pytest.raises(BadInput, match="a cache of 2,001 tokens") as caught:
        plan_memory(directory, config, wide, 2001)
    assert "--cache-tokens 2000" in caught.value.remedy
    assert plan_memory(directory, config, wide, 2000).slots == 2000
    machine(
        int((weight_bytes(config, narrow) + 2000 * slot_bytes(config, narrow)) / memory.SHARE) + 1
    )
    with pytest.raises(BadInput, match="weights in float32") as caught:
        plan_memory(directory, config, wide)
    assert "--dtype bf16" in caught.value.remedy
    with pytest.raises(BadInput, match="a cache of 1,000,000 tokens") as caught:
        plan_memory(directory, config, wide, 10**6)
    fewer = int(caught.value.remedy.split()[2])
    assert plan_memory(directory, config, wide, fewer).slots == fewer
    with pytest.raises(BadInput, match="holds nothing"):
        plan_memory(directory, config, wide, 0)


def test_a_cache_smaller_than_the_context_bounds_a_request(tmp_path: Path) -> None:
    from xushi.engine import ContextLengthError, SamplingParams

    save_pretrained(Deepseek(shape()).initialise(1), tmp_path)
    write_tokenizer(tmp_path)
    llm = LLM(tmp_path, slots=40)
    assert llm.context == 40 == llm.engine.slots
    [answer] = llm.generate([[1] * 10], SamplingParams(max_tokens=500, ignore_eos=True))
    assert len(answer.token_ids) == 30
    with pytest.raises(ContextLengthError, match="the cache holds 40,") as caught:
        llm.generate([[1] * 40], SamplingParams(max_tokens=1))
    assert "--cache-tokens" in caught.value.remedy and "of 512" in caught.value.remedy
    whole = LLM(tmp_path, slots=512)
    with pytest.raises(ContextLengthError, match="the model's context holds 512,") as caught:
        whole.generate([[1] * 512], SamplingParams(max_tokens=1))
    assert caught.value.remedy == "shorten the prompt"


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(
    tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(Deepseek(shape()).initialise(1), tmp_path)
    write_tokenizer(tmp_path)
    machine(1000)
    monkeypatch.setattr("xushi.engine.llm.load_pretrained", lambda *_: pytest.fail("was loaded"))
    with pytest.raises(BadInput, match="does not fit"):
        LLM(tmp_path)


@pytest.mark.parametrize(
    ("context", "slots"),
    [(512, 8 * 512), (1 << 14, 1 << 16), (1 << 16, 1 << 16), (1 << 17, 1 << 17)],
)
def test_the_default_cache_holds_eight_contexts_within_bounds_and_one_in_any_case(
    context: int, slots: int
) -> None:
    assert default_slots(shape(max_position_embeddings=context)) == slots
