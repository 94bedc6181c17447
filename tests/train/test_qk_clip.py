"""QK-clip brings the largest score of a head down to the limit and leaves the other heads alone."""

import math

import pytest
import torch

from xushi.base.errors import BadInput
from xushi.model import Deepseek, ModelConfig
from xushi.ops import largest_scores
from xushi.run.recipe import load_recipe
from xushi.train import Layout, ObjectiveConfig, TrainingState, training_step
from xushi.train.guards import Problem
from xushi.train.qk_clip import clip_scores, watch_scores
from xushi.train.sharding import shard

from ..run.conftest import MINIATURE
from .layouts import MODELS, batch

ROUNDED = 4 * 2**-24  # the model's cosines and sines are float32's, of a query and a key


def scores(model: Deepseek, layer: int) -> torch.Tensor:
    """Of each head and pair of places, by the published formula: [B, H, T, T], -inf where nothing
    is seen.
    """
    rows, attention = batch(0, 3), model.decoder_layers[layer].self_attn
    seen = {}
    attention.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    model.hidden(rows.tokens, rows.positions, rows.segments)
    x, config = seen["x"], model.config
    latent = x if config.q_lora_rank is None else attention.q_a_layernorm(attention.q_a_proj(x))
    q = (attention.q_proj if config.q_lora_rank is None else attention.q_b_proj)(latent).unflatten(
        -1, (2, 8)
    )
    compressed, rotated = attention.kv_a_proj_with_mqa(x).split([8, 4], dim=-1)
    k = attention.kv_b_proj(attention.kv_a_layernorm(compressed)).unflatten(-1, (2, 8))[..., :4]
    frequency = 10000.0 ** -(torch.arange(2, dtype=torch.float64) / 2)
    angle = rows.positions[..., None].double() * frequency
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(part: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(part.unflatten(-1, (2, 2)).contiguous())

    found = torch.einsum("bthk,bshk->bhts", q[..., :4], k)
    found = (
        found
        + torch.einsum(
            "bthk,bsk->bhts", turned(q[..., 4:]) * turn[:, :, None], (turned(rotated) * turn).conj()
        ).real
    )
    segments = rows.segments
    seen_by = (segments[:, :, None] == segments[:, None]) & torch.ones(
        24, 24, dtype=torch.bool
    ).tril()
    return (found.detach() / math.sqrt(8)).masked_fill(~seen_by[:, None], float("-inf"))


@pytest.mark.parametrize("kind", ["v2", "v3", "without a query latent"])
def test_the_largest_scores_are_found_and_brought_to_the_limit(kind: str) -> None:
    config: ModelConfig = MODELS["v3" if kind.startswith("without") else kind].model_copy(
        update={
            "num_nextn_predict_layers": 0,
            **({"q_lora_rank": None} if kind.startswith("without") else {}),
        }
    )
    model, layout = Deepseek(config).initialise(5).double(), Layout()
    with torch.no_grad():
        model.decoder_layers[0].self_attn.kv_b_proj.weight[:4].mul_(20)  # the first head's keys
    shard(model, layout)
    before = scores(model, 0).amax((0, 2, 3))
    limit = float(before.mean())
    weights = {
        name: weight.clone()
        for name, weight in model.decoder_layers[0].self_attn.state_dict().items()
    }
    watch_scores(model)
    scores(model, 0)
    figures = clip_scores(model, limit, layout)
    assert figures["attention.0.largest_score"] == pytest.approx(float(before.max()), rel=ROUNDED)
    after = scores(model, 0).amax((0, 2, 3))
    assert before[0] > limit > before[1]
    assert float(after[0]) == pytest.approx(limit, rel=ROUNDED)
    changed = model.decoder_layers[0].self_attn.state_dict()
    for name, weight in weights.items():  # the other head's rows, and the first one's values
        kept = {
            "q_b_proj.weight": slice(8, 16),
            "q_proj.weight": slice(8, 16),
            "kv_b_proj.weight": slice(4, 16),
        }
        assert torch.equal(
            changed[name][kept.get(name, slice(None))], weight[kept.get(name, slice(None))]
        ), name


def test_the_largest_score_of_many_queries_and_of_a_mask() -> None:
    q, k = (torch.randn(2, 3, 300, 5, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    whole = torch.einsum("bhtk,bhsk->bhts", q, k) * 0.3
    causal = torch.ones(300, 300, dtype=torch.bool).tril()
    for mask in (
        None,
        (causal & (torch.rand(2, 1, 300, 300, generator=torch.Generator().manual_seed(3)) < 0.1)),
    ):
        wanted = whole.masked_fill(~(causal if mask is None else mask), float("-inf")).amax(
            (0, 2, 3)
        )
        assert torch.allclose(largest_scores(q, k, mask, 0.3), wanted, rtol=1e-5)


@pytest.mark.parametrize("problem", [None, Problem("spike", "a jump"), Problem("not finite", "")])
def test_a_step_clips_unless_its_update_is_left_out(problem: Problem | None, monkeypatch) -> None:
    """A step that the guard withholds leaves the model as it was."""
    config = ObjectiveConfig(
        steps=3, learning_rate=0.01, qk_clip=1e-3, on_spike="skip", dtype="fp32"
    )
    state = TrainingState.begin(Deepseek(MODELS["v3"]).initialise(5), config)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    monkeypatch.setattr(state.guard, "judge", lambda *_: problem)
    figures, _ = training_step(state, config, 0, batch(0, 3))
    same = [torch.equal(before[name], t) for name, t in state.model.state_dict().items()]
    assert all(same) if problem else not any(same[:3])
    assert any("score" in name for name in figures) == (problem is None), figures.keys()


def test_a_recipe_with_it_for_v4_is_refused() -> None:
    recipe = load_recipe(MINIATURE, ["pretrain.qk_clip=100"])
    model = MODELS["v4"].model_copy(update={"max_position_embeddings": 128})
    table = model.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    del table["vocab_size"]  # follows from the tokenizer
    with pytest.raises(BadInput, match=r"pretrain\.qk_clip is not for deepseek_v4"):
        recipe.but(model=table)
