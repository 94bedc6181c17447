"""Which form of an op runs: compiled where it can be, else PyTorch's fast one.

`XUSHI_OPS=reference` asks for the references, `XUSHI_OPS=pytorch` for PyTorch's forms.
"""

import os


def asked_form() -> str | None:
    """What XUSHI_OPS asks for, "reference" or "pytorch"; read at every call so that a test may set
    it.
    """
    asked = os.environ.get("XUSHI_OPS")
    return asked if asked in ("reference", "pytorch") else None


def use_reference() -> bool:
    """Whether the references are asked for."""
    return asked_form() == "reference"
