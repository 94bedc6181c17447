"""The miniature recipe, for the tests of the run."""

from ..miniature import MINIATURE, ROOT, XUSHI, Chain, read_results, xushi, xushi_here

__all__ = ["MINIATURE", "ROOT", "XUSHI", "Chain", "read_results", "xushi", "xushi_here"]
