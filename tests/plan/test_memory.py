"""The estimate of training memory against what autograd keeps and what the optimizers hold."""

import pytest
import torch

from xushi.model import PRESETS, Batch, LossWeights, preset
from xushi.model.config import ModelConfig
from xushi.model.deepseek import Deepseek
from xushi.model.objective import pretraining_loss
from xushi.ops import attention, loss, native
from xushi.plan import activations, count_parameters, memory, training_memory_bytes

SMALL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=32,
    kv_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)
TOKENS = 1024  # of a pass: two rows of 512, so that a row too many or too few would show
PLAIN_V4 = {"compress_ratios": [0, 0, 0, 0], "hc_mult": 1, "hc_sinkhorn_iters": 3}


@pytest.fixture(autouse=True)
def pytorch_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the PyTorch forms, which the estimate describes; the compiled forms keep less."""
    monkeypatch.setenv("XUSHI_OPS", "pytorch")


def kept_by_autograd(
    config: ModelConfig,
    rows: int,
    length: int,
    mtp: bool,
    indexer_weight: float = 1.0,
    compute: str = "fp32",
    documents: int = 1,
    recompute: bool = False,
) -> int:
    """Bytes that one forward pass keeps in addition to the parameters, with rows of `documents`
    packed documents.
    """
    model = Deepseek(config).initialise(0)
    model.recompute = recompute
    model.compute_dtype = torch.bfloat16 if compute == "bf16" else None
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(
        config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)
    )
    segments, positions = torch.arange(length) * documents // length, torch.arange(length)
    for document in range(documents):
        positions[segments == document] -= int(positions[segments == document][0])
    batch = Batch(
        tokens=tokens,
        targets=tokens.roll(-1, 1),
        positions=positions.expand(rows, length),
        segments=segments.expand(rows, length),
        loss_mask=torch.ones_like(tokens, dtype=torch.bool),
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = pretraining_loss(
            model, batch, LossWeights(0.1 if mtp else 0.0, 1e-4, indexer_weight)
        )
    assert loss.total.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("changes", "mtp"), [
    ({}, True), ({}, False), ({"q_lora_rank": None}, True), ({"v_head_dim": 40, "n_shared_experts": 2}, False),
    ({"first_k_dense_replace": 3}, False),
])  # fmt: skip
@pytest.mark.parametrize("length", [100, 200, 512])
def test_activations_are_what_autograd_keeps(changes, mtp, length):
    config, rows = SMALL.model_copy(update=changes), TOKENS // length
    estimate = training_memory_bytes(config, rows * length, length, mtp=mtp)
    head_gradients = (2 if mtp else 1) * 4 * config.vocab_size * config.hidden_size
    assert estimate.activations + head_gradients == pytest.approx(
        kept_by_autograd(config, rows, length, mtp), rel=0.08
    )


@pytest.mark.parametrize(("kind", "changes", "mtp", "indexer_weight"), [
    ("deepseek_v32", {}, True, 1.0), ("deepseek_v32", {}, False, 0.0),
    ("deepseek_v32", {"index_topk": 600}, False, 1.0),
    ("deepseek_v4", {}, True, 1.0), ("deepseek_v4", {}, False, 0.0), ("deepseek_v4", PLAIN_V4, True, 1.0),
    ("deepseek_v4", {"hidden_size": 128, "compress_ratios": [4, 16, 16, 0], "hc_mult": 4}, False, 1.0),
    ("deepseek_v4", {"compress_ratios": [4, 4, 4, 4], "head_dim": 64, "hc_sinkhorn_iters": 2}, True, 1.0),
])  # fmt: skip
@pytest.mark.parametrize("length", [100, 512])
def test_activations_of_newer_kinds_are_what_autograd_keeps(
    kind, changes, mtp, indexer_weight, length, small_of
):
    config, rows = small_of(kind, **changes), TOKENS // length
    estimate = training_memory_bytes(
        config, rows * length, length, mtp=mtp, indexer_loss=indexer_weight > 0
    )
    head_gradients = (2 if mtp else 1) * 4 * config.vocab_size * config.hidden_size
    kept = kept_by_autograd(config, rows, length, mtp, indexer_weight)
    assert estimate.activations + head_gradients == pytest.approx(kept, rel=0.08)


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
@pytest.mark.parametrize(
    ("compute", "documents", "length"),
    [("bf16", 1, 200), ("fp32", 3, 512), pytest.param("bf16", 3, 1024, marks=pytest.mark.slow)],
)
def test_activations_of_packed_rows_and_in_bf16(kind, compute, documents, length, small_of):
    config, rows = small_of(kind), TOKENS // length
    mtp = bool(config.num_nextn_predict_layers)
    estimate = training_memory_bytes(config, rows * length, length, compute=compute)
    head_gradients = (2 if mtp else 1) * 4 * config.vocab_size * config.hidden_size
    # 2 of the weights' 6 bytes per parameter are copies, which autograd also keeps.
    copies = estimate.weights // 3 if compute == "bf16" else 0
    kept = kept_by_autograd(config, rows, length, mtp, compute=compute, documents=documents)
    assert estimate.activations + head_gradients + copies == pytest.approx(kept, rel=0.08)


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_layer_more_costs_its_input_alone_where_layers_are_recomputed(kind, compute, small_of):
    """It also keeps its router's scores, for the balance loss."""
    length = 300
    few, many = (
        small_of(
            kind,
            num_hidden_layers=layers,
            num_nextn_predict_layers=0,
            **(
                {"compress_ratios": [4] * layers}
                if kind == "deepseek_v4"
                else {"first_k_dense_replace": 0}
            ),
        )
        for layers in (2, 6)
    )
    estimates = [
        training_memory_bytes(
            config, 2 * length, length, compute=compute, mtp=False, recompute=True
        ).activations
        for config in (few, many)
    ]
    kept = [
        kept_by_autograd(config, 2, length, False, compute=compute, recompute=True)
        for config in (few, many)
    ]
    assert estimates[1] - estimates[0] == pytest.approx(kept[1] - kept[0], rel=0.08)
    assert kept[1] < kept_by_autograd(many, 2, length, False, compute=compute) / 3


@pytest.mark.skipif(native.load() is None, reason=native.status())
@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
@pytest.mark.parametrize("length", [100, 512])
def test_compiled_forms_keep_no_more(kind, length, small_of, monkeypatch):
    config = small_of(kind)
    mtp = bool(config.num_nextn_predict_layers)
    slower = kept_by_autograd(config, 2, length, mtp)
    monkeypatch.delenv("XUSHI_OPS")
    assert kept_by_autograd(config, 2, length, mtp) < slower


@pytest.mark.parametrize(("kind", "changes"), [
    ("deepseek_v3", {}), ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v3", {"tie_word_embeddings": True}), ("deepseek_v32", {}), ("deepseek_v4", {}),
    ("deepseek_v4", {"tie_word_embeddings": True, "num_hash_layers": 0})])  # fmt: skip
@pytest.mark.parametrize("mtp", [True, False])
def test_weights_and_states_are_exact(kind, changes, mtp, small_of):
    ratios = {"compress_ratios": [0, 4, 16, 4][: 3 + mtp]} if kind == "deepseek_v4" else {}
    config = small_of(kind, **changes, **ratios, num_nextn_predict_layers=int(mtp))
    named = dict(Deepseek(config).named_parameters())
    matrices = sum(
        p.numel()
        for name, p in named.items()
        if p.dim() >= 2
        and not name.endswith("bias")
        and "embed_tokens" not in name
        and "lm_head" not in name
    )
    everything = sum(p.numel() for p in named.values())
    adamw = training_memory_bytes(config, 1, 1, "adamw")
    muon = training_memory_bytes(config, 1, 1, "muon")
    assert adamw.weights == adamw.gradients == 4 * everything
    assert adamw.optimizer == 8 * everything
    assert muon.optimizer == 8 * (everything - matrices) + 4 * matrices
    assert training_memory_bytes(config, 1, 1, "muon", "bf16").weights == 6 * everything


def test_memory_grows_with_the_batch_only_where_it_should():
    small, large = training_memory_bytes(SMALL, 4096, 512), training_memory_bytes(SMALL, 8192, 512)
    assert large.activations == 2 * small.activations and large.logits == small.logits
    assert large.total - small.total == small.activations
    assert training_memory_bytes(SMALL, 4096, 512, compute="bf16").activations < small.activations


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_an_estimate(name):
    """Weights, gradients and Muon's state are 12 bytes per parameter; the activations of 4,096
    tokens are less than that.
    """
    total = training_memory_bytes(preset(name), 4096, 4096).total
    assert 12 < total / count_parameters(preset(name)).total < 24


def test_the_ops_numbers_are_the_ops():
    """The constants are copied, so that planning does not import torch."""
    assert (memory.LOGIT_ROWS, activations.QUERY_BLOCK, activations.KEEP_WEIGHTS) == (
        loss.CHUNK,
        attention.QUERY_BLOCK,
        attention.KEEP_WEIGHTS,
    )
