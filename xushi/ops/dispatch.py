"""Which form of an op runs: the compiled one if possible, else the fast PyTorch form.

`XUSHI_OPS=reference` forces the references, `XUSHI_OPS=pytorch` forces the PyTorch forms.
"""

import os


def asked_form() -> str | None:
    """The form that XUSHI_OPS forces, "reference" or "pytorch"; None if it forces none. Read at
    every call, so that a test can set it.
    """
    asked = os.environ.get("XUSHI_OPS")
    return asked if asked in ("reference", "pytorch") else None


def use_reference() -> bool:
    """Whether XUSHI_OPS forces the references."""
    return asked_form() == "reference"
