"""Draw docs/images/{architecture,token,recipe-key,request}.svg from the package's real imports.

    python tools/draw_architecture.py [--check]

A package's layer is one above the highest layer that it imports from. Of the imports only those are
drawn that no longer path implies. Each step of a path must be a function or class that exists. With
--check nothing is written, and the exit code is 1 if a picture is not up to date.
"""

import ast
import html
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "xushi"
IMAGES = ROOT / "docs" / "images"

Imports = dict[str, set[str]]

# What happens to one thing, step by step: (file, function or class, what it does there).
PATHS = {
    "token": (
        "Data flow: a token, from a file's bytes to a weight",
        [
            ("data/sources.py", "read_source", "reads documents, each with a 16-byte uid"),
            ("data/corpus.py", "build_corpus", "drops duplicates, holds a part out"),
            ("tokenizer/tokenizer.py", "Tokenizer", "text to ids"),
            ("data/tokens.py", "tokenize_corpus", "token files that keep uid and span"),
            ("data/packing.py", "PackedSource", "documents to rows of one length"),
            ("data/batches.py", "TokenDataset", "rows by cursor, in a keyed order"),
            ("train/training.py", "Training", "records cursor and hash of the batch"),
            ("model/objective.py", "pretraining_loss", "the loss of the batch"),
            ("train/optimizer.py", "Optimizer", "the update"),
            ("train/checkpoint.py", "save_checkpoint", "weights on disk"),
        ],
    ),
    "recipe-key": (
        "Data flow: the recipe key pretrain.learning_rate",
        [
            ("cli/runs.py", "run_command", "--set pretrain.learning_rate=0.01"),
            ("run/recipe.py", "load_recipe", "reads the file, applies --set"),
            ("base/config.py", "parse", "checks types and bounds"),
            ("run/stages/pretrain.py", "Pretrain", "keeps the table as an attribute"),
            ("run/place.py", "stage_key", "hashes what the stage reads"),
            ("run/runner.py", "run", "skips the stage or runs it"),
            ("train/training.py", "Training", "asks the step"),
            ("train/step.py", "optimizer_step", "rate = learning_rate x schedule"),
        ],
    ),
    "request": (
        "Data flow: a request, POST /v1/chat/completions",
        [
            ("serve/app.py", "create_app", "the route"),
            ("serve/protocol.py", "ChatBody", "checks the body"),
            ("serve/worker.py", "Worker", "hands it to the engine's thread"),
            ("tokenizer/chat.py", "encode_chat", "messages to ids"),
            ("engine/engine.py", "Engine", "admits it, batches it with others"),
            ("model/deepseek.py", "Deepseek", "one call of the model per step"),
            ("engine/sampling.py", "sample", "draws a token"),
            ("engine/text.py", "TextStream", "tokens to text, reasoning apart"),
            ("serve/responses.py", "ResponseFormat", "the answer in the API's form"),
        ],
    ),
}


def package_of(path: Path) -> str:
    """The package, or the single file, that a source file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """The packages of xushi that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "xushi" and len(parts) > 1:
                yield parts[1]


def read_imports() -> Imports:
    """For each package, the packages that it imports."""
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE]
    names = {package_of(path) for path in files}
    found: Imports = {name: set() for name in names}
    for path in files:
        own = package_of(path)
        found[own] |= {name for name in imports_of(path) if name in names and name != own}
    return found


def layers_of(imports: Imports) -> dict[str, int]:
    """One above the highest layer imported from."""
    layers: dict[str, int] = {}

    def layer(name: str) -> int:
        if name not in layers:
            layers[name] = max((layer(other) + 1 for other in imports[name]), default=0)
        return layers[name]

    for name in imports:
        layer(name)
    return layers


def reduced(imports: Imports) -> Imports:
    """Without the imports that a longer path implies."""

    def reachable(start: str) -> set[str]:
        return {start}.union(*(reachable(name) for name in imports[start]))

    return {
        name: {
            other
            for other in others
            if not any(other in reachable(between) for between in others - {other})
        }
        for name, others in imports.items()
    }


def purpose_of(name: str) -> str:
    """The first sentence of a package's docstring."""
    file = PACKAGE / f"{name}.py"
    if not file.exists():
        file = PACKAGE / name / "__init__.py"
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
    return text.split(". ")[0].rstrip(".")


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def text(x: float, y: float, content: str, size: int = 12, extra: str = "") -> str:
    """One line of text."""
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" {extra}>{html.escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, title: str, lines: list[str]) -> str:
    """A box with a title and lines under it."""
    parts = [
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="6" '
        'fill="#f4f6f8" stroke="#5b6b7a"/>',
        text(x + 10, y + 20, title, 14, 'font-weight="600"'),
    ]
    parts += [text(x + 10, y + 38 + 14 * i, line, 11) for i, line in enumerate(lines)]
    return "".join(parts)


def page(width: float, height: float, body: str) -> str:
    """A whole SVG file on a light ground, readable in both themes."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" font-family="system-ui, sans-serif" fill="#1d2731">'
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#5b6b7a"/></marker></defs>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{body}</svg>\n'
    )


def draw_packages() -> str:
    """All packages by layer, the lowest at the bottom; an arrow points at what is imported."""
    imports = read_imports()
    layers = layers_of(imports)
    width, height, gap_x, gap_y = 196, 84, 18, 46
    rows = [sorted(n for n in layers if layers[n] == i) for i in range(max(layers.values()) + 1)]
    widest = max(map(len, rows))
    full = widest * (width + gap_x) + 130
    places = {}
    for layer, row in enumerate(rows):
        y = 24 + (len(rows) - 1 - layer) * (height + gap_y)
        start = 110 + (full - 130 - len(row) * (width + gap_x)) / 2
        for column, name in enumerate(row):
            places[name] = (start + column * (width + gap_x), y)
    arrows = []
    for name, others in sorted(reduced(imports).items()):
        for other in sorted(others):
            x1, y1 = places[name][0] + width / 2, places[name][1] + height
            x2, y2 = places[other][0] + width / 2, places[other][1]
            arrows.append(
                f'<path d="M{x1:.0f} {y1:.0f} C{x1:.0f} {y1 + 30:.0f} {x2:.0f} {y2 - 30:.0f} '
                f'{x2:.0f} {y2:.0f}" fill="none" stroke="#9aa8b5" marker-end="url(#a)"/>'
            )
    boxes = [
        box(x, y, width, height, name, wrapped(purpose_of(name), 32)[:3])
        for name, (x, y) in sorted(places.items())
    ]
    marks = [
        text(12, 24 + (len(rows) - 1 - i) * (height + gap_y) + 24, f"layer {i}", 12)
        for i in range(len(rows))
    ]
    total = len(rows) * (height + gap_y) + 10
    return page(full, total, "".join(arrows + boxes + marks))


def draw_path(name: str) -> str:
    """The steps of one path, top to bottom."""
    title, steps = PATHS[name]
    body = [text(16, 28, title, 16, 'font-weight="600"')]
    y = 46
    for number, (file, thing, does) in enumerate(steps):
        check_exists(file, thing)
        body.append(box(16, y, 640, 48, f"{number + 1}. {thing}", []))
        body.append(text(26, y + 38, does, 12))
        body.append(text(640, y + 20, f"xushi/{file}", 11, 'text-anchor="end" fill="#5b6b7a"'))
        if number + 1 < len(steps):
            body.append(
                f'<path d="M336 {y + 48} V{y + 64}" stroke="#9aa8b5" marker-end="url(#a)"/>'
            )
        y += 66
    return page(672, y, "".join(body))


def check_exists(file: str, thing: str) -> None:
    """Raise if a file defines no function or class of that name."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if thing not in {node.name for node in ast.walk(tree) if isinstance(node, kinds)}:
        raise SystemExit(f"xushi/{file} defines no {thing}\ncorrect PATHS in {__file__}")


def main() -> None:
    """Write the pictures, or compare them with what is there."""
    pictures = {"architecture": draw_packages()} | {name: draw_path(name) for name in PATHS}
    stale = []
    for name, content in pictures.items():
        file = IMAGES / f"{name}.svg"
        if "--check" in sys.argv:
            if not file.exists() or file.read_text(encoding="utf-8") != content:
                stale.append(file.name)
        else:
            file.write_text(content, encoding="utf-8")
    if stale:
        raise SystemExit(f"not up to date: {', '.join(stale)}\nrun python {sys.argv[0]}")


if __name__ == "__main__":
    main()
