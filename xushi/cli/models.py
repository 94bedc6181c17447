"""Commands about models: chat, serve, inspect, export."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from xushi.base.errors import BadInput
from xushi.cli.app import JsonOption, RunArgument, app, print_table


@app.command()
def chat(run_directory: RunArgument) -> None:
    """Talk to a run's model in the terminal."""
    from xushi.serve import chat as terminal_chat

    terminal_chat(run_directory)


@app.command()
def serve(
    run_directory: RunArgument,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8000,
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
    ] = 256,
) -> None:
    """Serve a run's models: the OpenAI-compatible API, and a chat page at /."""
    from xushi.serve import serve as serve_run

    serve_run(
        run_directory,
        host,
        port,
        allow_origins=allow_origin or (),
        api_key_file=api_key_file,
        queue_limit=queue_limit,
    )
    # To take torch apart costs the interpreter up to seconds, and a server has nothing to save.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="a model's directory, or a preset such as deepseek-v3")
    ],
    context: Annotated[int, typer.Option(help="tokens of context for cache and FLOPs")] = 4096,
    mtp: Annotated[bool, typer.Option(help="count multi-token prediction in training")] = True,
    as_json: JsonOption = False,
) -> None:
    """Count a model's parameters, cache and FLOPs without loading it."""
    from xushi.model import preset, read_config
    from xushi.plan import group_layers, inspect_model

    if context < 1:
        raise BadInput(f"--context {context} is not a length", "give at least 1")
    counted = inspect_model(
        read_config(model) if Path(model).is_dir() else preset(model), context, mtp
    )
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
