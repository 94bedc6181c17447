"""What a DeepSeek is trained to minimise: next-token loss, the MTP losses, the balance loss, and
the indexer's own.

Axes: B batch, T tokens, D hidden, N = B*T, E experts, k experts per token, G segments of a batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xushi.base.errors import BadInput
from xushi.model.batch import Batch
from xushi.model.deepseek import Deepseek, Hidden
from xushi.ops import RouterChoice, cross_entropy


@dataclass(frozen=True)
class LossParts:
    """`total` is what is differentiated; the rest are its parts, unweighted, and the experts' loads
    [E] per router.

    `residual` is what the next stage of a pipeline takes in, where there is one.
    """

    total: Tensor
    next_token: Tensor
    mtp: Tensor
    balance: Tensor
    indexer: Tensor
    loads: dict[str, Tensor]
    residual: Tensor | None = None


@dataclass(frozen=True)
class LossCounts:
    """What the losses of a batch are means over, as float64 scalars: a batch that is spread over
    processes has the sum of theirs, and then its processes' losses add up to the whole's.

    `targets` of the next token and of each MTP depth; `fed`: the tokens that the trunk's layers and
    each MTP layer take in.
    """

    targets: Tensor
    fed: Tensor

    @classmethod
    def of(cls, batch: Batch, depths: int) -> "LossCounts":
        """Of one batch, for a model with so many MTP depths: [1 + depths] each."""
        segments, mask = batch.segments, batch.loss_mask
        targets = [
            mask.sum(),
            *(_mtp_targets(mask, segments, depth).sum() for depth in range(1, depths + 1)),
        ]
        fed = [
            (segments >= 0).sum(),
            *((_mtp_fed(segments, depth) >= 0).sum() for depth in range(1, depths + 1)),
        ]
        return cls(torch.stack(targets).double(), torch.stack(fed).double())


def _same_segment(segments_BT: Tensor, ahead: int) -> Tensor:
    """Whether the token so many places ahead belongs to the same segment."""
    same = torch.roll(segments_BT, -ahead, dims=1) == segments_BT
    same[:, same.shape[1] - ahead :] = False
    return same


def _mtp_targets(mask_BT: Tensor, segments_BT: Tensor, depth: int) -> Tensor:
    """Where MTP depth `depth` has a loss: its target is in the segment and trained on."""
    return torch.roll(mask_BT, -depth, dims=1) & _same_segment(segments_BT, depth)


def _mtp_fed(segments_BT: Tensor, depth: int) -> Tensor:
    """The segments that MTP layer `depth` takes in; -1 where its input is padding or another
    document's.
    """
    return segments_BT.where(_same_segment(segments_BT, depth - 1), -1)


def _mean_over(mask: Tensor, count: Tensor) -> Tensor:
    """Weights that make a sum over the mask a mean over `count`."""
    return mask.to(torch.float32) / count.clamp(min=1).float()


def next_token_loss(
    model: Deepseek, hidden_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor
) -> Tensor:
    """sum of weight * -log p(target): a scalar, through the chunked head."""
    dtype = model.compute_dtype or hidden_BTD.dtype
    return cross_entropy(
        hidden_BTD.flatten(0, 1).to(dtype),
        model.head_VD,
        targets_BT.flatten(),
        weights_BT.flatten(),
    )


def expert_loads(choice: RouterChoice, valid_N: Tensor) -> Tensor:
    """How many of the valid tokens chose each expert: [E] float32."""
    experts = choice.scores_NE.shape[1]
    chosen = choice.indices_Nk[valid_N].flatten()
    return torch.bincount(chosen, minlength=experts).float()


def sequence_balance_loss(
    choice: RouterChoice, segments_BT: Tensor, count: Tensor | None = None
) -> Tensor:
    """V3's complementary loss (eqs. 17-20) before its factor alpha: sum over experts of f_e P_e,
    per document.

    f_e = E / (k n) * tokens of the document that chose e; P_e = their mean normalised score.
    Documents are weighted by their length n, so a packed batch has the loss of its documents run
    alone; padding (segment -1) is left out. `count` is how many tokens the whole batch has where
    these are a part of it.
    """
    scores_NE, indices_Nk = choice.scores_NE, choice.indices_Nk
    experts, per_token = scores_NE.shape[1], indices_Nk.shape[1]
    rows = segments_BT.shape[0]
    documents = int(segments_BT.max()) + 2  # the last one takes the padding
    row = torch.arange(rows, device=segments_BT.device)[:, None] * documents
    document_N = (row + segments_BT.remainder(documents)).flatten()
    valid_N = (segments_BT >= 0).flatten().to(scores_NE.dtype)
    groups = rows * documents
    share_NE = scores_NE / (scores_NE.sum(-1, keepdim=True) + 1e-20) * valid_N[:, None]
    tokens_G = valid_N.new_zeros(groups).index_add_(0, document_N, valid_N)
    mean_share_GE = (
        share_NE.new_zeros(groups, experts).index_add(0, document_N, share_NE)
        / tokens_G.clamp(min=1)[:, None]
    )
    cell = (document_N[:, None] * experts + indices_Nk).flatten()
    weight = valid_N[:, None].expand(-1, per_token).flatten()
    count_GE = weight.new_zeros(groups * experts).index_add_(0, cell, weight).view(groups, experts)
    fraction_GE = count_GE * experts / (per_token * tokens_G.clamp(min=1)[:, None])
    per_document = (fraction_GE * mean_share_GE).sum(-1)
    return (per_document * tokens_G).sum() / (
        tokens_G.sum() if count is None else count.float()
    ).clamp(min=1)


def indexer_loss(divergences: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """V3.2's (arXiv:2512.02556, eqs. 3 and 4): KL of the indexer from the attention, a mean over
    tokens, summed over layers.

    Each layer's divergence [B, T] comes with the segments [B, T] it counts for and how many tokens
    that is in the whole batch. The paper sums over tokens.
    """
    return torch.stack(
        [(d_BT * _mean_over(s_BT >= 0, count)).sum() for d_BT, s_BT, count in divergences]
    ).sum()


@dataclass(frozen=True)
class _Routed:
    """A layer's routing with the segments [B, T] it counts for (-1 where its input is padding or
    another document's), and how many tokens that is in the whole batch.
    """

    choice: RouterChoice
    segments_BT: Tensor
    count: Tensor


def _mtp_losses(
    model: Deepseek, trunk: Hidden, batch: Batch, counts: LossCounts
) -> tuple[list[Tensor], dict[str, _Routed], list[tuple[Tensor, Tensor, Tensor]]]:
    """Each depth's mean loss, the routing of its layer and its indexer's divergence.

    At depth d the input at place i is the embedding of token i+d and the target is token i+d+1,
    both read from `targets`; places whose i+d+1 leaves the segment, or is not trained on, have no
    loss.
    """
    targets, segments, carried = batch.targets, batch.segments, trunk.carried
    losses: list[Tensor] = []
    routing: dict[str, _Routed] = {}
    divergences: list[tuple[Tensor, Tensor, Tensor]] = []
    for depth, layer in enumerate(model.mtp_layers, start=1):
        embedded = F.embedding(
            torch.roll(targets, 1 - depth, dims=1), model.model.embed_tokens.weight
        )
        predicted = model.block(layer.predict, carried, embedded, trunk.sequences)
        carried = predicted.carried
        valid = _mtp_targets(batch.loss_mask, segments, depth)
        losses.append(
            next_token_loss(
                model,
                predicted.hidden_BTD,
                torch.roll(targets, -depth, dims=1),
                _mean_over(valid, counts.targets[depth]),
            )
        )
        fed = _mtp_fed(segments, depth)
        if predicted.choice is not None:
            name = str(model.config.num_hidden_layers + depth - 1)
            routing[name] = _Routed(predicted.choice, fed, counts.fed[depth])
        if predicted.divergence_BT is not None:
            divergences.append((predicted.divergence_BT, fed, counts.fed[depth]))
    return losses, routing, divergences


def pretraining_loss(
    model: Deepseek,
    batch: Batch,
    *,
    mtp_weight: float,
    balance_weight: float,
    indexer_weight: float = 1.0,
    indexer_warmup: bool = False,
    counts: LossCounts | None = None,
    residual: Tensor | None = None,
) -> LossParts:
    """L = next token + mtp_weight / depths * sum of MTP losses + balance_weight * sum of balance
    losses over layers + indexer_weight * sum of the indexers' losses over layers, where there are
    indexers.

    With `indexer_warmup` attention is dense and the indexers' loss is all that is differentiated
    (V3.2, section 2.1.1). `batch` has the design's tensors: tokens, targets, positions, segments
    (int64) and loss_mask (bool), all [B, T]. Every loss is a mean over its target tokens (V3, eqs.
    17-20 and 24-25). An MTP depth with nothing to predict gives zero. `counts` are those of the
    whole batch where this is a part of it; then the parts' losses and gradients add up to the
    whole's. So do those of a pipeline's stages, whose `residual` comes from the stage before.
    """
    counts = counts or LossCounts.of(batch, model.config.num_nextn_predict_layers)
    index_loss = model.config.has_indexer and indexer_weight > 0
    trunk = model.hidden(
        batch.tokens,
        batch.positions,
        batch.segments,
        dense=indexer_warmup,
        index_loss=index_loss,
        residual=residual,
    )
    next_token = (
        next_token_loss(
            model,
            trunk.hidden_BTD,
            batch.targets,
            _mean_over(batch.loss_mask, counts.targets[0]),
        )
        if model.ends
        else trunk.hidden_BTD.new_zeros(())
    )
    names = [name for name in model.routers() if int(name) < model.config.num_hidden_layers]
    routing = {
        name: _Routed(choice, batch.segments, counts.fed[0])
        for name, choice in zip(names, trunk.routing, strict=True)
    }
    divergences = [
        (divergence_BT, batch.segments, counts.fed[0]) for divergence_BT in trunk.index_divergence
    ]
    mtp = balance = indexer = next_token.new_zeros(())
    if model.mtp_layers and mtp_weight:
        losses, mtp_routing, mtp_divergences = _mtp_losses(model, trunk, batch, counts)
        mtp = torch.stack(losses).mean()
        routing |= mtp_routing
        divergences += mtp_divergences
    if routing and balance_weight:
        learnt = [r for name, r in routing.items() if not model.config.is_hash_routed(int(name))]
        balance = sum(
            (sequence_balance_loss(r.choice, r.segments_BT, r.count) for r in learnt), start=balance
        )
    loads = {
        name: expert_loads(r.choice, (r.segments_BT >= 0).flatten()) for name, r in routing.items()
    }
    if divergences:
        indexer = indexer_loss(divergences)
    elif indexer_warmup and model.begins and model.ends:
        raise BadInput(
            "indexer_warmup_steps without an indexer that learns",
            "it is for deepseek_v32 models and "
            "deepseek_v4 models with sparse layers, and for an indexer_weight above 0",
        )
    total = indexer_weight * indexer
    if not indexer_warmup:
        total = next_token + mtp_weight * mtp + balance_weight * balance + total
    return LossParts(
        total,
        next_token.detach(),
        mtp.detach(),
        balance.detach(),
        indexer.detach(),
        loads,
        None if model.ends else trunk.hidden_BTD,
    )
