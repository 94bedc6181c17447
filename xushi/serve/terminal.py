"""Chat in the terminal: text appears as it is generated, reasoning dimmed. Not here: HTTP.

Three ways: at a prompt; one question given at the start; one question on each line of standard
input. In the last two standard output has the answers and nothing else.
"""

import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from xushi.base.defaults import TEMPERATURE, TOP_P
from xushi.base.errors import BadInput, XushiError
from xushi.base.messages import Message
from xushi.base.model_directory import sampling_defaults
from xushi.base.seeds import derive
from xushi.engine import LLM, Delta, SamplingParams
from xushi.serve.cards import can_chat, find_models, read_card

COMPLETION_TOKENS = 200

# The oldest questions leave the conversation until it takes at most this share of the context: the
# rest is for the answer.
CONVERSATION_SHARE = 0.75

NO_ANSWER = 1  # the exit code where a model ended without an answer

HELP = """\
/help           show this list
/clear          start a new conversation
/retry          answer the last question again
/system TEXT    set the system message; without TEXT, remove it
/base TEXT      continue TEXT with the base model
/quit           end the chat, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with a space is never a command."""

# Control characters: a model's text must not move the cursor or change the terminal's title.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# "/usr/bin" is no command.
_COMMAND = re.compile(r"/([^\s/]*)(?:\s+(.*))?")


class Terminal:
    """One conversation with the models of a directory. A model is loaded when it is first used.

    `exit_code` tells how the turns ended: 0, or that of the last one that failed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        system: str = "",
        interactive: bool = False,
        template: Path | None = None,
        load: Callable[[Path], LLM] = LLM,
    ) -> None:
        """Options as those of `chat`. A value out of range is a `XushiError`."""
        self._paths = find_models(directory)
        self._open = load
        self._interactive = interactive
        self._notes: TextIO = sys.stdout if interactive else sys.stderr
        own = _own_sampling(next(iter(self._paths.values())))
        self._temperature = own.temperature if temperature is None else temperature
        self._top_p = own.top_p
        self._max_tokens, self._seed = max_tokens, seed
        self._asked = 0
        self._params(COMPLETION_TOKENS)  # refuses what is out of range before a model is loaded
        self._system = system
        self._models: dict[str, LLM] = {}
        self._messages: list[Message] = []
        self._shortened = False  # whether the model no longer sees all of them
        self._last: tuple[str, str] | None = None  # the model of the last question, and its text
        self._before: list[Message] = []  # what came before the last question
        chatting = [name for name, path in self._paths.items() if can_chat(path, template)]
        self._chatting = next(iter(chatting), "")
        others = [name for name in self._paths if name != self._chatting]
        self._completing = next((name for name in others if not can_chat(self._paths[name])), "")
        self.chats = bool(self._chatting)
        self.exit_code = 0
        if system and not self.chats:
            raise BadInput(
                "a model without a chat template takes no system message",
                "leave --system out, or give a template with --template FILE",
            )

    def greet(self) -> None:
        """Print what the models can do, and the keys and commands."""
        for name, path in self._paths.items():
            card = read_card(name, path)
            parts = (f"{card.title or name}:", card.can, card.cannot)
            self._note(_plain(" ".join(part for part in parts if part)))
            if card.example:
                self._note(_plain(f"  for example: {card.example.rstrip()}"))
        self.say_if_it_only_continues()
        self._note("/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the chat.")

    def say_if_it_only_continues(self) -> None:
        """Say that there is no model here that answers."""
        if not self.chats:
            self._note(f"{self._completing} has no chat template: it continues your text.")

    def turn(self, line: str) -> bool:
        """Obey or answer one line; False where it ends the chat. An error is printed and the
        conversation continues.
        """
        command = _COMMAND.fullmatch(line.rstrip())
        try:
            if command:
                return self._obey(command[1], command[2] or "")
            self.ask(line)
        except XushiError as error:
            self.exit_code = error.exit_code
            if not self._interactive and not command:
                print(flush=True)  # each question has its line
            self._note(f"error: {error.problem}\n{error.remedy}")
        return True

    def ask(self, text: str) -> None:
        """Answer a question, or continue a text where the run has only a base model."""
        if self.chats:
            self._chat(text)
        else:
            self._complete(text)

    def _obey(self, command: str, text: str) -> bool:
        if command == "help":
            self._note(HELP)
        elif command == "clear":
            self._messages, self._last, self._shortened = [], None, False
            self._note("(a new conversation)")
        elif command == "retry":
            self._retry()
        elif command == "system" and self.chats:
            self._system = text
            self._note("the system message is set" if text else "the system message is removed")
        elif command == "base":
            self._complete(text)
        elif command != "quit":
            self._unknown(command)
        return command != "quit"

    def _unknown(self, command: str) -> None:
        if command == "system":
            raise BadInput("this run's model takes no system message", "give a text to continue")
        raise BadInput(
            f"there is no command /{command}",
            "type /help for the list, or put a space before the line to send it",
        )

    def _retry(self) -> None:
        if self._last is None:
            raise BadInput("there is no question to answer again", "ask one first")
        name, text = self._last
        if name == self._completing:
            self._complete(text)
            return
        self._messages = self._before
        self._chat(text)

    def _chat(self, question: str) -> None:
        self._last, self._before = (self._chatting, question), self._messages
        llm = self._load(self._chatting)
        asked = [*self._messages, Message("user", question)]
        self._shorten(llm, asked)
        answer = self._show(llm.stream_chat(self._whole(asked), self._params(llm.context)))
        if answer:
            self._messages = [*asked, Message("assistant", answer)]

    def _complete(self, text: str) -> None:
        if not self._completing:
            raise BadInput("there is no model here that only completes text", "ask without /base")
        self._last = (self._completing, text)
        llm = self._load(self._completing)
        if self._interactive:
            print(self._dim(_plain(text), sys.stdout), end="", flush=True)
        self._show(llm.stream(text, self._params(COMPLETION_TOKENS)))

    def _whole(self, messages: list[Message]) -> list[Message]:
        return [Message("system", self._system), *messages] if self._system else messages

    def _shorten(self, llm: LLM, messages: list[Message]) -> None:
        """Remove the oldest questions and their answers from a conversation that is too long."""
        limit = CONVERSATION_SHARE * llm.context
        while len(messages) > 1 and len(llm.conversation_ids(self._whole(messages))) > limit:
            del messages[:2]
            if not self._shortened:
                self._note("(the conversation is long: the model no longer sees its beginning)")
            self._shortened = True

    def _show(self, deltas: Iterator[Delta]) -> str:
        """Print an answer as it arrives, until its end or Ctrl-C; returns it without reasoning."""
        stopped = threading.Event()
        # Not as an exception: inside a step it would leave the engine in an inconsistent state.
        self._asked += 1
        previous = signal.signal(signal.SIGINT, lambda *_: stopped.set())
        answer = ""
        channel = "content"
        try:
            for delta in deltas:
                if delta.channel != channel and channel == "reasoning":
                    print(file=self._notes, flush=True)
                channel = delta.channel
                text = _plain(delta.text)
                if channel == "reasoning":
                    print(self._dim(text, self._notes), end="", file=self._notes, flush=True)
                else:
                    print(text, end="", flush=True)
                    answer += delta.text
                if stopped.is_set():
                    break
        finally:
            signal.signal(signal.SIGINT, previous)
        if channel == "reasoning":
            print(file=self._notes)
        if channel == "content" or not self._interactive:
            print(flush=True)  # each question has its line
        self._say_end(bool(answer), stopped.is_set())
        return answer

    def _say_end(self, answered: bool, stopped: bool) -> None:
        """Say what is not plain from the text itself: that it was stopped, or that there is none.

        Ctrl-C ends the program where nobody can type the next question.
        """
        if stopped and not self._interactive:
            raise KeyboardInterrupt
        if stopped:
            self._note("(stopped)")
        elif not answered:
            self.exit_code = NO_ANSWER
            hint = "; /retry asks again" if self._interactive else ""
            self._note(f"(the model ended without an answer{hint})")

    def _load(self, name: str) -> LLM:
        if name not in self._models:
            self._models[name] = self._open(self._paths[name])
            if self._interactive:
                self._note(f"{name}: {self._models[name].memory}")
        return self._models[name]

    def _params(self, most: int) -> SamplingParams:
        """Those of the next question. The first one has the seed itself."""
        limit = most if self._max_tokens is None else self._max_tokens
        if limit < 1:
            raise BadInput(f"max_tokens is {limit}", "give at least 1")
        seed = self._seed
        if seed is None:
            seed = secrets.randbits(63)
        elif self._asked:
            seed = derive(seed, "question", self._asked)
        return SamplingParams(
            limit,
            temperature=self._temperature,
            top_p=self._top_p,
            seed=seed,
        )

    def _note(self, text: str) -> None:
        print(self._dim(text, self._notes), file=self._notes, flush=True)

    def _dim(self, text: str, stream: TextIO) -> str:
        return f"\x1b[2m{text}\x1b[22m" if text and stream.isatty() else text


def _own_sampling(directory: Path) -> SamplingParams:
    """Temperature and top_p of a model's generation_config.json, or the usual ones. A value out of
    range is a `XushiError` that names the file.
    """
    usual = {"temperature": TEMPERATURE, "top_p": TOP_P}
    try:
        return SamplingParams(1, **{**usual, **sampling_defaults(directory)})
    except BadInput as error:
        file = directory / "generation_config.json"
        raise BadInput(f"{file}: {error.problem}", f"correct it there: {error.remedy}") from None


def _plain(text: str) -> str:
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def chat(
    directory: Path,
    question: str | None = None,
    *,
    temperature: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    system: str = "",
    template: Path | None = None,
    load: Callable[[Path], LLM] = LLM,
) -> int:
    """Chat with a run's models, or with the model of a directory: answer `question`, or else each
    line of the input until its end.

    `max_tokens` limits each answer; without it that is the context, and 200 tokens of a text. The
    first question is sampled with `seed`, later ones with seeds derived from it. Returns the exit
    code, which is 0 after a chat at a prompt. Without a temperature it is that of the directory's
    generation_config.json, or 0.6. `load` makes an `LLM` from a model's directory, with `template`
    if that is given. A directory without a model is a `XushiError`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack a character of an answer
    interactive = question is None and sys.stdin.isatty() and sys.stdout.isatty()
    terminal = Terminal(
        directory,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        system=system,
        interactive=interactive,
        template=template,
        load=load,
    )
    return _run(terminal, question, interactive)


def _run(terminal: Terminal, question: str | None, interactive: bool) -> int:
    """Answer what is asked; returns the exit code."""
    if not interactive:
        terminal.say_if_it_only_continues()
    if question is not None:
        if not question.strip():
            raise BadInput("the question is empty", "give a text, or leave it out to chat")
        terminal.ask(question)
        return terminal.exit_code
    if interactive:
        _converse(terminal)
        return 0
    while (line := _read("")) is not None:
        if line.strip() and not terminal.turn(line):
            break
    return terminal.exit_code


def _converse(terminal: Terminal) -> None:
    """Answer what is typed. Ctrl-C ends what is going on, and never the chat."""
    import readline  # noqa: F401 (gives input() line editing and history)

    terminal.greet()
    going = True
    while going:
        try:
            line = _read("> ")
            going = line is not None and (not line.strip() or terminal.turn(line))
        except KeyboardInterrupt:  # of a line that is typed, or of a model that is loaded
            print()
    if line is None:
        print()


def _read(prompt: str) -> str | None:
    """The next line of the input, or None at its end."""
    try:
        return input(prompt).removesuffix("\r")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise BadInput(
            f"the input is not UTF-8: {error.reason}", "convert it, for example with iconv"
        ) from None
