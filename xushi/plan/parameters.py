"""Exact numbers of parameters, in total and used by each token, without building the model.

Not here: the routers' correction biases and the hash layers' tables, which are buffers that no
gradient updates.
"""

from dataclasses import dataclass

from xushi.model.config import ModelConfig
from xushi.plan.layers import LAYER_PARTS, expert_parameters, hyper_head, layer_parts, mtp_joint

PARTS = ("embedding", "head", *LAYER_PARTS)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. All parts but `mtp` are of the trunk, without the multi-token prediction
    layers.

    `head` is 0 if the output matrix is the embedding itself. `active` are the parameters that one
    token uses: all but the experts that its routers did not choose. `active_without_embedding`
    leaves out the input embedding, of which a token reads one row; a tied matrix is counted, as it
    is the head.
    """

    embedding: int
    head: int
    attention: int
    indexers: int  # V3.2's and V4's; V4's with the compressors for their keys
    compressors: int  # V4's, for the attention's entries
    hyper_connections: int  # V4's, with the hyper-head
    dense_mlp: int
    routers: int
    routed_experts: int
    shared_experts: int
    norms: int  # two per layer and the final one; norms inside other parts are counted there
    active_experts: int  # the part of routed_experts that one token uses
    mtp: int  # without embedding and head, which are the trunk's

    @property
    def total(self) -> int:
        """All parameters of the trunk."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def total_with_mtp(self) -> int:
        """All parameters that training updates."""
        return self.total + self.mtp

    @property
    def active(self) -> int:
        """Parameters that one token uses, with the whole input embedding."""
        return self.total - self.routed_experts + self.active_experts

    @property
    def active_without_embedding(self) -> int:
        """Parameters that one token uses, without the input embedding."""
        return self.active - (self.embedding if self.head else 0)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of transformers' classes, and the MTP layers of the published files."""
    layers = [layer_parts(config, layer) for layer in range(config.num_hidden_layers)]
    counts = {part: sum(parts[part].total for parts in layers) for part in LAYER_PARTS}
    counts["hyper_connections"] += hyper_head(config).total
    counts["norms"] += config.hidden_size
    embedding = config.vocab_size * config.hidden_size
    sparse = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    return ParameterCount(
        embedding=embedding,
        head=0 if config.tie_word_embeddings else embedding,
        **counts,
        active_experts=sparse * config.num_experts_per_tok * expert_parameters(config),
        mtp=sum(
            mtp_layer_parameters(config, config.num_hidden_layers + depth)
            for depth in range(config.num_nextn_predict_layers)
        ),
    )


def mtp_layer_parameters(config: ModelConfig, layer: int) -> int:
    """Parameters of one MTP layer: its decoder layer and its `mtp_joint`."""
    return sum(part.total for part in layer_parts(config, layer).values()) + mtp_joint(config).total
