"""Templates of strangers: transformers' rendering is the oracle; hostile ones are stopped."""

import json
import subprocess
from typing import Any

import pytest

from xushi.base.errors import BadInput
from xushi.tokenizer import rendering as module
from xushi.tokenizer.rendering import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "<b>\"q\" & 'r' é 世界\n"},
    {"role": "user", "content": " a "},
    {"role": "assistant", "content": "x", "thinking": "t", "reasoning_content": "t"},
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"z": [1, None], "a": "<é>"}}}
]
VARIABLES = {
    "messages": MESSAGES,
    "tools": TOOLS,
    "documents": None,
    "add_generation_prompt": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
}

# What published templates use.
SOURCES = [
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n U:{{ m['content'] }}\n  {% endif %}\n{% endfor %}\n",
    "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ tools[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{% set ns = namespace(found=false, n=1) %}{% for m in messages %}{% set ns.n = ns.n * 3 %}{% endfor %}{{ ns.n }}{{ ns.found }}",
    "{%- macro show(m) -%}[{{ m.content | trim }}]{%- endmacro -%}{{ show(messages[1]) }}{{ messages | length }}",
    "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}\n{% endfor %}",
    "{{ messages[-1].thinking }}{{ messages[0].missing }}{{ missing is defined }}{{ documents is none }}",
    "{{ messages[0].content.split('q')[-1] }}{{ '%s-%05.1f' | format('a', 2) }}{{ dict(a=1) | tojson }}{{ range(3) | list }}",
    "{{ strftime_now('%Y') | length }}{{ messages | map(attribute='role') | join(',') }}{{ eos_token }}",
    "{% if add_generation_prompt %}<A>{% endif %}{{ messages[0].content | e }}{{ messages[0]['content'] | upper }}",
]


@pytest.mark.parametrize("source", SOURCES)
def test_renders_as_transformers(source: str) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    given = {key: value for key, value in VARIABLES.items() if key != "messages"}
    [wanted], _ = utilities.render_jinja_template([MESSAGES], chat_template=source, **given)
    assert ChatTemplate(source, "x").render(VARIABLES) == wanted


def refused(source: str, **settings: Any) -> str:
    """What is said of a template, which must be refused in two lines."""
    with pytest.raises(BadInput) as caught:
        ChatTemplate(source, "odd.jinja", **settings).render(VARIABLES)
    assert caught.value.problem.startswith("chat template odd.jinja")
    assert "--template" in caught.value.remedy
    assert (caught.value.problem + caught.value.remedy).isprintable()
    assert len(caught.value.problem) < 500
    return caught.value.problem


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{% for %}", "TemplateSyntaxError"),
        ("a\nb{{ x.y.z }}", "UndefinedError"),
        ("{% include 'other' %}", "TypeError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('x' * 100000) }}", "xxx"),
        ("{{ raise_exception('\x1b]0;pwn\x07') }}", "?]0;pwn?"),
    ],
)
def test_what_a_template_does_wrong_is_said(source: str, said: str) -> None:
    assert said in refused(source)


LOOP = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
WRITE = "{% for a in range(9999) %}{% for b in range(9999) %}0123456789{% endfor %}{% endfor %}"


def test_endless_templates_are_stopped_and_the_next_rendering_works() -> None:
    template = ChatTemplate("{% if messages %}" + LOOP + "{% endif %}{{ tools }}", "x", 0.2)
    for _ in range(2):
        with pytest.raises(BadInput, match=r"was stopped: it took more than 0\.2 seconds\n"):
            template.render(VARIABLES)
        assert template.render({"tools": "fine"}) == "fine"
    assert "was stopped" in refused(LOOP, seconds=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "said"),
    [
        (WRITE, "writes more than 33,554,432 characters"),
        ("{{ 'x' * 40000000 }}", "writes more than 33,554,432 characters"),
        ("{{ 'x' * 9000000000 }}", "too much memory"),
        ("{{ '%9000000000d' | format(1) }}", "too much memory"),
        ("{{ 'x' | center(9000000000) }}", "too much memory"),
        # Single operations that nothing within Python can interrupt.
        ("{{ 9 ** (9 ** 9) }}", "was stopped"),
        ("{% for i in range(9999) %}{% set x = (9 + loop.length) ** 999999 %}{% endfor %}", "was stopped"),
        ("{{ messages | map('string') | join(',' * 1100000000) }}", "memory"),
        ("{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "memory"),
        ("{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}", ""),
        ("{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) if n < 99 }}{% endfor %}{% endmacro %}{{ f(0) }}", "was stopped"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", ""),
        ("{{ lipsum(n=100000) }}", ""),
        ("{{ cycler(*range(99999)) }}{% for i in range(99999) %}{{ joiner() }}{% endfor %}" * 500, ""),
    ],
)  # fmt: skip
def test_hostile_templates_are_stopped(source: str, said: str) -> None:
    assert said in refused(source, seconds=2.0)


def test_templates_run_apart_and_their_process_ends_with_them() -> None:
    import gc

    template = ChatTemplate("{{ x }}", "x")
    process = template._process
    assert process is not None and process.poll() is None
    assert template.render({"x": 1}) == "1" and template._process is process
    process.kill()
    process.wait()
    assert template.render({"x": 2}) == "2"
    process = template._process
    assert process is not None
    del template
    gc.collect()
    assert process.poll() is not None


def test_values_arrive_as_they_are() -> None:
    values = ["\u2028", "\x00", "\ud800", "😀", 1.5, None, True, {"b": 1, "a": 2}]
    given = json.loads(
        ChatTemplate("{{ v | tojson(ensure_ascii=true) }}", "x").render({"v": values})
    )
    assert given == values and list(given[-1]) == ["b", "a"]


def test_a_rendering_that_is_interrupted_leaves_no_answer_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C while the template renders: the next rendering is of its own messages."""
    template = ChatTemplate("{{ messages[0].content }}", "t")
    assert template.render({"messages": [{"content": "first"}]}) == "first"
    exchange = module._exchange

    def interrupted(process: object, line: str) -> str | None:
        process.stdin.write(line + "\n")  # type: ignore[attr-defined]
        process.stdin.flush()  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        template.render({"messages": [{"content": "second"}]})
    monkeypatch.setattr(module, "_exchange", exchange)
    assert template.render({"messages": [{"content": "third"}]}) == "third"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed, as a system does that lacks memory"),
        ("import os; os.kill(os.getpid(), 11)", "ended with signal 11"),
        ("raise ImportError", "ended with code 1"),
        ("import os; os.close(1); raise SystemExit(3)", "ended with code 3"),
    ],
)
def test_the_end_of_a_process_is_reported_for_what_it_was(
    code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them was called too much time or memory."""
    started = subprocess.Popen

    def other(command: list[str], **options: Any) -> Any:
        return started([command[0], "-c", code], **options)

    monkeypatch.setattr(module.subprocess, "Popen", other)
    with pytest.raises(BadInput, match=said):
        ChatTemplate("{{ x }}", "x")


def test_a_process_that_did_not_take_its_template_is_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = ChatTemplate("{{ x }}", "x")
    assert template._process is not None
    template._process.kill()
    template._process.wait()
    template.source = "{% for %}"
    for _ in range(2):
        with pytest.raises(BadInput, match="TemplateSyntaxError"):
            template.render({"x": 1})
    template.source = "{{ x }}"
    assert template.render({"x": 1}) == "1"
