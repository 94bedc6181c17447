import shutil
from dataclasses import replace

import pytest

from xushi.base.errors import BadInput, XushiError
from xushi.base.messages import Message, Tool, ToolCall
from xushi.engine import LLM, SamplingParams
from xushi.engine import engine as engine_module
from xushi.engine.sampling import sample
from xushi.model import save_pretrained
from xushi.model.saving import COMPLETE
from xushi.tokenizer import Tokenizer, encode_chat

from ..published import THINKING, write_model

QUESTION = [{"role": "user", "content": "数字之和是多少？"}]


@pytest.fixture(scope="module")
def llm(export):
    return LLM(export)


def test_text_prompts_begin_with_bos_and_ids_are_taken_as_they_are(llm):
    p = SamplingParams(max_tokens=8, seed=3)
    [text] = llm.generate("数字", p)
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode("数字")]
    assert llm.generate([ids], p) == [text]
    assert llm.generate(["之和", "数字"], p)[1].token_ids == text.token_ids
    assert llm.tokenizer.decode(text.token_ids, skip_special=True) == text.text
    assert len(text.logprobs) == len(text.sampling_logprobs) == len(text.token_ids)
    assert text.finish_reason in ("stop", "length")


def test_streaming_gives_the_same_text(llm):
    for seed in range(4):
        p = SamplingParams(max_tokens=20, seed=seed)
        assert "".join(delta.text for delta in llm.stream("数", p)) == llm.generate("数", p)[0].text
        whole = llm.chat(QUESTION, p)
        parts = {"reasoning": "", "content": ""}
        for delta in llm.stream_chat(QUESTION, p):
            parts[delta.channel] += delta.text
        assert parts == {"reasoning": whole.reasoning_content or "", "content": whole.content}
    assert llm.engine.idle_slots == llm.engine.slots


def test_stop_strings_end_the_request_early(llm):
    p = SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
    whole = llm.generate("数", p)[0].text
    stop = whole[10:12]
    [cut] = llm.generate("数", SamplingParams(max_tokens=40, seed=1, ignore_eos=True, stop=(stop,)))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < 40


def test_closing_a_stream_gives_its_slots_back(llm):
    stream = llm.stream("数", SamplingParams(max_tokens=40, ignore_eos=True))
    next(stream)
    assert llm.engine.idle_slots < llm.engine.slots
    stream.close()
    assert llm.engine.idle_slots == llm.engine.slots
    assert not llm.engine.has_work


def test_earlier_reasoning_is_not_sent_again(llm):
    p = SamplingParams(max_tokens=5)
    turns = [*QUESTION, {"role": "assistant", "content": "九"}, {"role": "user", "content": "再"}]
    with_reasoning = [turns[0], {**turns[1], "reasoning_content": "数" * 100}, turns[2]]
    assert llm.chat(with_reasoning, p) == llm.chat(turns, p)


def test_one_bad_prompt_of_many_leaves_nothing_queued(llm):
    with pytest.raises(XushiError, match="context holds 64"):
        llm.generate(["数", [5] * 70], SamplingParams(max_tokens=3))
    assert not llm.engine.has_work
    with pytest.raises(XushiError, match="no messages"):
        llm.chat([], SamplingParams(max_tokens=3))


def test_tools_and_their_outputs_enter_the_prompt(model, tmp_path):
    save_pretrained(model, tmp_path)
    tokenizer = Tokenizer.train([], 270, tools=True)
    tokenizer.save(tmp_path)
    llm = LLM(tmp_path)
    add = Tool("add", "Adds.", {"type": "object"})
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    mappings = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    messages = [
        Message("user", "1+1"),
        Message("assistant", "", "r", (ToolCall("add", "{}"),)),
        Message("tool", "2"),
    ]
    ids = encode_chat(tokenizer, messages, [add])
    assert llm.conversation_ids(mappings, [add]) == llm.conversation_ids(messages, [add]) == ids
    with pytest.raises(XushiError, match="role is None"):
        llm.conversation_ids([{"content": "x"}])


def test_chat_gives_the_calls_that_were_sampled(model, tmp_path, monkeypatch):
    """A stream of text has no place for them: there a call is content."""
    save_pretrained(model, tmp_path)
    tokenizer = Tokenizer.train([], 270, tools=True)
    tokenizer.save(tmp_path)
    llm, marks = LLM(tmp_path), tokenizer.tool_ids
    call = [marks.call_begin, *tokenizer.encode("f"), marks.separator, *tokenizer.encode("{}")]
    block = [marks.calls_begin, *call, marks.call_end, marks.calls_end]
    ids = [tokenizer.end_think_id, *tokenizer.encode("a"), *block, tokenizer.eos_id]
    left = []

    def script(*arguments):
        return replace(sample(*arguments), tokens=[left.pop(0)])

    monkeypatch.setattr(engine_module, "sample", script)
    left[:] = ids
    answer = llm.chat(QUESTION, SamplingParams(max_tokens=20))
    assert (answer.content, answer.tool_calls) == ("a", (ToolCall("f", "{}"),))
    assert answer.token_ids == ids and answer.finish_reason == "stop"
    left[:] = ids
    deltas = list(llm.stream_chat(QUESTION, SamplingParams(max_tokens=20)))
    assert "".join(d.text for d in deltas) == "a" + tokenizer.decode(block)
    assert {delta.channel for delta in deltas} == {"content"}


def test_a_directory_is_looked_at_before_memory_is_weighed(export, tmp_path):
    """An adapter alone has its own name, and what a killed save left is finished."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(BadInput, match="holds an adapter"):
        LLM(tmp_path / "adapter")
    saved = tmp_path / "saved"
    shutil.copytree(export, saved)
    (saved / COMPLETE).mkdir()
    for name in ("config.json", "model.safetensors"):
        (saved / name).rename(saved / COMPLETE / name)
    assert LLM(saved).generate("12", SamplingParams(max_tokens=1))[0].token_ids


def test_a_prompt_that_ends_in_reasoning_is_gone_on_with(tmp_path):
    """The template has written <think>, so what comes first is reasoning, streamed or not."""
    llm = LLM(write_model(tmp_path, chat_template=THINKING))
    p = SamplingParams(max_tokens=12, seed=2, ignore_eos=True)
    whole = llm.chat(QUESTION, p)
    assert whole.reasoning_content
    first = next(iter(llm.stream_chat(QUESTION, p)))
    assert first.channel == "reasoning" and whole.reasoning_content.startswith(first.text)
