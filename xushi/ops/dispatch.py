"""Which form of an op runs: compiled where it can be, else PyTorch's fast one.

`XUSHI_OPS=reference` asks for the references, `XUSHI_OPS=pytorch` for PyTorch's forms.
"""

import os


def use_reference() -> bool:
    """Whether `XUSHI_OPS=reference` is set; read at every call so that a test may set it."""
    return os.environ.get("XUSHI_OPS") == "reference"
