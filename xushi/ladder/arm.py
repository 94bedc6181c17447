"""The arm of an idea about a recipe: train it with one seed, measure it, print one line of JSON.

The program runs in a process of its own, as any arm does. Corpus, tokenizer and tokens come from
the cache that runs share; a killed arm goes on from its last checkpoint. Both arms of a pair have
the same seed, so that weights of the same name and shape begin with the same values, and the data
come in the same order.

Not here: who starts it (`jobs`), what its numbers say (`verdict`).
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xushi
from xushi.base.errors import BadInput
from xushi.base.files import sha256_file, sha256_json
from xushi.base.tracking import Tracking
from xushi.data import heldout_bytes
from xushi.data.read_files import look_at
from xushi.ladder.idea import ARM, ARMS, Idea
from xushi.plan import count_parameters, kv_cache_bytes_per_token, train_flops_per_token
from xushi.run import run
from xushi.run.place import RunPlace
from xushi.run.recipe import Recipe, load_recipe
from xushi.run.stages.evaluate import Evaluate
from xushi.run.stages.pretrain import Pretrain
from xushi.run.stages.training import model_config

STAGES = ["data", "tokenizer", "pretrain"]


def measure(recipe_file: Path, assignments: Sequence[str], directory: Path) -> dict[str, Any]:
    """Pretrain the recipe in `directory` and return what it came to.

    `bits_per_byte`: of the whole held-out text. `documents`: [bytes, bits] of each held-out
    document, in the order of their paths. `loss`: of the last tenth of the steps, in nats per
    token. `flops`: of training. Then parameters, tokens, and bytes of cache per token in bf16.
    """
    recipe = arm_recipe(recipe_file, assignments)
    results = run(recipe, directory, until=Pretrain.name)
    assert results is not None  # it is the only process
    place = RunPlace(directory, Tracking(None))
    documents = Evaluate(recipe).documents(place)
    config = model_config(recipe.model, place.tokenizer())
    counts = count_parameters(config)
    with_mtp = config.num_nextn_predict_layers > 0
    per_token = train_flops_per_token(config, recipe.data.sequence_length, with_mtp)
    sizes = zip(documents.bytes_D.tolist(), documents.bits_D.tolist(), strict=True)
    return {
        "bits_per_byte": documents.total / len(heldout_bytes(place.corpus)),
        "loss": results["pretrain.loss"],
        "tokens": results["pretrain.tokens"],
        "flops": per_token * results["pretrain.tokens"],
        "parameters": counts.total,
        "active_parameters": counts.active,
        "cache_bytes_per_token": kv_cache_bytes_per_token(config),
        "documents": [[size, round(bits, 3)] for size, bits in sizes],
    }


def arm_recipe(file: Path, assignments: Sequence[str]) -> Recipe:
    """The recipe of an arm: data, tokenizer and pretraining, on one thread unless it says more."""
    return load_recipe(file, ["threads=1", *assignments], stages=STAGES)


def recipe_files(idea: Idea, where: Path, arms: Sequence[str] = ARMS) -> dict[str, str]:
    """What decides the results of the arms of an idea about a recipe beside its own file: the code
    of xushi, the files that the recipes name, and the text that they read. By names that are no
    paths, hashes.

    All recipes are read here, before anything runs: a wrong key is a `BadInput`, and so are two
    arms that are the same recipe.
    """
    found = {"(the code of xushi)": code_hash()}
    texts: set[str] = set()
    for rung in range(len(idea.all_rungs())):
        recipes = {}
        for arm in ARMS:
            name, file, *assignments = idea.command(arm, rung, 0)
            assert name == ARM
            recipes[arm] = arm_recipe(where / file, assignments)
        if len({recipe.hash for recipe in recipes.values()}) == 1:
            raise BadInput(
                f"both arms of {idea.recipe} are the same recipe: the idea changes nothing",
                "set a key of [variant] to another value than the recipe has",
            )
        for arm in arms:
            texts.add(look_at(recipes[arm].data).hash)
            for name, source in recipes[arm].files.items():  # an environment's
                found[f"({name})"] = sha256_file(source)
    found["(the text)"] = sha256_json(sorted(texts))
    return found


@functools.cache
def code_hash() -> str:
    """SHA-256 of all source files of the package."""
    package = Path(xushi.__file__).parent
    total = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            total.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()
