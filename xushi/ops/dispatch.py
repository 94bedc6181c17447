"""Which form of an op runs: the compiled one if possible, else the fast PyTorch form.

`XUSHI_OPS=reference` forces the references, `XUSHI_OPS=pytorch` forces the PyTorch forms.
"""

import os

from xushi.base.errors import BadInput

FORMS = ("reference", "pytorch")


def asked_form() -> str | None:
    """The form that XUSHI_OPS forces, "reference" or "pytorch"; None if it is unset or empty. Read
    at every call, so that a test can set it. Another value is a `BadInput`.
    """
    asked = os.environ.get("XUSHI_OPS")
    if not asked:
        return None
    if asked not in FORMS:
        raise BadInput(
            f"the environment variable XUSHI_OPS={asked!r} names no form of the operations",
            f"set it to {' or '.join(FORMS)}, or unset it for the fastest form",
        )
    return asked


def use_reference() -> bool:
    """Whether XUSHI_OPS forces the references."""
    return asked_form() == "reference"
