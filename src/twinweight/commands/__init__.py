"""One file a command: a typed function that cli.py registers."""
