"""Reading a room's own JSON files: missing and damaged ones are the user's to mend, so they get a
plain message.
"""

import json
from pathlib import Path
from typing import Any

from xushi.base.errors import BadInput


def read_manifest(path: Path) -> dict[str, Any]:
    """The table in `path`, written last into its directory: without it the directory does not
    count.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist", "run the data stage") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is damaged: {error}", "run the data stage again") from None
    if not isinstance(table, dict):
        raise BadInput(f"{path} is damaged: it holds no table", "run the data stage again")
    return table
