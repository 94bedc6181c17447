"""The stages that follow training: evaluation, export, and the numbers and pages a person reads."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xushi import __version__
from xushi.base.files import directory_in_place, write_json
from xushi.base.machine import inspect, peak_memory_bytes
from xushi.base.seeds import derive
from xushi.data import heldout_batches, heldout_bytes, training_texts
from xushi.engine import LLM, SamplingParams
from xushi.envs import Environment, Task
from xushi.evaluate import (
    Answer,
    answer_tasks,
    bits_per_byte,
    mean_interval,
    pass_at_k_interval,
    total_bits,
    wilson,
    xz_primed,
)
from xushi.model import Deepseek, load_pretrained, save_pretrained
from xushi.plan import count_parameters, kv_cache_bytes_per_token
from xushi.run.context import RunContext

SAMPLES_SHOWN = 10
BASE_PROMPTS = (
    "import os\nimport ",
    "def __init__(self, ",
    "class ",
    "    for index in range(",
    "try:\n    ",
)


def evaluate(context: RunContext) -> dict[str, Any]:
    """Bits per byte of the pretrained model beside compressors, and answers before and after
    learning.
    """
    results = _bits(context)
    samples: dict[str, Any] = {}
    if context.last_stage("sft", "rl"):
        results |= _answers(context, samples)
    samples["base"] = _completions(context)
    write_json(context.path("samples.json"), samples)
    return results


def _bits(context: RunContext) -> dict[str, Any]:
    text = heldout_bytes(context.path("data", "corpus"))
    model = context.trained_model(context.last_stage("pretrain"))
    batches = (vars(batch) for batch in heldout_batches(context.path("data", "tokens"), 32))
    results: dict[str, Any] = {"evaluate.bits_per_byte": total_bits(model, batches) / len(text)}
    for name in ("gzip", "xz", "zstd"):
        results[f"evaluate.bits_per_byte_{name}"] = bits_per_byte(text, name)
    if context.recipe.evaluate.xz_primed:
        training = "".join(training_texts(context.path("data", "corpus"))).encode()
        primed = xz_primed(training, text)
        results["evaluate.bits_per_byte_xz_primed"] = primed.bits_per_byte
        results["evaluate.xz_primed_training_bytes"] = primed.training_bytes_used
    results["evaluate.ratio_to_xz"] = (
        results["evaluate.bits_per_byte"] / results["evaluate.bits_per_byte_xz"]
    )
    return results


def _answers(context: RunContext, samples: dict[str, Any]) -> dict[str, Any]:
    """Every measurement on the environment; the samples to show go into `samples`."""
    config = context.recipe.evaluate
    environment = context.environment(config.min_digits, config.max_digits)
    tasks = [environment.task("test", index) for index in range(config.tasks)]
    longest = max(
        context.recipe.environment.max_digits if context.recipe.environment else 0,
        config.max_digits,
    )
    further = context.environment(longest + 1, max(longest + 1, config.longer_digits))
    longer = [further.task("test", index) for index in range(config.tasks)]
    results: dict[str, Any] = {
        "rl.tasks": len(tasks),
        "rl.tasks_are": environment.card().tasks,
        "rl.longer_tasks_are": further.card().tasks,
    }

    before = context.trained_model(context.last_stage("pretrain", "sft"))
    results |= _measure(context, before, environment, tasks, "before", samples)
    results |= _greedy(context, before, further, longer, "longer_greedy_before")[0]
    results |= _greedy(context, before, environment, tasks, "forced_before", think=True)[0]
    if context.recipe.runs("rl"):
        after = context.trained_model("rl")
        results |= _measure(context, after, environment, tasks, "after", samples)
        results |= _greedy(context, after, further, longer, "longer_greedy_after")[0]
    if context.recipe.runs("sft") and context.recipe.runs("rl"):
        results |= _greedy(
            context, context.trained_model("control"), environment, tasks, "sft_equal_time"
        )[0]
    return results


def _greedy(
    context: RunContext,
    model: Deepseek,
    environment: Environment,
    tasks: Sequence[Task],
    name: str,
    think: bool = False,
) -> tuple[dict[str, Any], list[Answer]]:
    answers = [
        row[0]
        for row in answer_tasks(
            model,
            context.tokenizer(),
            environment,
            tasks,
            samples=1,
            temperature=0.0,
            max_tokens=context.recipe.evaluate.max_tokens,
            seed=context.recipe.seed,
            think=think,
        )
    ]
    right = sum(answer.right for answer in answers)
    low, high = wilson(right, len(answers))
    return {
        f"rl.{name}": right / len(answers),
        f"rl.{name}_low": low,
        f"rl.{name}_high": high,
    }, answers


def _measure(
    context: RunContext,
    model: Deepseek,
    environment: Environment,
    tasks: Sequence[Task],
    when: str,
    samples: dict[str, Any],
) -> dict[str, Any]:
    """Greedy accuracy, avg@k, pass@k and the mean length of one model, with 95 % intervals."""
    config = context.recipe.evaluate
    results, greedy = _greedy(context, model, environment, tasks, f"greedy_{when}")
    sampled = answer_tasks(
        model,
        context.tokenizer(),
        environment,
        tasks,
        samples=config.samples,
        temperature=1.0,
        max_tokens=config.max_tokens,
        seed=derive(context.recipe.seed, "evaluate"),
    )
    right = [sum(answer.right for answer in row) for row in sampled]
    k = config.samples
    figures = {
        f"avg{k}": mean_interval([count / k for count in right]),
        f"pass{k}": pass_at_k_interval([(k, count) for count in right], k),
    }
    for name, (mean, low, high) in figures.items():
        results |= {
            f"rl.{name}_{when}": mean,
            f"rl.{name}_{when}_low": low,
            f"rl.{name}_{when}_high": high,
        }
    results[f"rl.length_{when}"] = sum(answer.tokens for row in sampled for answer in row) / (
        len(tasks) * k
    )
    results[f"rl.thinking_{when}"] = sum(
        bool(answer.reasoning) for row in sampled for answer in row
    ) / (len(tasks) * k)
    samples[when] = [
        {
            "prompt": answer.task.prompt,
            "reasoning": answer.reasoning,
            "content": answer.content,
            "right": answer.right,
            "answer": answer.task.answer,
        }
        for answer in greedy[:SAMPLES_SHOWN]
    ]
    return results


def _completions(context: RunContext) -> list[dict[str, str]]:
    """What the pretrained model writes after a few openings: held-out text's own where there is no
    code.
    """
    from xushi.engine import generate_ids

    tokenizer = context.tokenizer()
    model = context.trained_model(context.last_stage("pretrain"))
    text = heldout_bytes(context.path("data", "corpus")).decode()
    is_code = any(source.kind == "packages" for source in context.recipe.data.sources)
    openings = (
        list(BASE_PROMPTS)
        if is_code
        else [text[at : at + 40] for at in range(0, len(text), len(text) // 5 + 1)]
    )
    room = context.recipe.model.max_position_embeddings // 2
    prompts = [[tokenizer.bos_id, *tokenizer.encode(opening)][:room] for opening in openings]
    params = [
        SamplingParams(max_tokens=80, temperature=0.7, seed=number)
        for number in range(len(prompts))
    ]
    requests = generate_ids(model, prompts, params, eos_id=tokenizer.eos_id)
    return [
        {"prompt": opening, "completion": tokenizer.decode(request.token_ids, skip_special=True)}
        for opening, request in zip(openings, requests, strict=True)
    ]


def export(context: RunContext) -> dict[str, Any]:
    """Write every model that can be used, in the Hugging Face layout, and read each back."""
    tokenizer = context.tokenizer()
    made = {"base": context.last_stage("pretrain"), "reasoning": context.last_stage("sft", "rl")}
    difference = 0.0
    with directory_in_place(context.path("export")) as aside:
        for name, stage in made.items():
            if name == "reasoning" and stage is None:
                continue
            model = context.trained_model(stage)
            save_pretrained(model, aside / name)
            tokenizer.save(aside / name)
            write_json(
                aside / name / "generation_config.json",
                {
                    "bos_token_id": tokenizer.bos_id,
                    "eos_token_id": tokenizer.eos_id,
                    "pad_token_id": tokenizer.pad_id,
                },
            )
            write_json(aside / name / "model_card.json", _card(context, name))
            difference = max(difference, _difference(model, aside / name))
    return {
        "export.models": ", ".join(name for name, stage in made.items() if name == "base" or stage),
        "export.max_logit_difference": difference,
    }


def _difference(model: Deepseek, directory: Path) -> float:
    """The largest difference between the logits of a model and of its export, read back."""
    tokens = torch.arange(
        min(64, model.config.vocab_size, model.config.max_position_embeddings), device=model.device
    )
    with torch.no_grad():
        again = load_pretrained(directory, device=model.device)
        return float((model(tokens[None]).logits - again(tokens[None]).logits).abs().max())


def _card(context: RunContext, name: str) -> dict[str, str]:
    """What the chat page says of a model: what it can do and what not."""
    is_code = any(source.kind == "packages" for source in context.recipe.data.sources)
    if name == "base":
        kind = "Python source" if is_code else "text like that it was trained on"
        return {
            "title": f"{context.recipe.name}: base",
            "can": f"It continues {kind}.",
            "cannot": "It cannot answer questions or hold a conversation; it was never shown one.",
            "example": "def __init__(self, " if is_code else "",
        }
    longest = context.recipe.environment.max_digits if context.recipe.environment else 0
    return {
        "title": f"{context.recipe.name}: reasoning",
        "can": f"It gives the digit sum of a number of up to {longest} digits, modulo 10, and "
        "shows its working.",
        "cannot": "It knows nothing else: anything but a number gets a meaningless answer.",
        "example": "83514927",
    }


def describe_run(context: RunContext) -> dict[str, Any]:
    """The facts of the run itself: recipe, machine, model."""
    machine = inspect()
    config = context.model_config(context.tokenizer())
    counts = count_parameters(config)
    return {
        "run.name": context.recipe.name,
        "run.seed": context.recipe.seed,
        "run.recipe_hash": context.recipe.hash,
        "run.without": context.recipe.without or "",
        "run.version": __version__,
        "machine.cpu": machine.cpu,
        "machine.cores": machine.usable_cores,
        "machine.threads": torch.get_num_threads(),
        "machine.memory_bytes": machine.memory_total or 0,
        "machine.torch": torch.__version__,
        "machine.op_forms": context.op_forms,
        "machine.dtype": context.dtype,
        "machine.system": machine.system,
        "machine.device": torch.cuda.get_device_name()
        if context.layout.device == "cuda"
        else "cpu",
        "model.parameters_total": counts.total,
        "model.parameters_active": counts.active,
        "model.parameters_active_without_embedding": counts.active_without_embedding,
        "model.parameters_mtp": counts.mtp,
        "model.kv_cache_bytes_per_token": kv_cache_bytes_per_token(config),
        "memory.peak_bytes": peak_memory_bytes(),
    }


def forget_stage(context: RunContext, name: str) -> None:
    """Remove what an earlier recipe's stage of this name left, so that nothing of it is taken for
    this one's.
    """
    context.path("stages", f"{name}.json").unlink(missing_ok=True)
    shutil.rmtree(context.checkpoints(name), ignore_errors=True)


def try_model(context: RunContext) -> str:
    """One answer of the exported model through the public interface, to show at the end of a run."""
    llm = LLM(context.path("export", "reasoning" if context.last_stage("sft", "rl") else "base"))
    if context.last_stage("sft", "rl"):
        answer = llm.chat(
            [{"role": "user", "content": "83514927"}],
            SamplingParams(max_tokens=32, temperature=0.0),
        )
        return f"83514927 -> {answer.content}   (thought: {answer.reasoning_content or 'none'})"
    return ""
