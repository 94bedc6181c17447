"""The report of a run: one self-contained page for people to read."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xushi.report.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    # A run's report needs PyTorch; the charts and elements, which the ladder uses too, do not.
    if name == "write_report":
        from xushi.report.page import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
