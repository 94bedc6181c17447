"""Floor 7: a recipe's stages in order, each resumable and skipped when its inputs have not changed."""

from xushi.run.runner import describe, run

__all__ = ["describe", "run"]
