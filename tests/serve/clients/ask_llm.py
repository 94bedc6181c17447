"""Asks through the command `llm`, which is told of a server in a file."""

import os
import tempfile
from pathlib import Path

home = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(home)

from asking import MOST_TOKENS, QUESTION, SEED, TEXT, URL, call, say  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from llm.cli import cli  # noqa: E402

entry = "- model_id: xushi-{0}\n  model_name: {0}\n  api_base: {1}\n{2}"
(home / "extra-openai-models.yaml").write_text(
    entry.format("reasoning", URL, "") + entry.format("base", URL, "  completion: true\n")
)
options = ["--key", "none", "-o", "seed", str(SEED), "-o", "max_tokens", str(MOST_TOKENS)]


def llm(*arguments):
    done = CliRunner().invoke(cli, [*arguments, *options], catch_exceptions=False)
    if done.exit_code:
        raise RuntimeError(done.output)
    return done.output.removesuffix("\n")


@call
def chat_whole():
    return llm("-m", "xushi-reasoning", "--no-stream", QUESTION)


@call
def chat_stream():
    return llm("-m", "xushi-reasoning", QUESTION)


@call
def chat_second():
    return llm("-c", "-m", "xushi-reasoning", "--no-stream", QUESTION)


@call
def completion_whole():
    return llm("-m", "xushi-base", "--no-stream", TEXT)


@call
def completion_stream():
    return llm("-m", "xushi-base", TEXT)


say()
