"""Model directories as others publish them, small: a byte-level BPE tokenizer with DeepSeek-V3's
pre-tokenizer and special tokens at the end of the vocabulary, and templates of DeepSeek's forms.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from xushi.model import Deepseek, ModelConfig, save_pretrained

from .tiny import TINY, TINY_V4

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
# As in DeepSeek's own tokenizer.json, these are added tokens that are not flagged as special.
# One of them begins another.
PLAIN_ADDED = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<think>",
    "</think>",
    "<think>ing",
    "<｜fim▁hole｜>",
)
TOOLS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
TEXT = (
    "Hello world, hello 世界. 数字之和是多少？ 12345 + 678 = 13023 a>ing b>ing\n\tdef f(x): return x\n"
    * 3
)
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

# What a template of a reasoning model does: the prompt ends within the reasoning, and earlier
# reasoning is cut from the history.
THINKING = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ message['content'] }}
{%- elif message['role'] == 'user' %}
{{- '<｜User｜>' + message['content'] }}
{%- else %}
{{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{- '<｜Assistant｜><think>\\n' }}
{%- endif %}"""
# DeepSeek-V3.1's form of tools, and no reasoning unless asked for.
WITH_TOOLS = """{{- bos_token -}}
{%- if tools %}{{ '## Tools\\n' }}{% for tool in tools %}
{{- '### ' + tool.function.name + '\\n' + (tool.function.parameters | tojson) + '\\n' }}
{%- endfor %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' %}{{ '<｜Assistant｜></think>' + message.content }}
{%- for call in message.tool_calls or [] %}
{%- if loop.first %}{{ '<｜tool▁calls▁begin｜>' }}{% endif %}
{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' }}
{{- call.function.arguments + '<｜tool▁call▁end｜>' }}
{%- if loop.last %}{{ '<｜tool▁calls▁end｜>' }}{% endif %}
{%- endfor %}{{ eos_token }}
{%- elif message.role == 'tool' %}
{{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
{%- elif message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'thinker' %}{{ '<think>ing' }}
{%- else %}{{ raise_exception('unknown role ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜></think>' }}{% endif %}"""


@functools.cache
def tokenizer_json() -> str:
    """A tokenizer.json of 400 tokens and the added ones."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT], trainer)
    backend.add_tokens([AddedToken(text, special=True) for text in (BOS, EOS, PAD)])
    backend.add_tokens([AddedToken(text, normalized=True) for text in PLAIN_ADDED + TOOLS])
    return str(backend.to_str())


def their_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of a directory."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(directory)


def token_id(text: str) -> int:
    """The id of an added token."""
    added = json.loads(tokenizer_json())["added_tokens"]
    return next(int(token["id"]) for token in added if token["content"] == text)


def shape(**changes: Any) -> ModelConfig:
    """A tiny V3's config for this tokenizer, with some ids more than it has."""
    size = len(json.loads(tokenizer_json())["model"]["vocab"]) + 32
    return TINY.model_copy(
        update={
            "vocab_size": size,
            "max_position_embeddings": 512,
            "num_nextn_predict_layers": 0,
            "initializer_range": 0.5,
            "bos_token_id": token_id(BOS),
            "eos_token_id": token_id(EOS),
            **changes,
        }
    )


def of_kind(kind: str, **changes: Any) -> ModelConfig:
    """A config in the shape of V2-Lite, V3, V3.2 or V4, shrunk."""
    if kind == "deepseek_v4":
        fields = TINY_V4 | {"num_hidden_layers": 3}
    else:
        fields = {}
        if kind == "deepseek_v2":
            fields |= {"topk_method": "greedy", "norm_topk_prob": False, "n_group": 1}
        else:
            fields |= {"q_lora_rank": 6, "n_group": 2}
        if kind == "deepseek_v32":
            fields |= {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 6}
    table = shape().model_dump(exclude_unset=True) | {"model_type": kind} | fields | changes
    if kind == "deepseek_v4":
        mla = (
            "intermediate_size",
            "n_group",
            "topk_group",
            "first_k_dense_replace",
            "kv_lora_rank",
        )
        for name in (*mla, "qk_nope_head_dim", "v_head_dim"):
            table.pop(name)
    return ModelConfig(**table)


def write_tokenizer(directory: Path, **settings: Any) -> Path:
    """tokenizer.json and a tokenizer_config.json with `settings`; a value of None leaves a key
    out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    table = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": BOS, "normalized": True},
        "eos_token": EOS,
        "pad_token": EOS,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    table = {key: value for key, value in table.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(table), encoding="utf-8")
    return directory


def write_model(directory: Path, config: ModelConfig | None = None, **settings: Any) -> Path:
    """A model directory: random weights, and `write_tokenizer`."""
    save_pretrained(Deepseek(config or shape()).initialise(1), directory)
    return write_tokenizer(directory, **settings)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file, which may not exist yet."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(table | changes), encoding="utf-8")
