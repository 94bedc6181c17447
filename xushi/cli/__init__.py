"""The command line: one verb per job, each a thin call into the package. Nothing heavy is imported
before it is needed.
"""

import errno
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any

# Set before torch is imported anywhere. Waiting threads must not burn a shared machine, but to
# sleep at once costs a wake-up at each of the thousands of small products of a step: a spin of some
# microseconds is 1.6 times as fast as none and as the default's long one (docs/lab-log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# oneDNN keeps a compiled kernel per matrix shape, and sampling meets new shapes at every step: its
# default of 1,024 holds up to a gigabyte, and this is as fast.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import typer

from xushi.base.errors import XushiError
from xushi.cli.app import app

# In the order of the help.
from xushi.cli import runs  # isort: skip
from xushi.cli import models  # isort: skip
from xushi.cli import ideas  # isort: skip
from xushi.cli import machine  # isort: skip

__all__ = ["app", "guarded", "ideas", "machine", "main", "models", "runs"]


def guarded(action: Callable[[], Any]) -> int:
    """Run `action`; what a user can cause becomes two lines and an exit code, never a traceback."""
    try:
        action()
    except XushiError as error:
        rank = os.environ.get("RANK", "")  # torchrun's: an error of all is printed in full once
        message = (
            f"process {rank}: {error.problem}"
            if re.fullmatch(r"[1-9]\d{0,8}", rank)
            else f"error: {error.problem}\n{error.remedy}"
        )
        print(message, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader went away, as with | head
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename)
        print(
            f"error: {name[:60]}... ({len(name):,} characters) is too long a name\n"
            "give a shorter one",
            file=sys.stderr,
        )
        return 2
    return 0


def main() -> None:
    """The console script."""
    code = 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the locale cannot print is escaped, as it is on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    if len(sys.argv) == 1:
        sys.argv.append("--help")

    def action() -> None:
        nonlocal code
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0

    try:
        failed = guarded(action)
    except (typer.Exit, SystemExit) as leaving:
        failed = int(getattr(leaving, "exit_code", getattr(leaving, "code", 0)) or 0)
    except Exception as error:  # click's own usage errors know how to show themselves
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {error.format_message()}\nsee xushi --help", file=sys.stderr)
        failed = 2
    sys.exit(failed or code)
