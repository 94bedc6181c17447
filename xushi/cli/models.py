"""Commands about models: chat, serve, evaluate, inspect, export."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xushi.base.defaults import HOST, PORT, QUEUE_LIMIT, TEMPERATURE
from xushi.base.progress import say
from xushi.cli.app import DTYPES, JsonOption, app, check_dtype, print_table

if TYPE_CHECKING:
    import torch

    from xushi.engine import LLM


ModelArgument = Annotated[
    Path, typer.Argument(help="a run, such as runs/demo, or a model in Hugging Face's layout")
]
TemplateOption = Annotated[
    Path | None, typer.Option("--template", help="a chat template, instead of the directory's own")
]
DtypeOption = Annotated[
    str,
    typer.Option("--dtype", help="of the weights: auto (what fits the machine), fp32 or bf16"),
]
CacheOption = Annotated[
    int | None, typer.Option("--cache-tokens", help="tokens that the cache of each model holds")
]


def _dtype(name: str) -> "torch.dtype | None":
    """The dtype of a name on the command line."""
    import torch

    check_dtype(name)
    found = DTYPES[name]
    return None if found is None else getattr(torch, found)


def _loader(template: Path | None, dtype: str, cache_tokens: int | None) -> "Callable[[Path], LLM]":
    """Opens a model's directory with the options of the command line."""
    from xushi.engine import LLM

    chosen = _dtype(dtype)
    return lambda path: LLM(path, chosen, cache_tokens, template)


@app.command()
def chat(
    directory: ModelArgument,
    question: Annotated[
        str | None, typer.Argument(help="answer this alone; without it, chat")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help=f"0 takes the likeliest token; default: the directory's own, or {TEMPERATURE}"
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="limit of an answer")] = None,
    seed: Annotated[int | None, typer.Option(help="the same seed, the same answers")] = None,
    system: Annotated[str, typer.Option(help="a system message")] = "",
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    cache_tokens: CacheOption = None,
) -> None:
    """Talk to a model in the terminal, or ask it one question.

    Where standard input or output is no terminal, each line of the input is a question, and
    standard output has the answers alone; the model's thinking goes to standard error.
    """
    from xushi.serve import chat as terminal_chat

    code = terminal_chat(
        directory,
        question,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        system=system,
        template=template,
        load=_loader(template, dtype, cache_tokens),
    )
    if code:
        raise typer.Exit(code)


@app.command()
def serve(
    directory: ModelArgument,
    host: Annotated[str, typer.Option(help="address to listen on")] = HOST,
    port: Annotated[int, typer.Option(help="port to listen on")] = PORT,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    cache_tokens: CacheOption = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="a page's origin that may use the API, such as http://localhost:3000"),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="a file of keys, one a line, of which requests need one"),
    ] = None,
    queue_limit: Annotated[
        int, typer.Option(help="continuations that run or wait; more are told to come back")
    ] = QUEUE_LIMIT,
) -> None:
    """Serve models: the OpenAI-compatible API, and a chat page at /."""
    from xushi.serve import serve as serve_models

    serve_models(
        directory,
        host,
        port,
        allow_origins=allow_origin or (),
        api_key_file=api_key_file,
        queue_limit=queue_limit,
        load=_loader(template, dtype, cache_tokens),
    )
    # To take torch apart costs the interpreter up to seconds, and a server has nothing to save.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@app.command()
def evaluate(
    directory: ModelArgument,
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="text files, directories and patterns")
    ],
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Bits per byte of text files by a model, of a run by its base model, beside gzip, xz and
    zstd.
    """
    from xushi.evaluate import evaluate_texts
    from xushi.serve.cards import BASE, find_models

    models = find_models(directory)
    model = models.get(BASE) or next(iter(models.values()))
    found = evaluate_texts(model, paths, _dtype(dtype))
    if as_json:
        print(json.dumps(found))
    else:
        print_table(found)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="a model's directory, or a preset such as deepseek-v3")
    ],
    context: Annotated[
        int, typer.Option(min=1, max=1_000_000_000, help="tokens of context for cache and FLOPs")
    ] = 4096,
    mtp: Annotated[bool, typer.Option(help="count multi-token prediction in training")] = True,
    as_json: JsonOption = False,
) -> None:
    """Count a model's parameters, cache and FLOPs without loading it."""
    from xushi.model import from_published, preset
    from xushi.model.published import read_table, unread_note
    from xushi.plan import group_layers, inspect_model

    if Path(model).is_dir():
        table = read_table(Path(model))
        config = from_published(table, str(Path(model) / "config.json"))
        if note := unread_note(Path(model), table, config):
            say(note)
    else:
        config = preset(model)
    counted = inspect_model(config, context, mtp)
    if as_json:
        print(json.dumps(counted))
        return
    layers = counted.pop("layers")
    print_table(counted)
    columns = [
        name
        for name in ("attention", "feed_forward", "hyper_connections", "active")
        if any(layer[name] for layer in layers)
    ]
    groups = group_layers(layers)
    width = max(12, *(len(span) + 2 for span, _ in groups))
    print(
        f"\n{'layers':<{width}}{'':<26}"
        + "".join(f"{name.replace('_', '-'):>18}" for name in columns)
    )
    for span, layer in groups:
        print(
            f"{span:<{width}}{layer['kind']:<26}"
            + "".join(f"{layer[name]:>18,}" for name in columns)
        )


@app.command()
def export(
    directory: Annotated[
        Path, typer.Argument(help="a model's directory, such as runs/demo/export/reasoning")
    ],
    out: Annotated[Path, typer.Argument(help="the file to write, such as demo.gguf")],
    kind: Annotated[
        str, typer.Option("--type", help="how matrices are stored: bf16 or q8_0")
    ] = "bf16",
    as_json: JsonOption = False,
) -> None:
    """Write a model as a GGUF file, which llama.cpp and what is built on it load."""
    from xushi.model.gguf_export import export_gguf

    written = export_gguf(directory, out, kind)
    if as_json:
        print(json.dumps(written))
    else:
        print_table(written)
