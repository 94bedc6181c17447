"""xushi (虚实): raw text in, a served DeepSeek-style reasoning model out, laptop to cluster."""

__version__ = "0.1.0"
