"""Which form of an op runs: the fast one, unless the environment asks for the references."""

import os


def use_reference() -> bool:
    """Whether `XUSHI_OPS=reference` is set; read at every call so that a test may set it."""
    return os.environ.get("XUSHI_OPS") == "reference"
