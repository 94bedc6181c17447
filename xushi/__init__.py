"""xushi (虚实): raw text in, a served DeepSeek-style reasoning model out, one code path from a laptop
to a cluster.
"""

__version__ = "0.1.0"
