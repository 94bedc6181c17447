"""Compare a published checkpoint in xushi and in transformers: greedy tokens and log-probabilities.

    python tools/check_published.py DIRECTORY [--dtype bfloat16] [--device cpu] [--tokens 32]

xushi continues 20 prompts greedily. transformers then reads each prompt with xushi's continuation.
At each generated position the two are compared: the most probable token, and the log-probabilities
of xushi's five most probable tokens. Where the tokens differ, transformers' margin between its own
choice and xushi's is printed, since rounding decides between nearly equal tokens.

DIRECTORY is on this machine; nothing is downloaded. The tokenizer is transformers' own, from the
same directory, without code from it. Memory: one model at a time. The last line is JSON, for
docs/model.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import xushi
from xushi.base.errors import BadInput, XushiError
from xushi.base.model_directory import model_name
from xushi.engine import SamplingParams, generate_ids
from xushi.model import load_pretrained

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a",
    "The three primary colours are",
    "In 1969, for the first time, a human being",
    "def fibonacci(n):\n    ",
    "import json\n\nwith open('data.json') as file:\n    ",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, COUNT(*) FROM users",
    "12 + 30 = 42\n17 + 25 =",
    "The derivative of x^3 is",
    "A prime number is a number that",
    "床前明月光，",
    "中华人民共和国的首都是",
    "请用一句话介绍机器学习：",
    "La révolution française a commencé en",
    "Ein Baum ist",
    "Question: Why is the sky blue?\nAnswer:",
    '{"name": "Ada", "born":',
    "Thank you very much for your letter of",
)
TOP = 5
Item = TypeVar("Item")


def main() -> int:
    arguments = parsed()
    directory = Path(arguments.directory)
    dtype = getattr(torch, arguments.dtype)
    try:
        result = compared(directory, dtype, arguments.device, arguments.tokens)
    except XushiError as error:
        print(f"{error.problem}\n{error.remedy}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="a checkpoint in the Hugging Face layout")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"]
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate per prompt")
    return parser.parse_args()


def compared(directory: Path, dtype: torch.dtype, device: str, tokens: int) -> dict[str, Any]:
    """The numbers of the last line."""
    began = time.monotonic()
    prompts = encoded(directory)
    texts, facts = continued(directory, dtype, device, prompts, tokens)
    say(f"transformers {transformers.__version__}: loading {directory}")
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise cannot_load(directory, "this model", error) from None
    comparison = Comparison()
    for text in told(texts, "transformers"):
        comparison.add(text, scored(model, text.ids, text.start, device))
    return {
        "checkpoint": model_name(directory),
        **facts,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "xushi": xushi.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        **comparison.numbers(),
        "seconds": round(time.monotonic() - began, 1),
    }


def continued(
    directory: Path, dtype: torch.dtype, device: str, prompts: list[list[int]], tokens: int
) -> tuple[list["Text"], dict[str, Any]]:
    """xushi's greedy continuations, made with its cache and scored without it; and what the model
    is.
    """
    say(f"xushi {xushi.__version__}: loading {directory}")
    model = load_pretrained(directory, dtype, device, mtp=False)
    params = SamplingParams(tokens, temperature=0, ignore_eos=True)
    texts: list[Text] = []
    for prompt in told(prompts, "xushi"):
        ids = [*prompt, *generate_ids(model, [prompt], params, eos_id=0)[0].token_ids]
        values = scored(model, ids, len(prompt), device)
        texts.append(Text(ids, len(prompt), values.topk(min(TOP, values.shape[1]))))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return texts, {"model_type": model.config.model_type, "parameters": parameters}


def cannot_load(directory: Path, what: str, error: Exception) -> BadInput:
    first = str(error).partition("\n")[0]
    return BadInput(
        f"{directory}: transformers cannot load {what}: {first}",
        "give it what it asks for: a package, a GPU, or files of the checkpoint that are missing",
    )


def encoded(directory: Path) -> list[list[int]]:
    """The prompts as the checkpoint's own tokenizer encodes them, with bos where it adds one."""
    if not directory.is_dir():
        raise BadInput(f"{directory} is not a directory", "give a downloaded checkpoint")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise cannot_load(directory, "its tokenizer", error) from None
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


@torch.no_grad()
def scored(model: Callable[[Tensor], Any], ids: list[int], start: int, device: str) -> Tensor:
    """Log-probabilities [generated tokens, V] in float32, on the CPU, of the tokens from place
    `start` of `ids` on.
    """
    logits_TV = model(torch.tensor([ids], device=device)).logits[0, start - 1 : -1]
    return logits_TV.float().log_softmax(-1).cpu()


@dataclass(frozen=True)
class Text:
    """A prompt and xushi's greedy continuation, which begins at `start`. `top`: xushi's most
    probable tokens at each place of the continuation, with their log-probabilities.
    """

    ids: list[int]
    start: int
    top: torch.return_types.topk


class Comparison:
    """Differences over all prompts."""

    def __init__(self) -> None:
        self.prompts = 0
        self.tokens = 0
        self.same = 0
        self.whole = 0
        self.largest = 0.0
        self.total = 0.0
        self.disagreements: list[dict[str, Any]] = []

    def add(self, text: Text, theirs: Tensor) -> None:
        """Compare with transformers' log-probabilities [generated tokens, V]."""
        generated = torch.tensor(text.ids[text.start :])
        best, other = theirs.max(-1)
        margins = best - theirs.gather(1, generated[:, None])[:, 0]
        differences = (theirs.gather(1, text.top.indices) - text.top.values).abs()
        for place in margins.nonzero()[:, 0].tolist():
            found = {
                "prompt": self.prompts,
                "token": place,
                "xushi": int(generated[place]),
                "transformers": int(other[place]),
                "margin": round(float(margins[place]), 6),
            }
            self.disagreements.append(found)
            say(f"another token: {found}")
        self.prompts += 1
        self.tokens += len(generated)
        self.same += int((margins == 0).sum())
        self.whole += bool((margins == 0).all())
        self.largest = max(self.largest, float(differences.max()))
        self.total += float(differences.mean(-1).sum())

    def numbers(self) -> dict[str, Any]:
        """For the last line."""
        return {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "same_tokens": self.same,
            "prompts_with_the_same_tokens": self.whole,
            "largest_difference_of_top_5_log_probabilities": self.largest,
            "mean_difference_of_top_5_log_probabilities": self.total / max(self.tokens, 1),
            "disagreements": self.disagreements,
        }


def told(items: list[Item], what: str) -> Iterator[Item]:
    """The items one by one; after each, a line says how far it is."""
    began = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        say(f"{what}: prompt {number} of {len(items)}, {time.monotonic() - began:.0f} s")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
