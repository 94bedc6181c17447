"""Floor 7: what happened in a run, as one self-contained page that a person enjoys reading."""

from xushi.report.page import write_report

__all__ = ["write_report"]
