"""The report of a run: one self-contained page for people to read."""

from xushi.report.page import write_report

__all__ = ["write_report"]
