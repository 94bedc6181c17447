"""Chat templates of strangers: Jinja programs that come with a model, rendered with bounds.

A template runs in a process of its own, in Jinja's sandbox, as transformers renders it. One that
loops for ever, or that fills the memory, ends that process and nothing else: no check inside Python
could interrupt one long operation. The process is kept for the next rendering.

Not here: where templates are found (base.model_directory), xushi's own form (chat).
"""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from xushi.base.errors import BadInput

SECONDS = 5.0
CHARACTERS = 1 << 25
MEMORY = 1 << 30
_ANOTHER = "give another template with --template FILE"


class ChatTemplate:
    """One template. Any thread may use it.

    Bounds of a rendering: `SECONDS` of processor time, `CHARACTERS` of text, and `MEMORY` bytes
    (not on macOS, which has no such limit).
    """

    def __init__(self, source: str, where: str, seconds: float = SECONDS) -> None:
        """`where` names the template in messages. A template that Jinja cannot read is a
        `XushiError`.
        """
        self.source = source
        self._where = where
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize[..., ChatTemplate] | None = None
        with self._lock:
            self._start()

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for `variables`, which must be JSON values.

        A template that refuses them, fails or exceeds a bound is a `XushiError`.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            return self._ask(variables, f"change the messages, or {_ANOTHER}")

    def _start(self) -> None:
        command = [
            *(sys.executable, "-P", str(Path(__file__).with_name("render_child.py"))),
            *(str(self._seconds), str(CHARACTERS), str(MEMORY)),
        ]
        # In a session of its own: Ctrl-C in a terminal is not meant for it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
            start_new_session=True,
        )
        self._stop()  # what is left of a process that ended
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process)
        try:
            self._ask({"template": self.source}, _ANOTHER)
        except BaseException:  # a process without a template must not be asked
            self._stop()
            raise

    def _stop(self) -> None:
        """End the process, if there is one, and close its pipes."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = None

    def _ask(self, request: Mapping[str, Any], remedy: str) -> str:
        process = self._process
        assert process is not None
        line = json.dumps(request)
        try:
            reply = _exchange(process, line)
        except BaseException:  # such as Ctrl-C: its reply would be taken for the next request's
            self._stop()
            raise
        if reply is None:
            # It closed its output, so it ends by itself, unless it is stuck in that.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._seconds)
            code = process.returncode
            self._stop()
            raise BadInput(
                f"chat template {self._where} was stopped: {_why(code, self._seconds)}", remedy
            )
        if "error" in reply:
            raise BadInput(f"chat template {self._where}: {reply['error']}", remedy)
        return reply["text"]


def _why(code: int | None, seconds: float) -> str:
    """What a process that ended with this code, negative for a signal, had done."""
    if code == -signal.SIGPROF:
        return f"it took more than {seconds:g} seconds"
    if code == -signal.SIGKILL:
        return "its process was killed, as a system does that lacks memory"
    return f"its process ended with {'signal' if code and code < 0 else 'code'} {abs(code or 0)}"


def _exchange(process: "subprocess.Popen[str]", line: str) -> dict[str, str] | None:
    """The reply to one line; None if the process has ended."""
    try:
        _open(process.stdin).write(line + "\n")
        _open(process.stdin).flush()
        reply = _open(process.stdout).readline()
    except BrokenPipeError:
        return None
    if not reply.endswith("\n"):
        return None
    answer: dict[str, str] = json.loads(reply)
    return answer


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill the process, if it still runs, and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            _open(pipe).close()
        except BrokenPipeError:
            continue  # what it was to read had not been written
