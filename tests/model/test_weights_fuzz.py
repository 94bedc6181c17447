"""Damaged and hostile checkpoints: each gives a `XushiError` of two lines, and never another
exception, a hang or a large allocation.

Damage that no reader could notice, such as a changed bit of a weight, may load.
"""

import json
import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from xushi.base.errors import XushiError
from xushi.base.machine import peak_memory_bytes
from xushi.model import load_pretrained, save_pretrained

KINDS = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["F32", "BF16", "F8_E4M3", "dtype", "shape", "../x", "/etc/passwd", "a.safetensors", "yarn"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=8)
            | st.sampled_from(["dtype", "shape", "data_offsets", "weight_map", "__metadata__"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.fixture(scope="session")
def checkpoints(random_model, tiny_of, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """A small checkpoint of each model_type, as the bytes of its files."""
    made = {}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp(kind)
        config = tiny_of(
            kind,
            num_hidden_layers=2,
            n_routed_experts=4,
            num_nextn_predict_layers=0 if kind == "deepseek_v2" else 1,
        )
        save_pretrained(random_model(config, 3), directory)
        # The first call loads parts of PyTorch, whose memory must not count later.
        load_pretrained(directory)
        made[kind] = {path.name: path.read_bytes() for path in directory.iterdir()}
    return made


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """One directory for all examples, since making one each takes most of the time."""
    return tmp_path_factory.mktemp("place")


def loads(place: Path, files: dict[str, bytes]) -> bool:
    """Whether a checkpoint of these files loads. If not, the error must be a `XushiError`.

    Whatever a file says, a model of 100 kB must not need 50 MB or seconds.
    """
    for path in place.iterdir():
        path.unlink()
    for name, content in files.items():
        (place / name).write_bytes(content)
    with suppress(OSError):  # Linux: the peak begins anew, else earlier tests would hide it
        Path("/proc/self/clear_refs").write_text("5")
    begun, before = time.process_time(), peak_memory_bytes()
    try:
        load_pretrained(place)
        loaded = True
    except XushiError as error:
        assert str(place) in error.problem, "it says where"
        for line in (error.problem, error.remedy):
            assert line and len(line) < 1000 and len(line.splitlines()) == 1, line
        loaded = False
    assert time.process_time() - begun < 30 and peak_memory_bytes() - before < 50 * 2**20
    return loaded


def header_of(weights: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", weights[:8])[0]
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def with_header(header: object, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


KIND = st.sampled_from(KINDS)


@settings(max_examples=40)
@given(
    kind=KIND,
    keep=st.floats(0, 1, exclude_max=True),
    file=st.sampled_from([WEIGHTS, "config.json"]),
)
def test_truncated_files(kind: str, keep: float, file: str, checkpoints, place) -> None:
    files = checkpoints[kind]
    content = files[file].rstrip() if file == "config.json" else files[file]
    assert not loads(place, files | {file: content[: int(len(content) * keep)]})


@settings(max_examples=80)
@given(kind=KIND, data=st.data())
def test_flipped_bytes(kind: str, data: st.DataObject, checkpoints, place) -> None:
    """Mostly in the header and its length, where they matter most."""
    files = checkpoints[kind]
    weights = bytearray(files[WEIGHTS])
    length = struct.unpack("<Q", weights[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 7) | st.integers(8, 8 + length - 1))
        weights[at] ^= data.draw(st.integers(1, 255))
    loads(place, files | {WEIGHTS: bytes(weights)})


@settings(max_examples=40)
@given(kind=KIND, content=st.binary(max_size=64), length=st.integers(0, 2**64 - 1))
def test_random_bytes(kind: str, content: bytes, length: int, checkpoints, place) -> None:
    files = checkpoints[kind]
    for file in (WEIGHTS, INDEX):
        assert not loads(place, files | {file: content})
    assert not loads(place, files | {WEIGHTS: struct.pack("<Q", length) + content})


@settings(max_examples=60)
@given(kind=KIND, header=JSON)
def test_random_headers(kind: str, header: object, checkpoints, place) -> None:
    files = checkpoints[kind]
    own, data = header_of(files[WEIGHTS])
    name = next(iter(own.keys() - {"__metadata__"}))
    assert not loads(place, files | {WEIGHTS: with_header(header, b"")})
    assert not loads(place, files | {WEIGHTS: with_header(own | {name: header}, data)})
    assert not loads(
        place, files | {WEIGHTS: with_header(own | {name: own[name] | {"shape": header}}, data)}
    )


@settings(max_examples=60)
@given(
    kind=KIND,
    index=JSON,
    file=st.sampled_from(
        [
            "../x.safetensors",
            "/etc/passwd",
            "",
            ".",
            "..",
            "a/b.safetensors",
            "..\\x",
            "x\0.safetensors",
            7,
            None,
            [],
            {},
            True,
            1e999,
            "model.bin",
            "/dev/zero",
            "~/x.safetensors",
            "x" * 5000,
            "gone.safetensors",
            "config.json",
        ]
    ),
)
def test_random_indexes(kind: str, index: object, file: object, checkpoints, place) -> None:
    files = checkpoints[kind]
    names = header_of(files[WEIGHTS])[0].keys() - {"__metadata__"}
    for content in (
        index,
        {"weight_map": index},
        {"weight_map": dict.fromkeys(names, file)},
        {"weight_map": dict.fromkeys(names, WEIGHTS) | {min(names): file}},
    ):
        assert not loads(place, files | {INDEX: json.dumps(content).encode()})
    assert loads(
        place, files | {INDEX: json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}).encode()}
    )


DTYPES = (
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
)


@settings(max_examples=80)
@given(kind=KIND, data=st.data())
def test_another_tensor(kind: str, data: st.DataObject, checkpoints, place) -> None:
    """One tensor too few or too many, or one with another name, shape or dtype: the file is valid
    but does not belong to this model.
    """
    files = checkpoints[kind]
    tensors = load(files[WEIGHTS])
    optional = (".embed_tokens.weight", ".shared_head.head.weight")
    name = data.draw(
        st.sampled_from(
            sorted(n for n in tensors if not n.endswith(optional) or ".layers." not in n)
        )
    )
    way = data.draw(
        st.sampled_from(["less", "more", "name", "twice", "longer", "shorter", "flat", "dtype"])
    )
    tensor = tensors[name]
    if way in ("less", "name"):
        tensors.pop(name)
    if way in ("more", "name"):
        stem, _, leaf = name.rpartition(".")
        others = [f"{name}.x", f"x.{name}", f"{stem}x.{leaf}", "\n", "ö" * 300]
        tensors[data.draw(st.sampled_from(others))] = tensor.clone()
    elif way == "twice":  # by DeepSeek's name as well as transformers'
        tensors["norm.weight" if "model.norm.weight" in tensors else "model.norm.weight"] = (
            torch.zeros(24)
        )
    elif way == "longer":
        tensors[name] = torch.cat([tensor, tensor])
    elif way == "shorter":
        tensors[name] = tensor[:-1].clone()
    elif way == "flat":
        tensors[name] = tensor.flatten().clone() if tensor.dim() > 1 else tensor[None].clone()
    elif way == "dtype":
        tensors[name] = tensor.to(
            data.draw(
                st.sampled_from(
                    [
                        d
                        for d in DTYPES
                        if "tid2eid" not in name or (d not in (torch.int64, torch.int32))
                    ]
                )
            )
        )
    assert not loads(place, files | {WEIGHTS: save(tensors)})


@settings(max_examples=100)
@given(kind=KIND, value=JSON, data=st.data())
def test_another_config(kind: str, value: object, data: st.DataObject, checkpoints, place) -> None:
    """Some keys change no weight, so the checkpoint may load."""
    files = checkpoints[kind]
    config = json.loads(files["config.json"])
    key = data.draw(
        st.sampled_from(
            [
                *sorted(config),
                "quantization_config",
                "compress_rates",
                "rope_parameters",
                "mlp_layer_types",
                "num_mtp_layers",
                "partial_rotary_factor",
            ]
        )
    )
    loads(place, files | {"config.json": json.dumps(config | {key: value}).encode()})


@settings(max_examples=40)
@given(kind=KIND, data=st.data())
def test_sizes_that_the_files_do_not_have(
    kind: str, data: st.DataObject, checkpoints, place
) -> None:
    """Huge sizes are refused by comparison with the headers, before any memory is allocated."""
    files = checkpoints[kind]
    config = json.loads(files["config.json"])
    key = data.draw(
        st.sampled_from(
            [
                "hidden_size",
                "vocab_size",
                "num_hidden_layers",
                "n_routed_experts",
                "moe_intermediate_size",
                "num_attention_heads",
                "q_lora_rank",
            ]
        )
    )
    config[key] *= 2 ** data.draw(st.integers(1, 70))
    assert not loads(place, files | {"config.json": json.dumps(config).encode()})
