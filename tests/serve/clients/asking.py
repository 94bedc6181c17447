"""What the scripts of this folder share. Each asks a server through one client, with that client's
own ways of streaming and of keeping a conversation, and prints what it was told, by call.
"""

import json
import sys

URL = sys.argv[1]
QUESTION = "数字之和是多少？"
TEXT = "数字之和"
SEED = 7
MOST_TOKENS = 24

told = {}


def call(function):
    """Run a call at once and keep what it returns. An error is kept as its text."""
    try:
        told[function.__name__] = function()
    except Exception as error:
        told[function.__name__] = f"{type(error).__name__}: {error}"
    return function


def say():
    print(json.dumps(told))
