"""Log-probabilities of a prompt's own tokens.

Not here: those of sampled tokens (sampling), and when a prompt is computed (engine).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xushi.base.errors import Failed
from xushi.engine.sampling import NOT_FINITE, Alternatives, most_probable
from xushi.model import FlatTokens

# A call computes at most this many logits for prompts whose tokens are scored: 64 MiB in float32.
LOGITS_PER_CALL = 1 << 24


@dataclass(slots=True)
class PromptScores:
    """Per token of a prompt but the first, which nothing precedes: its natural log-probability
    under the model (temperature 1, whole vocabulary), given all tokens before it, and the
    `alternatives` most probable tokens of its place.
    """

    alternatives: int
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Alternatives] = field(default_factory=list)

    def add(self, logits_MV: Tensor, next_ids: Sequence[int]) -> None:
        """Score the next M tokens, from the logits of the places before them."""
        if not next_ids:
            return
        logprobs_MV = torch.log_softmax(logits_MV, dim=-1)
        index_M1 = torch.tensor(next_ids, device=logits_MV.device)[:, None]
        logprobs_M = logprobs_MV.gather(1, index_M1)[:, 0]
        if not logprobs_M.isfinite().all():
            raise Failed(*NOT_FINITE)
        self.logprobs += logprobs_M.tolist()
        self.top_logprobs += most_probable(logprobs_MV, [self.alternatives] * len(next_ids))


def want_every_row(flat: FlatTokens, scored: Sequence[bool]) -> FlatTokens:
    """The same call with the logits of every new token of the sequences that are `scored`, besides
    those of each sequence's last new token. Their order is that of the tokens.
    """
    last_N = torch.ones_like(flat.rows_N, dtype=torch.bool)
    last_N[:-1] = flat.rows_N[1:] != flat.rows_N[:-1]
    scored_N = torch.tensor(scored, device=flat.rows_N.device)[flat.rows_N]
    return replace(flat, wanted_M=(last_N | scored_N).nonzero()[:, 0])
