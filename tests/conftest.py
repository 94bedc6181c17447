"""What every test shares: no network, few threads, and property tests that draw the same examples each time."""

import os

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import settings

settings.register_profile("xushi", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("xushi")
