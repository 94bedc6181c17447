"""V4's compressor: turns a window of tokens into one compressed entry, which is key and value.

Axes: ... any leading axes (batch and windows), M slots of a window, C width of an entry.
"""

import torch
from torch import Tensor


def compress_windows(values_MC: Tensor, gates_MC: Tensor, valid_M: Tensor | None = None) -> Tensor:
    """sum over a window's slots of softmax over slots (gate) * value, for each channel: [..., M, C]
    to [..., C].

    `gates_MC` already include the bias of their position in the window. `valid_M` [..., M] is True
    for slots that exist; each window needs at least one. The softmax is in float32 or wider.
    Source: V4, section 2.3.1, eqs. 11 and 12, and section 2.3.2, eqs. 22 and 23; transformers'
    compressors.
    """
    wide = gates_MC.to(torch.promote_types(gates_MC.dtype, torch.float32))
    if valid_M is not None:
        wide = wide.masked_fill(~valid_M[..., None], float("-inf"))
    return (values_MC * wide.softmax(-2).to(values_MC.dtype)).sum(-2)
