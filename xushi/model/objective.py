"""What a DeepSeek is trained to minimise: next-token loss, MTP losses, balance losses, and the
indexers' losses.

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
class LossWeights:
    """What the parts of the loss are multiplied by; `mtp` is shared by all MTP depths."""

    mtp: float
    balance: float
    indexer: float = 1.0


@dataclass(frozen=True)
class LossParts:
    """`total` is what is differentiated; the others are its parts, unweighted and detached.

    `loads` holds, for each router, how many tokens chose each expert [E]. `residual` is what the
    next pipeline stage takes as input, None in the last stage.
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
    """Denominators of the mean losses, float64 [1 + MTP depths] each.

    They are global counts: where a batch is shared by several processes they are summed over all of
    them, so that the processes' losses sum to the batch's loss. `targets` counts the target tokens
    of the next token and of each MTP depth; `fed` counts the tokens that the trunk and each MTP
    layer take as input.
    """

    targets: Tensor
    fed: Tensor

    @classmethod
    def of(cls, batch: Batch, depths: int) -> "LossCounts":
        """The counts of one batch, for a model with this many MTP depths."""
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
    """Whether the token `ahead` places later belongs to the same segment."""
    same = torch.roll(segments_BT, -ahead, dims=1) == segments_BT
    same[:, same.shape[1] - ahead :] = False
    return same


def _mtp_targets(mask_BT: Tensor, segments_BT: Tensor, depth: int) -> Tensor:
    """Where MTP depth `depth` has a loss: its target is in the segment and trained on."""
    return torch.roll(mask_BT, -depth, dims=1) & _same_segment(segments_BT, depth)


def _mtp_fed(segments_BT: Tensor, depth: int) -> Tensor:
    """The segments of MTP layer `depth`'s input; -1 where it is padding or another document's."""
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
    """How many of the valid tokens chose each expert: float32 [E]."""
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
    alone; padding (segment -1) is left out. `count` is the number of tokens of the whole batch,
    where these are only a part of it.
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


def indexer_loss(divergences: "list[_Divergence]") -> Tensor:
    """V3.2's loss (arXiv:2512.02556, eqs. 3 and 4): the KL divergence of the indexer from the
    attention, a mean over tokens, summed over layers. The paper sums over tokens.
    """
    return torch.stack(
        [(d.divergence_BT * _mean_over(d.segments_BT >= 0, d.count)).sum() for d in divergences]
    ).sum()


@dataclass(frozen=True)
class _Divergence:
    """An indexer's divergence from its layer's attention, with what it is a mean over."""

    divergence_BT: Tensor
    segments_BT: Tensor
    count: Tensor


@dataclass(frozen=True)
class _Routed:
    """A layer's routing, with what its losses are means over.

    `segments_BT` are those of the layer's input, -1 where that is padding or another document's;
    `count` is how many of its tokens the whole batch has.
    """

    choice: RouterChoice
    segments_BT: Tensor
    count: Tensor


@dataclass(frozen=True)
class _Layers:
    """What the layers that have run leave for the losses of layers."""

    routed: dict[str, _Routed]
    divergences: list[_Divergence]

    @classmethod
    def of_trunk(
        cls, model: Deepseek, trunk: Hidden, batch: Batch, counts: LossCounts
    ) -> "_Layers":
        """Those of the trunk's layers."""
        names = [name for name in model.routers() if int(name) < model.config.num_hidden_layers]
        places = (batch.segments, counts.fed[0])
        return cls(
            {n: _Routed(c, *places) for n, c in zip(names, trunk.routing, strict=True)},
            [_Divergence(divergence_BT, *places) for divergence_BT in trunk.index_divergence],
        )

    def balance_loss(self, model: Deepseek) -> Tensor:
        """The sum of the balance losses of all routers that learn; needs one routed layer."""
        learnt = [r for n, r in self.routed.items() if not model.config.is_hash_routed(int(n))]
        zero = next(iter(self.routed.values())).choice.scores_NE.new_zeros(())
        return sum(
            (sequence_balance_loss(r.choice, r.segments_BT, r.count) for r in learnt), start=zero
        )

    def loads(self) -> dict[str, Tensor]:
        """How many tokens chose each expert, by router."""
        return {
            name: expert_loads(routed.choice, (routed.segments_BT >= 0).flatten())
            for name, routed in self.routed.items()
        }


def _mtp_loss(
    model: Deepseek, trunk: Hidden, batch: Batch, counts: LossCounts, layers: _Layers
) -> Tensor:
    """The mean of the MTP depths' losses; what their layers leave is added to `layers`.

    At depth d the input at place i is the embedding of token i+d and the target is token i+d+1,
    both read from `targets`. Places whose token i+d+1 is outside the segment, or is not trained on,
    have no loss.
    """
    targets, carried = batch.targets, trunk.carried
    losses: list[Tensor] = []
    for depth, layer in enumerate(model.mtp_layers, start=1):
        embedded = F.embedding(
            torch.roll(targets, 1 - depth, dims=1), model.model.embed_tokens.weight
        )
        predicted = model.block(layer.predict, carried, embedded, trunk.sequences)
        carried = predicted.carried
        valid = _mtp_targets(batch.loss_mask, batch.segments, depth)
        losses.append(
            next_token_loss(
                model,
                predicted.hidden_BTD,
                torch.roll(targets, -depth, dims=1),
                _mean_over(valid, counts.targets[depth]),
            )
        )
        places = (_mtp_fed(batch.segments, depth), counts.fed[depth])
        if predicted.choice is not None:
            name = str(model.config.num_hidden_layers + depth - 1)
            layers.routed[name] = _Routed(predicted.choice, *places)
        if predicted.divergence_BT is not None:
            layers.divergences.append(_Divergence(predicted.divergence_BT, *places))
    return torch.stack(losses).mean()


def _main_loss(model: Deepseek, trunk: Hidden, batch: Batch, counts: LossCounts) -> Tensor:
    """The next-token loss; zero in a pipeline stage that does not have the head."""
    if not model.ends:
        return trunk.hidden_BTD.new_zeros(())
    weights_BT = _mean_over(batch.loss_mask, counts.targets[0])
    return next_token_loss(model, trunk.hidden_BTD, batch.targets, weights_BT)


def _check_warmup(model: Deepseek) -> None:
    """`BadInput` if a whole model without an indexer that learns is to warm one up."""
    if model.begins and model.ends:
        raise BadInput(
            "indexer_warmup_steps without an indexer that learns",
            "it is for deepseek_v32 models and deepseek_v4 models with sparse layers, and for an "
            "indexer_weight above 0",
        )


def pretraining_loss(
    model: Deepseek,
    batch: Batch,
    weights: LossWeights,
    *,
    indexer_warmup: bool = False,
    counts: LossCounts | None = None,
    residual: Tensor | None = None,
) -> LossParts:
    """L = next token + mtp weight * mean of the MTP losses + balance weight * sum of the balance
    losses over layers + indexer weight * sum of the indexers' losses over layers.

    Every loss is a mean over its target tokens (V3, eqs. 17-20 and 24-25). With `indexer_warmup`
    attention is dense and only the indexers' loss is differentiated (V3.2, section 2.1.1);
    `BadInput` if no indexer learns. `counts` are those of the whole batch where this is a part of
    it: the parts' losses and gradients then sum to the whole's. So do those of pipeline stages,
    whose `residual` is the output of the stage before.
    """
    counts = counts or LossCounts.of(batch, model.config.num_nextn_predict_layers)
    index_loss = model.config.has_indexer and weights.indexer > 0
    inputs = (batch.tokens, batch.positions, batch.segments)
    trunk = model.hidden(*inputs, dense=indexer_warmup, index_loss=index_loss, residual=residual)
    next_token = _main_loss(model, trunk, batch, counts)
    layers = _Layers.of_trunk(model, trunk, batch, counts)
    mtp = balance = indexer = next_token.new_zeros(())
    if model.mtp_layers and weights.mtp:
        mtp = _mtp_loss(model, trunk, batch, counts, layers)
    if layers.routed and weights.balance:
        balance = layers.balance_loss(model)
    if layers.divergences:
        indexer = indexer_loss(layers.divergences)
    elif indexer_warmup:
        _check_warmup(model)
    total = weights.indexer * indexer
    if not indexer_warmup:
        total = next_token + weights.mtp * mtp + weights.balance * balance + total
    residual = None if model.ends else trunk.hidden_BTD
    values = next_token.detach(), mtp.detach(), balance.detach(), indexer.detach()
    return LossParts(total, *values, layers.loads(), residual)
