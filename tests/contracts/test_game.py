"""The counting game, from its file alone: it keeps the contract, and a model plays it with a tool."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from xushi.base.errors import BadInput
from xushi.base.messages import Message
from xushi.engine import SamplingParams
from xushi.envs import Environment, environment_class
from xushi.envs.check import as_lines, check_environment, kept
from xushi.evaluate import examples_of, play
from xushi.model import Deepseek, ModelConfig
from xushi.run.stages.lengths import check_tokens
from xushi.tokenizer import Tokenizer, chat_examples
from xushi.tokenizer.config import smallest_vocabulary

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def game() -> Environment:
    return environment_class("game.py:Counting", HERE)()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["0123456789"], smallest_vocabulary(tools=True), tools=True)


class Asker(Deepseek):
    """A model whose next token depends on the last one alone, so that it calls `next` three times
    in four, and else says some digit.
    """

    bias_VV: Tensor

    def decode(self, flat, cache, routing=False):  # type: ignore[no-untyped-def]
        decoded = super().decode(flat, cache, routing)
        last_M = flat.tokens_N[flat.wanted_M]
        return replace(decoded, logits_MV=self.bias_VV[last_M])


@pytest.fixture(scope="module")
def asker(tokenizer: Tokenizer) -> Asker:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24,
        moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=None,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
        max_position_embeddings=1024, num_nextn_predict_layers=0,
    )  # fmt: skip
    model = Asker(config).initialise(1)
    marks = tokenizer.tool_ids
    digits = [tokenizer.encode(str(digit))[0] for digit in range(10)]
    call = [marks.calls_begin, marks.call_begin, *tokenizer.encode("next"), marks.separator,
            *tokenizer.encode("{}"), marks.call_end, marks.calls_end, tokenizer.eos_id]  # fmt: skip
    bias = torch.zeros(config.vocab_size, config.vocab_size)
    for last in (tokenizer.assistant_id, marks.output_end):
        bias[last, tokenizer.end_think_id] = 30.0
    bias[tokenizer.end_think_id, call[0]] = 30.0 + torch.tensor(30.0).log()
    bias[tokenizer.end_think_id, digits] = 30.0
    for last, following in pairwise(call):
        bias[last, following] = 30.0
    for digit in digits:
        bias[digit, tokenizer.eos_id] = 30.0
    model.bias_VV = bias
    return model


def test_it_keeps_the_contract() -> None:
    findings = check_environment("game.py:Counting", HERE, instances=300)
    assert kept(findings), as_lines(findings)


def test_a_model_plays_it(game: Environment, tokenizer: Tokenizer, asker: Asker) -> None:
    """Every episode is one sequence, and what a model would learn from a right one is what it
    would learn from the same episode as a demonstration.
    """
    tasks = [game.task("train", index) for index in range(8) for _ in range(8)]
    params = [SamplingParams(max_tokens=100, seed=number) for number in range(len(tasks))]
    episodes = play(asker, tokenizer, game, tasks, params, routing=True)
    assert {episode.finish_reason for episode in episodes} == {"stop"}
    verdicts = Counter(episode.score.verdict for episode in episodes)
    assert (
        verdicts["right"] >= 1 and verdicts["wrong"] > verdicts["right"] and "error" not in verdicts
    )
    lengths = {len(episode.transcript) // 2 for episode in episodes}
    assert lengths == {1, 2, 3, 4, 5}
    for task, episode in zip(tasks, episodes, strict=True):
        digits = str(task.details["digits"])
        told = [message.content for message in episode.transcript if message.role == "tool"]
        assert told == [*digits[: len(told)]] and episode.transcript[0].content == task.prompt
        assert game.score(task, episode.transcript) == episode.score
        assert examples_of(episode) == chat_examples(tokenizer, episode.transcript, game.tools)
        (branch,) = episode.branches
        assert len(branch.experts or []) == len(branch.ids) - 1
        table = json.loads(json.dumps([message.to_dict() for message in episode.transcript]))
        assert [Message.from_dict(message) for message in table] == episode.transcript


def test_a_random_model_plays_it(game: Environment, tokenizer: Tokenizer, asker: Asker) -> None:
    """Nonsense is an answer, too."""
    model = Deepseek(asker.config).initialise(2)
    tasks = [game.task("test", index) for index in range(4)]
    params = [SamplingParams(max_tokens=20, seed=number) for number in range(4)]
    episodes = play(model, tokenizer, game, tasks, params, think=True)
    assert [episode.score.verdict for episode in episodes] == ["wrong"] * 4
    assert all(1 <= episode.tokens <= 20 for episode in episodes)


def test_an_episode_that_exceeds_the_context_is_refused(
    game: Environment, tokenizer: Tokenizer
) -> None:
    """The description of the tool counts."""
    examples = chat_examples(tokenizer, game.longest_transcript(), game.tools)
    tokens = len(examples[0][0])
    assert tokens > 500
    check_tokens(game, tokenizer, tokens)
    with pytest.raises(BadInput, match=f"takes {tokens} tokens, more than .*={tokens - 1}"):
        check_tokens(game, tokenizer, tokens - 1)
