"""A process of its own in which a stranger's chat template is rendered (see rendering.py).

Started as a script; it imports nothing of xushi. It reads JSON objects, one a line: the first has
the template, each other one the variables of a rendering. It answers each with a line:
{"text": ...} or {"error": ...}. A template can take up neither more processor time nor more memory
than given: beyond the time a signal ends the process.
"""

import contextlib
import json
import re
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(Extension):
    """The block `{% generation %}`, which marks an assistant's text for training: here its body."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """A call of `_body` with what is between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


# What conversation.py puts around special tokens that a message spells. They must reach the text.
MARKS = "\ufdd0-\ufdd2"
_TO_ESCAPE = re.compile(f"[^\0-~{MARKS}]")
_ESCAPED_MARK = re.compile(r"(?<!\\)((?:\\\\)*)\\u(fdd[0-2])")


class Text(str):
    """A text of the variables, whose form within a printed list or mapping keeps the marks."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Python's form, with marks as they are."""
        return _ESCAPED_MARK.sub(
            lambda found: found[1] + chr(int(found[2], 16)), super().__repr__()
        )


def with_texts(value: Any) -> Any:
    """A JSON value with each of its strings a `Text`."""
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, list):
        return [with_texts(each) for each in value]
    if isinstance(value, dict):
        return {Text(key): with_texts(each) for key, each in value.items()}
    return value


class SafeNamespace(Namespace):
    """Jinja's namespace without private attributes, through which templates could reach Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an attribute; `SecurityError` for one that begins with an underscore."""
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")
        super().__setitem__(name, value)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers 5.23 sets it up for chat templates (utils/chat_template_utils.py)."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    made.globals["namespace"] = SafeNamespace
    made.globals["dict"] = make_dict
    return made


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for HTML. `MARKS` are never escaped."""
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return _TO_ESCAPE.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


def raise_exception(message: str) -> None:
    """What a template calls to refuse a conversation."""
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """The time now."""
    return datetime.now().strftime(form)


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """A function in place of the type, whose methods could change the arguments."""
    return dict(*args, **kwargs)


def answer(request: dict[str, Any], template: Any, characters: int) -> dict[str, str]:
    """The rendered text, or that it is too long."""
    parts = []
    size = 0
    for part in template.generate(with_texts(request)):
        size += len(part)
        if size > characters:
            return {"error": f"it writes more than {characters:,} characters"}
        parts.append(part)
    return {"text": "".join(parts)}


def describe(error: Exception) -> str:
    """An exception in one line of at most 300 characters."""
    if isinstance(error, MemoryError):
        return "it takes too much memory"
    text = " ".join(str(error).split())[:300]
    message = "".join(c if c.isprintable() else "?" for c in text)
    number = getattr(error, "lineno", None)
    line = f" (line {number})" if number else ""
    return f"{type(error).__name__}: {message}{line}"


def main(seconds: float, characters: int, memory: int) -> None:
    """Serve requests until the input ends."""
    # macOS does not limit a process's addresses; there the time bounds what it can fill.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    template = None
    for line in sys.stdin:
        # Counts the processor's time, so a busy machine ends nothing. The signal's default action
        # ends the process, within any operation.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            request = json.loads(line)
            if template is None:
                template = environment().from_string(request["template"])
                reply = json.dumps({"text": ""})
            else:
                reply = json.dumps(answer(request, template, characters))
        except Exception as error:  # whatever a template can cause
            reply = json.dumps({"error": describe(error)})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
