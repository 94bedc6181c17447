"""Arithmetic per token: FLOPs of matrix products, two per multiplication and addition.

Products are those with weights, and attention's with keys and values, index scores included. Left
out, as in published figures, is what takes a few operations per value: norms, activations, softmax,
rotation, and the sums over a handful of weighted values (a compression window's, V4's residual
streams', an indexer's heads). How long the arithmetic takes on some machine is not here.
"""

from xushi.model.config import ModelConfig
from xushi.plan.layers import expert_parameters, hyper_head, index_query_weights, layer_parts
from xushi.plan.reach import Reach, attention_reaches, index_reach


def train_flops_per_token(config: ModelConfig, context: int, mtp: bool = True) -> float:
    """FLOPs to train on one token in documents of `context` tokens, forward and backward (three
    times the forward).

    Attention is causal and averaged over a document's positions: where it is dense, a token sees
    half of its document; where an indexer chooses, the chosen keys, while the indexer scores all
    before. Indexers count like everything else, although their inputs need no gradient and their
    loss's target is read off the attention. With `mtp`, each MTP layer adds its own decoder layer,
    its joining products and the use of the head. Nothing is recomputed.
    """
    layers = list(range(config.num_hidden_layers))
    head = config.vocab_size * config.hidden_size
    multiplied = head + hyper_head(config).products
    if mtp:
        depths = config.num_nextn_predict_layers
        layers += [config.num_hidden_layers + depth for depth in range(depths)]
        multiplied += depths * (_joint_products(config) + head)
    multiplied += sum(_layer_products(config, layer) for layer in layers)
    met: list[Reach | None] = []
    for layer in layers:
        met += [*attention_reaches(config, layer, absorbed=False), index_reach(config, layer)]
    return 6.0 * (
        multiplied + sum(reach.width * reach.mean(context) for reach in met if reach is not None)
    )


def decode_flops_per_token(config: ModelConfig, context: int) -> float:
    """FLOPs to generate one token at the end of `context`, MLA working on the latents themselves.

    MLA's expansions are applied to the query and the output instead of to every cached token (V2,
    section 2.1.2): the same weights once per token. An indexer makes its keys always, and queries
    and scores only where there are more keys than it may choose. Completing a compression window is
    no product.
    """
    multiplied = config.vocab_size * config.hidden_size + hyper_head(config).products
    for layer in range(config.num_hidden_layers):
        multiplied += _layer_products(config, layer)
        multiplied += sum(
            reach.width * reach.at(context)
            for reach in attention_reaches(config, layer, absorbed=True)
        )
        if (index := index_reach(config, layer)) is None:
            continue
        scored = index.at(context)
        multiplied += (
            index.width * scored if scored > config.index_topk else -index_query_weights(config)
        )
    return 2.0 * multiplied


def _layer_products(config: ModelConfig, layer: int) -> int:
    """Weights of decoder layer `layer` that multiply one token."""
    parts = layer_parts(config, layer)
    routed = config.num_experts_per_tok * expert_parameters(config) if config.is_moe(layer) else 0
    return routed + sum(part.products for name, part in parts.items() if name != "routed_experts")


def _joint_products(config: ModelConfig) -> int:
    """What an MTP layer multiplies beside its decoder layer: V4 projects every stream of the depth
    before.
    """
    joined = 1 + config.hc_mult if config.is_v4 else 2
    return joined * config.hidden_size**2 + hyper_head(config).products
