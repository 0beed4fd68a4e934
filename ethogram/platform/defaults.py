"""Where an embedded platform is unless it is told otherwise. Imports nothing, for quick starts."""

HOST = "127.0.0.1"
PORT = 8321
STATE = "runs/state"
