"""V4's MTP layer against transformers' decoder layer, head and norm. Only the joining of its inputs
is written out here.

V3's MTP layer is compared with transformers' `MtpModel` in test_parity_transformers.py; the losses
of both are tested in test_objective.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from xushi.model import Deepseek, to_published


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def reference_with(ours: Deepseek, depth: int) -> DeepseekV4ForCausalLM:
    """transformers' model with our MTP layer of this depth (from 0) as its last layer."""
    config, layers = ours.config, ours.config.num_hidden_layers
    published = to_published(
        config.model_copy(
            update={
                "num_hidden_layers": layers + 1,
                "num_nextn_predict_layers": 0,
                "compress_ratios": [
                    *config.compress_ratios[:layers],
                    config.compress_ratios[layers + depth],
                ],
            }
        )
    )
    theirs = DeepseekV4ForCausalLM._from_config(
        DeepseekV4Config(
            **{k: v for k, v in published.items() if k not in ("architectures", "torch_dtype")}
        ),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    own, mtp = ours.state_dict(), f"model.layers.{layers + depth}."
    state = {name: own[name] for name in own if not name.startswith("model.layers.")}
    state |= {
        name: own[name]
        for name in own
        if name.startswith("model.layers.") and int(name.split(".")[2]) < layers
    }
    joins = ("enorm.", "hnorm.", "e_proj.", "h_proj.")
    for name in own:
        part = name.removeprefix(mtp)
        if name.startswith(mtp) and not part.startswith(joins):
            place = (
                f"model.{part}"
                if part.startswith(("hc_head.", "norm."))
                else f"model.layers.{layers}.{part}"
            )
            state[place] = own[name]
    theirs.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize("ratios", [[0, 2, 3, 0, 2], [2, 3, 0, 3, 0]])
def test_two_depths(ratios: list[int], random_model, tiny_of) -> None:
    ours = random_model(
        tiny_of("deepseek_v4", num_nextn_predict_layers=2, compress_ratios=ratios, index_topk=1000),
        51,
    )
    tokens = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(51))
    config, eps, own = ours.config, ours.config.rms_norm_eps, ours.state_dict()
    with torch.no_grad():
        carried = ours.hidden(tokens).carried
        for depth, layer in enumerate(ours.mtp_layers):
            nexts = torch.roll(tokens, -1 - depth, 1)
            mtp = f"model.layers.{config.num_hidden_layers + depth}."
            embedded = normed(
                own["model.embed_tokens.weight"][nexts], own[mtp + "enorm.weight"], eps
            )
            joined = (embedded @ own[mtp + "e_proj.weight"].T)[:, :, None] + normed(
                carried, own[mtp + "hnorm.weight"], eps
            ) @ own[mtp + "h_proj.weight"].T
            theirs = reference_with(ours, depth)
            theirs.model.layers[config.num_hidden_layers].register_forward_pre_hook(
                lambda module, arguments, joined=joined: (joined, *arguments[1:])
            )
            expected = theirs(tokens).logits
            shared = ours.sequences(tokens, torch.arange(13).expand(2, -1))
            predicted = layer.predict(carried, own["model.embed_tokens.weight"][nexts], shared)
            got = F.linear(predicted.hidden_BTD, ours.head_VD)
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
            carried = predicted.carried
            assert carried.shape == (2, 13, config.hc_mult, config.hidden_size)
