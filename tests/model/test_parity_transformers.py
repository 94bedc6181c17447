"""The model against transformers' classes for DeepSeek-V2, V3, V3.2 and V4, in float32."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.utils.logging import disable_progress_bar

from xushi.model import (
    Deepseek,
    attention,
    compressed_attention,
    load_pretrained,
    save_pretrained,
    to_published,
)
from xushi.ops import best_keys

from .drawing import KINDS, TOLERANCE, configs, random_tokens

disable_progress_bar()
# Without shared experts transformers makes one of width zero, and torch warns about it.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


def load_reference(model: Deepseek, path) -> nn.Module:
    """transformers' model from the files that ours wrote. No tensor may be missing or unused,
    except those of MTP layers.
    """
    save_pretrained(model, path)
    reference, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert type(reference).__name__ == to_published(model.config)["architectures"][0]
    if not model.config.n_shared_experts:  # then transformers has a shared expert of width zero
        report["missing_keys"] = {
            key for key in report["missing_keys"] if ".shared_experts." not in key
        }
    assert not report["missing_keys"] and not report["mismatched_keys"]
    extra = [
        f"model.layers.{model.config.num_hidden_layers + depth}."
        for depth in range(len(model.mtp_layers))
    ]
    if model.config.is_v4:
        extra = [f"mtp.{depth}." for depth in range(len(model.mtp_layers))]
    assert all(key.startswith(tuple(extra)) for key in report["unexpected_keys"])
    reference.compared = True
    return reference.eval()


def gates_of(reference: nn.Module) -> list[nn.Module]:
    return [layer.mlp.gate for layer in reference.model.layers if hasattr(layer.mlp, "gate")]


def scores_of(gate: nn.Module, logits: Tensor) -> Tensor:
    if hasattr(gate, "score_fn"):  # V4's
        return gate.score_fn(logits)
    return logits.sigmoid() if hasattr(gate, "e_score_correction_bias") else logits.softmax(-1)


@torch.no_grad()
def near_tie(gate: nn.Module, x: Tensor) -> bool:
    """Whether the reference's own choice for token x changes if the biases (V2: weights) change by
    1e-4.
    """
    moved = getattr(gate, "e_score_correction_bias", gate.weight)
    exact, stream = moved.clone(), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        moved.copy_(exact + 1e-4 * torch.randn(exact.shape, generator=stream))
        seen.add(tuple(type(gate).forward(gate, x[None])[2][0].sort().values.tolist()))
    moved.copy_(exact)
    return len(seen) > 1


def pin_reference(reference: nn.Module, choices: list[Tensor], scores: list[Tensor]) -> None:
    """Give the reference's routers our choices, since rounding can change the choice at near ties.

    Choices are compared here, layer by layer, on hidden states that follow from our choices, so
    that a difference in one layer excuses nothing in the next. Scores must agree, and the sets of
    experts must be equal except at proven near ties. If they are equal, the gate values computed
    here must be the reference's own. Nothing is compared if `reference.compared` is false: where
    the reference computes in bfloat16, or is moved on purpose.
    """
    for gate, chosen, ours in zip(gates_of(reference), choices, scores, strict=True):

        def forward(
            x: Tensor,
            *tokens: Tensor,
            gate: nn.Module = gate,
            chosen: Tensor = chosen,
            ours: Tensor = ours,
        ) -> tuple:
            x = x.reshape(-1, x.shape[-1])
            logits, own_weights, own = type(gate).forward(gate, x, *tokens)
            weights = scores_of(gate, logits).gather(1, chosen)
            if getattr(gate, "norm_topk_prob", hasattr(gate, "score_fn")):
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            weights = weights * gate.routed_scaling_factor
            if reference.compared:
                assert (scores_of(gate, logits) - ours).abs().max() <= TOLERANCE
                same = (chosen.sort().values == own.sort().values).all(-1)
                assert all(near_tie(gate, x[n].detach()) for n in torch.where(~same)[0].tolist())
                dense = [
                    torch.zeros_like(logits).scatter(1, i, w)[same]
                    for i, w in ((chosen, weights), (own, own_weights))
                ]
                torch.testing.assert_close(*dense, rtol=1e-6, atol=1e-7)
            return logits, weights, chosen

        gate.forward = forward


class Selections:
    """Records our indexers' choices in one forward, layer by layer, and gives them to the
    reference's indexers.

    ReLU makes many scores exactly zero, and `topk` does not define the order of ties. So the
    reference's own choice is compared with ours by the scores of the keys in which they differ, and
    then replaced.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        for module in (attention, compressed_attention):
            monkeypatch.setattr(module, "best_keys", self.record)

    def record(self, scores: Tensor, allowed: Tensor, count: int) -> Tensor:
        chosen = best_keys(scores, allowed, count)
        self.calls.append((scores.detach(), allowed.expand_as(chosen), chosen))
        return chosen

    def pin(self, reference: nn.Module) -> None:
        holders = [
            getattr(layer.self_attn, "compressor", layer.self_attn)
            for layer in reference.model.layers
        ]
        indexers = [holder.indexer for holder in holders if hasattr(holder, "indexer")]
        if not self.calls:  # nothing was left out anywhere
            return
        for indexer, call in zip(indexers, self.calls, strict=True):

            def forward(
                *arguments: object,
                indexer: nn.Module = indexer,
                call: tuple = call,
                **named: object,
            ) -> Tensor:
                scores, allowed, chosen = call
                own, count = (
                    type(indexer).forward(indexer, *arguments, **named).long(),
                    chosen.shape[-1],
                )
                theirs = torch.zeros(*chosen.shape[:-1], count + 1, dtype=torch.bool)
                # Where there is too little to choose from, the reference takes what lies ahead too
                # and masks it later.
                theirs = theirs.scatter(-1, own.where(own >= 0, count), True)[..., :count] & allowed
                assert torch.equal(theirs.sum(-1), chosen.sum(-1))
                worst = scores.masked_fill(~chosen, float("inf")).amin(-1)
                best_left_out = scores.masked_fill(chosen | ~theirs, float("-inf")).amax(-1)
                differ = (theirs != chosen).any(-1)
                largest = scores.masked_fill(~allowed, 0).abs().amax(-1)
                if reference.compared:
                    assert ((worst - best_left_out).abs() <= TOLERANCE * largest)[differ].all()
                places = torch.arange(count).expand(chosen.shape)
                picked = places.where(chosen, count).sort(-1).values[..., : own.shape[-1]]
                # The reference wants a full set: V4's knows -1 for nothing, V3.2's masks what lies
                # ahead.
                return picked.where(picked < count, -1 if hasattr(indexer, "scorer") else count - 1)

            indexer.forward = forward


def float64_gradients(
    model: Deepseek, tokens: Tensor, pinned: list[Tensor], limit: float = 1.0
) -> dict[str, Tensor]:
    """With V4's SwiGLU limit multiplied by a factor."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if getattr(module, "limit", None) is not None:
            module.limit *= limit
    model.zero_grad()
    logits = model(tokens, pinned=pinned).logits
    assert logits.dtype == torch.float64
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.roll(tokens, -1, 1).flatten()
    ).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def moved_by_rounding(reference: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """The change of each of the reference's gradients if every module's output changes by one
    float32 rounding.
    """

    def gradients(stream: torch.Generator | None) -> dict[str, Tensor]:
        def nudge(module: nn.Module, arguments: object, output: object) -> object:
            if stream is None or not isinstance(output, Tensor) or not output.is_floating_point():
                return output
            return output * (1 + 2.0**-24 * torch.randn(output.shape, generator=stream))

        hooks = [module.register_forward_hook(nudge) for module in reference.modules()]
        reference.zero_grad()
        logits = reference(tokens).logits
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.roll(tokens, -1, 1).flatten()
        ).backward()
        for hook in hooks:
            hook.remove()
        return {
            name: p.grad.clone() for name, p in reference.named_parameters() if p.grad is not None
        }

    reference.compared = False
    still = gradients(None)
    draws = [gradients(torch.Generator().manual_seed(seed)) for seed in range(4)]
    return {
        name: torch.stack([(draw[name] - still[name]).norm() for draw in draws]).max()
        for name in still
    }


def check_against_transformers(ours: Deepseek, tokens: Tensor, path) -> None:
    reference = load_reference(ours, path)
    with pytest.MonkeyPatch.context() as patch:
        selections = Selections(patch)
        routing = ours.hidden(tokens).routing
    selections.pin(reference)
    choices = [choice.indices_Nk for choice in routing]
    pin_reference(reference, choices, [choice.scores_NE.detach() for choice in routing])
    expected = reference(tokens).logits
    got = ours(tokens, pinned=choices).logits
    check_logits(got, expected, ours, tokens, choices)
    targets = torch.roll(tokens, -1, 1)
    for logits in (got, expected):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    check_gradients(ours, reference, tokens, choices)


def check_logits(
    got: Tensor, expected: Tensor, ours: Deepseek, tokens: Tensor, choices: list[Tensor]
) -> None:
    difference = (got - expected).abs().max()
    if difference > TOLERANCE * expected.abs().max():
        # Known no better than float32 computes it: four times our own distance from float64.
        with torch.no_grad():
            exact_logits = copy.deepcopy(ours).double()(tokens, pinned=choices).logits
        assert exact_logits.dtype == torch.float64
        assert difference <= 4 * (got - exact_logits).abs().max()


def trunk_parameters(model: Deepseek) -> dict[str, nn.Parameter]:
    """Those of all but the MTP layers."""
    beyond = tuple(
        f"model.layers.{model.config.num_hidden_layers + depth}."
        for depth in range(len(model.mtp_layers))
    )
    return {
        name: p
        for name, p in model.named_parameters()
        if not name.startswith(beyond or ("no such layer",))
    }


def check_gradients(
    ours: Deepseek, reference: nn.Module, tokens: Tensor, choices: list[Tensor]
) -> None:
    theirs = {name: p for name, p in reference.named_parameters() if p.numel()}
    own = trunk_parameters(ours)
    assert set(theirs) == set(own)
    whole = torch.stack([p.grad.norm() for p in theirs.values() if p.grad is not None]).norm()
    mine, other = (
        {name: None if p.grad is None else p.grad.clone() for name, p in each.items()}
        for each in (own, theirs)
    )
    exact: dict[str, Tensor] = {}
    rounding: dict[str, Tensor] = {}
    for name in own:
        if mine[name] is None or other[name] is None:
            assert all(
                gradient is None or not gradient.any() for gradient in (mine[name], other[name])
            ), name
            continue
        difference = (mine[name] - other[name]).norm()
        if difference > TOLERANCE * (other[name].norm() + 1e-3 * whole):
            # A gradient that is the small rest of large terms (two tokens' queries, the router of
            # one chosen expert, the scale of a single stream before a norm) is known no better than
            # the float32 forms compute it: ours by its distance from float64, theirs by what one
            # rounding of every module's output does to it.
            exact = exact or float64_gradients(ours, tokens, choices)
            rounding = rounding or moved_by_rounding(reference, tokens)
            if difference <= 4 * max((mine[name] - exact[name]).norm(), rounding[name]):
                continue
            # V4's clamp has a slope of one or none: where an activation is as good as at the limit,
            # rounding decides, and moving the limit by a few roundings does what the two forms
            # differ by.
            moved = [
                float64_gradients(ours, tokens, choices, 1 + step)[name] for step in (-1e-5, 1e-5)
            ]
            assert max((gradient - exact[name]).norm() for gradient in moved) >= difference / 4, (
                name
            )


# 150 tokens are more than one block of queries, 33 leave an expert more rows than it is padded to.
# With a single token the queries' gradient is exactly zero and what rounding leaves of it has
# nothing to be measured by.
LENGTHS = st.sampled_from([2, 23, 33, 150])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)  # others in each run; 200 with the slow ones
@given(data=st.data(), seed=st.integers(0, 2**31), length=LENGTHS)
def test_logits_and_gradients(
    kind: str,
    data: st.DataObject,
    seed: int,
    length: int,
    random_model,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config = data.draw(configs(kind))
    check_against_transformers(
        random_model(config, seed),
        random_tokens(config, seed, 2, length),
        tmp_path_factory.mktemp("checkpoint"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31), length=LENGTHS)
def test_logits_and_gradients_at_length(
    kind: str,
    data: st.DataObject,
    seed: int,
    length: int,
    random_model,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config = data.draw(configs(kind))
    check_against_transformers(
        random_model(config, seed),
        random_tokens(config, seed, 2, length),
        tmp_path_factory.mktemp("checkpoint"),
    )


@pytest.mark.parametrize("interleave", [True, False])
def test_mtp_layers(interleave: bool, random_model, tiny, tmp_path) -> None:
    """The hidden states of two depths against transformers' `MtpModel`, fed with the true tokens.

    Its loader supports only V3's own 61 layers, so its weights are set by name.
    """
    ours = random_model(
        tiny(num_nextn_predict_layers=2, rope_interleave=interleave, q_lora_rank=6), 21
    )
    layers, tokens = ours.config.num_hidden_layers, random_tokens(ours.config, 21, 2, 13)
    reference = load_reference(ours, tmp_path)
    theirs = MtpModel(reference, 2)
    state = {}
    for name, tensor in ours.state_dict().items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= layers:
            number, _, part = name.removeprefix("model.layers.").partition(".")
            place = {"shared_head.norm.weight": "post_norm.weight"}.get(
                part,
                part
                if part in ("enorm.weight", "hnorm.weight", "eh_proj.weight")
                else f"mtp_block.{part}",
            )
            state[f"layers.{int(number) - layers}.{place}"] = tensor
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {"embed_tokens.weight", "shared_head.weight"}

    length, cache = tokens.shape[1], MtpCache(config=theirs.config)
    with torch.no_grad():
        expected = reference.model(tokens).last_hidden_state
        got = ours.hidden(tokens).hidden_BTD
        for depth, layer in enumerate(ours.mtp_layers, start=1):
            # The last position has no next token to be given.
            expected, got = expected[:, :-1], got[:, :-1]
            positions = torch.arange(depth, length)[None].expand(2, -1)
            expected = theirs.forward_layer(
                depth - 1, expected, positions, cache, input_ids=tokens[:, depth:]
            )
            embedded = torch.nn.functional.embedding(
                tokens[:, depth:], ours.model.embed_tokens.weight
            )
            got = layer.predict(
                got, embedded, ours.sequences(tokens[:, depth:], positions - depth)
            ).hidden_BTD
            assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def logits_and_gradients(
    model: nn.Module, tokens: Tensor, **arguments: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits, and all gradients as one vector in the order of their names."""
    model.zero_grad()
    logits = model(tokens, **arguments).logits.float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    by_name = sorted(
        (name, p.grad.flatten()) for name, p in model.named_parameters() if p.grad is not None
    )
    return logits.detach(), torch.cat([gradient for _, gradient in by_name])


def test_bfloat16_is_as_near_as_transformers_autocast(random_model, tiny, tmp_path_factory) -> None:
    """Errors of logits and gradients against float32 with the routing pinned, summed over several
    models.

    Both keep the residual and the norms in float32 and round products. Over 30 models the ratios
    are 1.01 and 0.91 (autocast also rounds the router, ours also the rotation's cos and sin). The
    bound 1.05 allows for chance with fewer models.
    """
    own_errors, their_errors = torch.zeros(2), torch.zeros(2)
    for seed in range(6):
        ours = random_model(tiny(hidden_size=48, num_hidden_layers=3, q_lora_rank=12), seed)
        reference = load_reference(ours, tmp_path_factory.mktemp("checkpoint"))
        tokens = random_tokens(ours.config, seed, 4, 40)
        routing = ours.hidden(tokens).routing
        choices = [choice.indices_Nk for choice in routing]
        pin_reference(reference, choices, [choice.scores_NE for choice in routing])
        reference.compared = False
        exact = logits_and_gradients(ours, tokens, pinned=choices)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            peer = logits_and_gradients(reference, tokens)
        ours.compute_dtype = torch.bfloat16
        mine = logits_and_gradients(ours, tokens, pinned=choices)
        for total, got in ((own_errors, mine), (their_errors, peer)):
            total += torch.stack(
                [(a - b).square().sum() / b.square().sum() for a, b in zip(got, exact, strict=True)]
            )
    ratio = (own_errors / their_errors).sqrt()
    assert own_errors.min() > 0 and ratio.max() <= 1.05, ratio.tolist()


def test_save_load_save_is_bit_identical(random_model, tiny, tmp_path) -> None:
    model = random_model(tiny(num_nextn_predict_layers=1, q_lora_rank=8), 3)
    save_pretrained(model, tmp_path / "a")
    again = load_pretrained(tmp_path / "a")
    save_pretrained(again, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_an_export_without_mtp_is_the_whole_model_to_transformers(
    random_model, tiny, tmp_path
) -> None:
    model = random_model(tiny(num_nextn_predict_layers=1, tie_word_embeddings=True), 6)
    save_pretrained(model, tmp_path, mtp=False)
    reference, report = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert reference.config.num_mtp_layers == 0
    tokens = torch.arange(12)[None]
    expected = reference.eval()(tokens).logits
    for logits in (model(tokens).logits, load_pretrained(tmp_path)(tokens).logits):
        assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
