"""What the README and the pages of docs show can be run: Python against the miniature run, which
stands for the demo, recipes as recipes, and commands as far as their options.
"""

import contextlib
import io
import re
import shlex
import shutil
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import typer

from xushi import train
from xushi.cli import app
from xushi.envs import environment_class
from xushi.ladder.idea import Idea, files_read, read_idea
from xushi.model import Deepseek
from xushi.run.recipe import load_recipe
from xushi.serve import create_app, find_models
from xushi.serve.server import Server, bind
from xushi.tokenizer import Tokenizer

from .miniature import MINIATURE, ROOT, Chain, xushi_here
from .tiny import TINY

PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
CONTRACTS = ROOT / "tests" / "contracts"


def blocks(language: str) -> list[Any]:
    """Every fenced block in a language, with its page and line as its id."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S):
            line = text[: match.start()].count("\n") + 1
            found.append(pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def commands() -> list[Any]:
    """Every line of a block that calls xushi, by torchrun too, without its comment."""
    found = {}
    for page in PAGES:
        fenced = False
        for line in page.read_text(encoding="utf-8").splitlines():
            fenced ^= line.startswith("```")
            call = re.match(r"(    |\$ )?(?:torchrun \S+ \d+ -m )?xushi (.+)", line)
            if call and (fenced or call[1]):
                words = shlex.split(call[2], comments=True)
                if not set("[]|·") & set(call[2]):  # a synopsis has these
                    found[" ".join(words)] = pytest.param(words, id=" ".join(words))
    return list(found.values())


@pytest.fixture(scope="module")
def elsewhere(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which runs/demo is a copy of the miniature run."""
    place = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(chain.directory, place / "runs" / "demo")
    shutil.copytree(ROOT / "recipes", place / "recipes")
    return place


@pytest.fixture(scope="module")
def address(elsewhere: Path):
    """Where the run is served."""
    listener = bind("127.0.0.1", 0)
    server = Server(create_app(find_models(elsewhere / "runs" / "demo")))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.fixture
def names() -> dict[str, Any]:
    """What the text around the blocks has introduced."""
    tokenizer = Tokenizer.train(["import import"], 270, tools=True)
    prompt = tokenizer.encode("import ")
    size = TINY.model_copy(update={"vocab_size": 270, "max_position_embeddings": 64})
    return {
        "__name__": "a block of the docs",
        "model": Deepseek(size).initialise(0),
        "tokenizer": tokenizer,
        "prompt": prompt,
        "prompts": [prompt, prompt],
        "seeds": [1, 2],
        "tokens_BT": torch.tensor([prompt]),
        **{name: getattr(train, name) for name in ("OptimizationConfig", "Step", "StepResult")},
    }


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(
    code: str, elsewhere: Path, address: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With answers as long as the miniature's context allows. The call behind a class whose methods
    are dots is left out.
    """
    monkeypatch.chdir(elsewhere)
    code = code.replace("http://127.0.0.1:8000", address)
    code = re.sub(r"max_tokens=\d+|SamplingParams\(\d+", lambda m: re.sub(r"\d+", "4", m[0]), code)
    if re.search(r"\.\.\.(  #|$)", code, re.M):
        code = code.split("\n\n\n")[0]
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "block", "exec"), names)


def the_class(name: str) -> str:
    """The block that defines a class."""
    (code,) = [block.values[0] for block in blocks("python") if f"class {name}(" in block.values[0]]
    return code


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files are that the pages name: those of tests/contracts, with the environment of
    docs/envs.md added.
    """
    place = tmp_path_factory.mktemp("own")
    game = (CONTRACTS / "game.py").read_text(encoding="utf-8")
    (place / "game.py").write_text(f"{game}\n\n{the_class('Reverse')}", encoding="utf-8")
    shutil.copy(CONTRACTS / "stages.py", place)
    return place


def is_idea(block: Any) -> bool:
    return "metric" in tomllib.loads(block.values[0])


@pytest.mark.parametrize("text", [each for each in blocks("toml") if is_idea(each)])
def test_ideas_are_shipped(text: str) -> None:
    """Each is one of ideas/, and the files that it names are there."""
    shipped = [read_idea(path) for path in sorted((ROOT / "ideas").glob("*.toml"))]
    idea = Idea.model_validate(tomllib.loads(text))
    assert idea in shipped
    assert all(files_read(each, ROOT) for each in shipped)


@pytest.mark.parametrize("text", [each for each in blocks("toml") if not is_idea(each)])
def test_tables_are_a_recipes(text: str, own_files: Path) -> None:
    """With what else a recipe needs from the miniature; a table of the same name is replaced."""
    table = tomllib.loads(MINIATURE.read_text(encoding="utf-8"))
    table["evaluate"].pop("longer", None)
    table["model"]["max_position_embeddings"] = 4096
    for key, value in tomllib.loads(text).items():
        inner = isinstance(value, dict) and key != "environment"
        table[key] = table.get(key, {}) | value if inner else value
    path = own_files / "recipe.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    recipe = load_recipe(path, [])
    assert recipe.environment is not None and recipe.environment.kind.startswith("game.py:")


def test_the_environment_of_the_page_scores_as_it_should(own_files: Path) -> None:
    """Its own answer is right and its exploits are wrong."""
    environment = environment_class("game.py:Reverse", own_files)
    made = environment(environment.Config())
    task = made.task("train", 0)
    assert made.score(task, made.solve(task)).verdict == "right"
    assert {made.score(task, each).verdict for each in made.exploits(task)} == {"wrong"}


@pytest.mark.slow
@pytest.mark.parametrize("name, folder", [("Reverse", "own"), ("Counting", "contracts")])
def test_the_check_of_the_pages_environments_says_what_they_show(
    name: str, folder: str, own_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_files if folder == "own" else CONTRACTS)
    done = xushi_here("env", "check", f"game.py:{name}")
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [page.read_text(encoding="utf-8") for page in PAGES]
    assert any(done.stdout.strip() in text for text in shown), done.stdout


@pytest.mark.parametrize("words", commands())
def test_commands_have_these_options(words: list[str]) -> None:
    """The command is parsed and not run."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    with command.make_context(command.name, list(words)) as context:
        assert not context.args


def test_the_synopsis_names_the_options_that_there_are() -> None:
    """docs/run.md has a line for each command, with its options and no others."""
    text = (ROOT / "docs" / "run.md").read_text(encoding="utf-8")
    synopsis = re.search(r"^```\n(xushi train .*?)^```", text, re.M | re.S)
    assert synopsis is not None
    told: dict[str, set[str]] = {}
    for part in re.split(r"xushi |·", synopsis[1]):
        if words := part.split():
            told[words[0]] = set(re.findall(r"--[a-z][a-z-]*", part))
    command = typer.main.get_command(app)
    for name, options in told.items():
        found = command.commands[name]
        found = next(iter(found.commands.values())) if hasattr(found, "commands") else found
        known = {option for each in found.params for option in (*each.opts, *each.secondary_opts)}
        assert options <= known, (name, options - known)
    assert set(told) == {name for name, each in command.commands.items() if not each.hidden}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        each
        for each in commands()
        if each.values[0][0] in ("inspect", "doctor", "export") or "--dry-run" in each.values[0]
    ],
)
def test_commands_that_only_look_run(
    words: list[str], elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(elsewhere)
    done = xushi_here(*words)
    assert done.returncode == 0, done.stderr
