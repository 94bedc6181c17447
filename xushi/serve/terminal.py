"""Chat in the terminal: text appears as it is generated, reasoning dimmed. Not here: HTTP.

Ctrl-C stops an answer and Ctrl-D ends the chat. If standard input is not a terminal, each of its
lines is one message.
"""

import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from xushi.base.errors import BadInput, XushiError
from xushi.base.messages import Message
from xushi.engine import LLM, Delta, SamplingParams
from xushi.serve.cards import can_chat, find_models, read_card

# DeepSeek-R1's recommended sampling (its model card, "Usage Recommendations").
TEMPERATURE, TOP_P = 0.6, 0.95
COMPLETION_TOKENS = 200

# Control characters: a model's text must not move the cursor or change the terminal's title.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Terminal:
    """One conversation with the models of a directory. A model is loaded when it is first used."""

    def __init__(
        self, directory: Path, template: Path | None = None, load: Callable[[Path], LLM] = LLM
    ) -> None:
        self._paths = find_models(directory)
        self._open = load
        self._models: dict[str, LLM] = {}
        self._messages: list[Message] = []
        self._colours = sys.stdout.isatty()
        chatting = [name for name, path in self._paths.items() if can_chat(path, template)]
        others = [name for name in self._paths if name not in chatting]
        self._chatting = chatting[0] if chatting else ""
        self._completing = others[0] if others else ""
        self.chats = bool(chatting)

    def greet(self) -> None:
        """Print what the models can do, and the keys and commands."""
        for name, path in self._paths.items():
            card = read_card(name, path)
            parts = (f"{card.title or name}:", card.can, card.cannot)
            print(self._dim(" ".join(part for part in parts if part)))
            if card.example:
                print(self._dim(f"  for example: {card.example.rstrip()}"))
        if self.chats and self._completing:
            print(self._dim("/base TEXT completes TEXT with the base model."))
        if self.chats:
            print(self._dim("/new starts a new conversation."))
        else:
            print(self._dim(f"{self._completing} has no chat template: it completes your text."))
        print(self._dim("Ctrl-C stops an answer, Ctrl-D ends the chat."))

    def turn(self, line: str) -> None:
        """Answer one line. An error is printed and the conversation continues."""
        try:
            if line.strip() == "/new":
                self._messages.clear()
            elif line.startswith("/base ") or line == "/base":
                self._complete(line.removeprefix("/base").removeprefix(" "))
            elif self.chats:
                self._chat(line)
            else:
                self._complete(line)
        except XushiError as error:
            hint = ", or start a new conversation with /new" if self._messages else ""
            print(f"{error}{hint}")

    def _chat(self, line: str) -> None:
        llm = self._load(self._chatting)
        self._messages.append(Message("user", line))
        try:
            answer = self._show(llm.stream_chat(self._messages, self._params(llm.context)))
        except XushiError:
            self._messages.pop()
            raise
        self._messages.append(Message("assistant", answer))

    def _complete(self, text: str) -> None:
        if not self._completing:
            raise BadInput(
                "there is no base model here", "chat, or give a run whose pretrain stage is done"
            )
        llm = self._load(self._completing)
        print(self._dim(_plain(text)), end="", flush=True)
        self._show(llm.stream(text, self._params(COMPLETION_TOKENS)))

    def _show(self, deltas: Iterator[Delta]) -> str:
        """Print an answer as it arrives, until its end or Ctrl-C; returns it without reasoning."""
        stopped = threading.Event()
        # Not as an exception: inside a step it would leave the engine in an inconsistent state.
        previous = signal.signal(signal.SIGINT, lambda *_: stopped.set())
        answer = ""
        channel = "content"
        try:
            for delta in deltas:
                if delta.channel != channel and channel == "reasoning":
                    print()
                channel = delta.channel
                text = _plain(delta.text)
                print(self._dim(text) if channel == "reasoning" else text, end="", flush=True)
                if channel == "content":
                    answer += delta.text
                if stopped.is_set():
                    print(self._dim(" (stopped)"), end="")
                    break
        finally:
            signal.signal(signal.SIGINT, previous)
        print(flush=True)
        return answer

    def _load(self, name: str) -> LLM:
        if name not in self._models:
            self._models[name] = self._open(self._paths[name])
            if sys.stdin.isatty():
                print(self._dim(str(self._models[name].memory)))
        return self._models[name]

    def _params(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(
            max_tokens, temperature=TEMPERATURE, top_p=TOP_P, seed=secrets.randbits(63)
        )

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[22m" if self._colours and text else text


def _plain(text: str) -> str:
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def chat(directory: Path, template: Path | None = None, load: Callable[[Path], LLM] = LLM) -> None:
    """Chat with a run's models, or with the model of a directory, until the input ends. `load`
    makes an `LLM` from a model's directory, with `template` if it is given.

    A directory without a model is a `XushiError`.
    """
    terminal = Terminal(directory, template, load)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (gives input() line editing and history)

        terminal.greet()
    while True:
        try:
            line = input("> " if interactive else "").removesuffix("\r")
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeDecodeError as error:
            raise BadInput(
                f"the input is not UTF-8: {error.reason}", "convert it, for example with iconv"
            ) from None
        if line.strip():
            terminal.turn(line)
    if interactive:
        print()
