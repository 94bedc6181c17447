"""V4's compressor: the tokens of a window become one entry of the compressed keys and values.

Axes: ... any leading axes (batch and windows), M slots of a window, C width of an entry.
"""

import torch
from torch import Tensor


def compress_windows(values_MC: Tensor, gates_MC: Tensor, valid_M: Tensor | None = None) -> Tensor:
    """sum over a window's slots of softmax over slots (gate) * value, channel by channel: [..., M,
    C] to [..., C].

    `valid_M` [..., M] says which slots exist; each window needs one that does. The softmax is
    float32 at least (V4, section 2.3.1, eqs. 11 and 12; 2.3.2, eqs. 22 and 23; transformers'
    compressors). Gates come with their positions' bias added.
    """
    wide = gates_MC.to(torch.promote_types(gates_MC.dtype, torch.float32))
    if valid_M is not None:
        wide = wide.masked_fill(~valid_M[..., None], float("-inf"))
    return (values_MC * wide.softmax(-2).to(values_MC.dtype)).sum(-2)
