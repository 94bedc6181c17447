"""What DeepSeek-V3 is trained to minimise: next-token loss, the MTP losses and the sequence-wise balance loss.

Axes: B batch, T tokens, D hidden, N = B*T, E experts, k experts per token, G segments of a batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xushi.model.deepseek import Deepseek
from xushi.ops import RouterChoice, cross_entropy
from xushi.ops.attention import segment_mask


@dataclass(frozen=True)
class LossParts:
    """`total` is what is differentiated; the rest are its parts, unweighted, and the experts' loads [E] per router."""

    total: Tensor
    next_token: Tensor
    mtp: Tensor
    balance: Tensor
    loads: dict[str, Tensor]


def next_token_loss(model: Deepseek, hidden_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """sum of weight * -log p(target): a scalar, through the chunked head."""
    dtype = model.compute_dtype or hidden_BTD.dtype
    return cross_entropy(hidden_BTD.flatten(0, 1).to(dtype), model.head_VD, targets_BT.flatten(),
                         weights_BT.flatten())


def expert_loads(choice: RouterChoice, valid_N: Tensor) -> Tensor:
    """How many of the valid tokens chose each expert: [E] float32."""
    experts = choice.scores_NE.shape[1]
    chosen = choice.indices_Nk[valid_N].flatten()
    return torch.bincount(chosen, minlength=experts).float()


def sequence_balance_loss(choice: RouterChoice, segments_BT: Tensor) -> Tensor:
    """V3's complementary loss (eqs. 17-20) before its factor alpha: sum over experts of f_e P_e, per document.

    f_e = E / (k n) * tokens of the document that chose e; P_e = their mean normalised score. Documents are weighted
    by their length n, so a packed batch has the loss of its documents run alone; padding (segment -1) is left out.
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
    mean_share_GE = share_NE.new_zeros(groups, experts).index_add(0, document_N, share_NE) / tokens_G.clamp(
        min=1)[:, None]
    cell = (document_N[:, None] * experts + indices_Nk).flatten()
    weight = valid_N[:, None].expand(-1, per_token).flatten()
    count_GE = weight.new_zeros(groups * experts).index_add_(0, cell, weight).view(groups, experts)
    fraction_GE = count_GE * experts / (per_token * tokens_G.clamp(min=1)[:, None])
    per_document = (fraction_GE * mean_share_GE).sum(-1)
    return (per_document * tokens_G).sum() / tokens_G.sum().clamp(min=1)


@dataclass(frozen=True)
class _Routed:
    """A layer's routing with the segments [B, T] it counts for: -1 where its input is padding or another document's."""

    choice: RouterChoice
    segments_BT: Tensor


def _mtp_losses(model: Deepseek, hidden_BTD: Tensor, batch: dict[str, Tensor]) -> tuple[list[Tensor],
                                                                                       dict[str, _Routed]]:
    """Each depth's mean loss, and the routing of its layer.

    At depth d the input at place i is the embedding of token i+d and the target is token i+d+1, both read from
    `targets`; places whose i+d+1 leaves the segment, or is not trained on, have no loss.
    """
    targets, segments = batch["targets"], batch["segments"]
    cos, sin = model.angles(batch["positions"])
    mask = segment_mask(segments)
    losses: list[Tensor] = []
    routing: dict[str, _Routed] = {}

    def same_segment(ahead: int) -> Tensor:
        same = torch.roll(segments, -ahead, dims=1) == segments
        same[:, same.shape[1] - ahead:] = False
        return same

    for depth, layer in enumerate(model.mtp_layers, start=1):
        embedded = F.embedding(torch.roll(targets, 1 - depth, dims=1), model.model.embed_tokens.weight)
        hidden_BTD, choice = layer.predict(hidden_BTD, embedded, cos, sin, mask,
                                           model.compute_dtype or hidden_BTD.dtype)
        valid = torch.roll(batch["loss_mask"], -depth, dims=1) & same_segment(depth)
        losses.append(next_token_loss(model, hidden_BTD, torch.roll(targets, -depth, dims=1), _mean_weights(valid)))
        if choice is not None:
            name = str(model.config.num_hidden_layers + depth - 1)
            routing[name] = _Routed(choice, segments.where(same_segment(depth - 1), -1))
    return losses, routing


def _mean_weights(mask: Tensor) -> Tensor:
    return mask.to(torch.float32) / mask.sum().clamp(min=1)


def pretraining_loss(model: Deepseek, batch: dict[str, Tensor], *, mtp_weight: float, balance_weight: float
                     ) -> LossParts:
    """L = next token + mtp_weight / depths * sum of MTP losses + balance_weight * sum of balance losses over layers.

    `batch` has the design's tensors: tokens, targets, positions, segments (int64) and loss_mask (bool), all [B, T].
    Every loss is a mean over its target tokens (V3, eqs. 17-20 and 24-25). An MTP depth with nothing to predict
    gives zero.
    """
    trunk = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
    next_token = next_token_loss(model, trunk.hidden_BTD, batch["targets"], _mean_weights(batch["loss_mask"]))
    names = [name for name in model.routers() if int(name) < model.config.num_hidden_layers]
    routing = {name: _Routed(choice, batch["segments"]) for name, choice in zip(names, trunk.routing, strict=True)}
    mtp = balance = next_token.new_zeros(())
    if model.mtp_layers and mtp_weight:
        losses, mtp_routing = _mtp_losses(model, trunk.hidden_BTD, batch)
        mtp = torch.stack(losses).mean()
        routing |= mtp_routing
    if routing and balance_weight:
        balance = torch.stack([sequence_balance_loss(r.choice, r.segments_BT) for r in routing.values()]).sum()
    loads = {name: expert_loads(r.choice, (r.segments_BT >= 0).flatten()) for name, r in routing.items()}
    total = next_token + mtp_weight * mtp + balance_weight * balance
    return LossParts(total, next_token.detach(), mtp.detach(), balance.detach(), loads)
