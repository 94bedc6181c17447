"""How many parameters a model has and how many of them each token uses, exactly and without building it.

Not here: the routers' correction biases, which are buffers that no gradient moves, and the time that anything takes.
"""

from dataclasses import dataclass

from xushi.model.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. Every part but `mtp` counts the trunk, without the multi-token prediction layers.

    `head` is 0 where the output matrix is the embedding itself. `active` is what one token passes through: everything
    but the experts that its routers did not choose. `active_without_embedding` leaves out the input embedding, of which
    a token reads one row; a tied matrix stays counted, as the head.
    """

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    routers: int
    routed_experts: int
    shared_experts: int
    norms: int  # of the layers and the final one; the latents' own norms are attention's
    active_experts: int  # of routed_experts, those that one token passes through
    mtp: int  # embedding and head are the trunk's and not counted again

    @property
    def total(self) -> int:
        """All of the trunk."""
        return (self.embedding + self.head + self.attention + self.dense_mlp + self.routers + self.routed_experts
                + self.shared_experts + self.norms)

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
    """Count as transformers' `DeepseekV3ForCausalLM` has them, and the MTP layers as the published files have them."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    dense = min(config.first_k_dense_replace, layers)
    sparse = layers - dense
    expert = expert_parameters(config)
    embedding = config.vocab_size * hidden
    return ParameterCount(
        embedding=embedding,
        head=0 if config.tie_word_embeddings else embedding,
        attention=layers * attention_parameters(config),
        dense_mlp=dense * 3 * hidden * config.intermediate_size,
        routers=sparse * config.n_routed_experts * hidden,
        routed_experts=sparse * config.n_routed_experts * expert,
        shared_experts=sparse * config.n_shared_experts * expert,
        norms=(2 * layers + 1) * hidden,
        active_experts=sparse * config.num_experts_per_tok * expert,
        mtp=sum(mtp_layer_parameters(config, layers + depth) for depth in range(config.num_nextn_predict_layers)))


def expert_parameters(config: ModelConfig) -> int:
    """Gate, up and down of one expert."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def attention_matrices(config: ModelConfig) -> int:
    """Weights of one layer's MLA that multiply a token (V2, arXiv:2405.04434, section 2.1): no biases, no norms."""
    heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
    if config.q_lora_rank is None:
        query = hidden * heads * config.qk_head_dim
    else:
        query = config.q_lora_rank * (hidden + heads * config.qk_head_dim)
    return (query + hidden * (latent + config.qk_rope_head_dim)
            + latent * heads * (config.qk_nope_head_dim + config.v_head_dim)
            + heads * config.v_head_dim * hidden)


def attention_parameters(config: ModelConfig) -> int:
    """One layer's MLA with its latent norms and, where asked for, biases."""
    norms = config.kv_lora_rank + (config.q_lora_rank or 0)
    biases = 0
    if config.attention_bias:
        # The published code gives a bias to both down projections and the output; a full query projection has none.
        biases = config.kv_lora_rank + config.qk_rope_head_dim + config.hidden_size + (config.q_lora_rank or 0)
    return attention_matrices(config) + norms + biases


def feed_forward_parameters(config: ModelConfig, layer: int) -> int:
    """The second half of layer `layer`: a dense MLP, or router, routed and shared experts."""
    if not config.is_moe(layer):
        return 3 * config.hidden_size * config.intermediate_size
    experts = (config.n_routed_experts + config.n_shared_experts) * expert_parameters(config)
    return config.n_routed_experts * config.hidden_size + experts


def mtp_layer_parameters(config: ModelConfig, layer: int) -> int:
    """One MTP layer: a decoder layer, the joining projection, and the norms of both inputs and of the output."""
    hidden = config.hidden_size
    decoder = attention_parameters(config) + feed_forward_parameters(config, layer) + 2 * hidden
    return decoder + 2 * hidden * hidden + 3 * hidden
