"""FLOPs per token. Only matrix products count, with two FLOPs per multiply-add.

Counted: products with weights, and attention's products with keys and values, index scores
included. Not counted, as in published figures: what takes a few operations per value (norms,
activations, softmax, rotations) and short weighted sums (over a compression window, over V4's
residual streams, over an indexer's heads).

Not here: how long this takes on a machine.
"""

from xushi.model.config import ModelConfig
from xushi.plan.layers import expert_parameters, hyper_head, index_query_weights, layer_parts
from xushi.plan.reach import Reach, attention_reaches, index_reach


def train_flops_per_token(config: ModelConfig, context: int, mtp: bool = True) -> float:
    """FLOPs to train on one token in documents of `context` tokens: forward and backward, three
    times the forward.

    Attention is causal, and its keys are averaged over a document's positions: in dense attention a
    token attends to half of its document; with an indexer it attends to the chosen keys, while the
    indexer scores all earlier ones. An indexer's backward also counts as twice its forward,
    although its inputs need no gradient. With `mtp`, each MTP layer adds its decoder layer, its
    joining products and another use of the head. Recomputation is not counted.
    """
    layers = list(range(config.num_hidden_layers))
    head = config.vocab_size * config.hidden_size
    multiplied = head + hyper_head(config).products
    if mtp:
        depths = config.num_nextn_predict_layers
        layers += [config.num_hidden_layers + depth for depth in range(depths)]
        multiplied += depths * (_joint_products(config) + head)
    multiplied += sum(_layer_products(config, layer) for layer in layers)
    reaches: list[Reach | None] = []
    for layer in layers:
        reaches += [*attention_reaches(config, layer, absorbed=False), index_reach(config, layer)]
    return 6.0 * (
        multiplied
        + sum(reach.width * reach.mean(context) for reach in reaches if reach is not None)
    )


def decode_flops_per_token(config: ModelConfig, context: int) -> float:
    """FLOPs to generate one token at the end of `context`, with MLA working on latents.

    MLA's expansions are applied to the query and to the output, not to every cached token (V2,
    section 2.1.2), so their weights count once per token. An indexer always computes its key, but
    queries and scores only if there are more keys than it may choose. Completing a compression
    window needs no matrix product.
    """
    multiplied = config.vocab_size * config.hidden_size + hyper_head(config).products
    for layer in range(config.num_hidden_layers):
        multiplied += _layer_products(config, layer)
        multiplied += sum(
            reach.width * reach.at(context)
            for reach in attention_reaches(config, layer, absorbed=True)
        )
        index = index_reach(config, layer)
        if index is None:
            continue
        scored = index.at(context)
        if scored > config.index_topk:
            multiplied += index.width * scored
        else:
            multiplied -= index_query_weights(config)
    return 2.0 * multiplied


def _layer_products(config: ModelConfig, layer: int) -> int:
    """Weights of decoder layer `layer` that multiply each token."""
    parts = layer_parts(config, layer)
    routed = config.num_experts_per_tok * expert_parameters(config) if config.is_moe(layer) else 0
    return routed + sum(part.products for name, part in parts.items() if name != "routed_experts")


def _joint_products(config: ModelConfig) -> int:
    """Multiply-adds of an MTP layer beyond its decoder layer. V4 projects every stream of the
    previous depth.
    """
    joined = 1 + config.hc_mult if config.is_v4 else 2
    return joined * config.hidden_size**2 + hyper_head(config).products
