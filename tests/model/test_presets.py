"""The presets against the names and shapes of the model that transformers builds from the config."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xushi.base.errors import XushiError
from xushi.model import PRESETS, Deepseek, from_published, preset, to_published


@pytest.mark.parametrize("name", PRESETS)
def test_names_and_shapes_are_transformers(name: str) -> None:
    published = to_published(preset(name))
    config = AutoConfig.for_model(
        **{k: v for k, v in published.items() if k not in ("architectures", "torch_dtype")}
    )
    with torch.device("meta"):
        theirs, ours = AutoModelForCausalLM.from_config(config), Deepseek(preset(name))
    extra = tuple(
        f"model.layers.{preset(name).num_hidden_layers + d}." for d in range(len(ours.mtp_layers))
    )
    mine = {
        n: tuple(t.shape)
        for n, t in ours.state_dict().items()
        if not n.startswith(extra or ("no such layer",))
    }
    assert mine == {n: tuple(t.shape) for n, t in theirs.state_dict().items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_own_config_file(name: str) -> None:
    assert from_published(to_published(preset(name)), "here") == preset(name)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(XushiError, match="deepseek-v4-tiny") as error:
        preset("deepseek-v4-tiny")
    assert all(name in error.value.remedy for name in PRESETS)
