"""Which tensors are loaded. What a whole checkpoint gives is in test_weights and test_mtp."""

from pathlib import Path

import pytest
import torch

from xushi.model.contents import sort_tensors
from xushi.model.shards import Stored

from ..published import of_kind


@pytest.mark.parametrize(("kind", "notes"), [("deepseek_v3", 1), ("deepseek_v4", 0)])
def test_draft_models_of_another_kind_are_those_of_a_v4(kind: str, notes: int) -> None:
    """Where files have other draft models, nothing is said of the MTP layers that they lack."""
    config = of_kind(kind).model_copy(update={"num_nextn_predict_layers": 1})
    found = sort_tensors({}, config, {"dspark_layers": 2}, Path("there"), None, 128)
    assert found.config.num_nextn_predict_layers == 0
    assert len(found.notes) == notes
    assert all("there is loaded without MTP" in note for note in found.notes)


@pytest.mark.parametrize("name", ["inv_freq", "cos_cached", "sin_cached"])
def test_angles_that_others_stored_are_left_out(name: str) -> None:
    names = [f"model.layers.{layer}.self_attn.rotary_emb.{name}" for layer in range(2)]
    file = Path("there") / "model.safetensors"
    stored = {each: Stored(each, file, torch.float32, (4,), 0, 16) for each in names}
    found = sort_tensors(stored, of_kind("deepseek_v3"), {}, Path("there"), None, 128)
    assert found.weights == found.scales == {}
    assert found.notes == [f"there: tensors that are not read: 2 x *.{name}"]
