"""What serving and chatting take where nothing else was asked for.

They are here so that the command line can show them without importing the server.
"""

HOST = "127.0.0.1"
PORT = 8000
# How many continuations may be running or waiting. A client that asks for more must retry later.
QUEUE_LIMIT = 256
# DeepSeek-R1's recommended sampling (its model card, "Usage Recommendations"). The page has the
# same two numbers.
TEMPERATURE, TOP_P = 0.6, 0.95
