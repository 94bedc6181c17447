"""Rules between a training stage's table and the rest of the recipe; each raises ValueError."""

from xushi.model import ModelConfig
from xushi.train import ObjectiveConfig, PretrainConfig


def check_batch(config: PretrainConfig, sequence_length: int) -> None:
    """A batch of pretraining consists of whole sequences."""
    for name in ("batch_tokens", "batch_tokens_first"):
        tokens = getattr(config, name) or 0
        if tokens % sequence_length:
            raise ValueError(
                f"pretrain.{name}={tokens} is not a multiple of "
                f"data.sequence_length={sequence_length}"
            )


def check_length(name: str, sequence_length: int, model: ModelConfig) -> None:
    """A sequence fits into the model's context. `name` is the key that gives its length."""
    if sequence_length > model.max_position_embeddings:
        raise ValueError(
            f"{name}: a sequence of {sequence_length} tokens exceeds "
            f"model.max_position_embeddings={model.max_position_embeddings}"
        )


def check_model_training(stage: str, config: ObjectiveConfig, model: ModelConfig) -> None:
    """The objective of `stage` fits the kind of model."""
    if config.qk_clip is not None and model.is_v4:
        raise ValueError(
            f"{stage}.qk_clip is not for deepseek_v4, which normalises queries and keys"
        )
    warmup = isinstance(config, PretrainConfig) and config.indexer_warmup_steps
    if warmup and not (model.has_indexer and config.indexer_weight):
        raise ValueError(
            f"{stage}.indexer_warmup_steps needs a model with indexers (deepseek_v32, or "
            "deepseek_v4 with sparse layers) and an indexer_weight above 0"
        )
    experts = any(model.is_moe(layer) for layer in range(model.num_hidden_layers))
    # A router without a bias is balanced by the balance loss alone.
    balanced = model.has_router_bias or config.balance_weight or config.allow_unbalanced
    if experts and not balanced:
        raise ValueError(
            f"{stage} would train the experts of a {model.model_type} unbalanced: its router has "
            f"no bias and there is no balance loss; set {stage}.allow_unbalanced = true if that "
            "is wanted"
        )
