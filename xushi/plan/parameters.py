"""How many parameters a model has and how many of them each token uses, exactly and without
building it.

Not here: the routers' correction biases and the hashed layers' tables, which are buffers that no
gradient moves, and the time that anything takes.
"""

from dataclasses import dataclass

from xushi.model.config import ModelConfig
from xushi.plan.layers import LAYER_PARTS, expert_parameters, hyper_head, layer_parts, mtp_joint

PARTS = ("embedding", "head", *LAYER_PARTS)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. Every part but `mtp` counts the trunk, without the multi-token prediction
    layers.

    `head` is 0 where the output matrix is the embedding itself. `active` is what one token passes
    through: everything but the experts that its routers did not choose. `active_without_embedding`
    leaves out the input embedding, of which a token reads one row; a tied matrix stays counted, as
    the head.
    """

    embedding: int
    head: int
    attention: int
    indexers: int  # V3.2's and V4's, with the compressors that make the latter's keys
    compressors: int  # V4's, of the attention's own entries
    hyper_connections: int  # V4's, with what makes the streams one before the head
    dense_mlp: int
    routers: int
    routed_experts: int
    shared_experts: int
    norms: int  # of the layers and the final one; those inside other parts are counted there
    active_experts: int  # of routed_experts, those that one token passes through
    mtp: int  # embedding and head are the trunk's and not counted again

    @property
    def total(self) -> int:
        """All of the trunk."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def total_with_mtp(self) -> int:
        """Everything that training updates."""
        return self.total + self.mtp

    @property
    def active(self) -> int:
        """What one token passes through, the input embedding counted whole."""
        return self.total - self.routed_experts + self.active_experts

    @property
    def active_without_embedding(self) -> int:
        """What one token passes through, the input embedding not counted."""
        return self.active - (self.embedding if self.head else 0)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count as transformers' classes have them, and the MTP layers as the published files have
    them.
    """
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
    """One MTP layer: a decoder layer, what joins it to the depth before, and its own norm and in V4
    hyper-head.
    """
    return sum(part.total for part in layer_parts(config, layer).values()) + mtp_joint(config).total
