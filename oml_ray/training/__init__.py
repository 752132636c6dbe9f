"""The training floor: optimizer, loop, checkpoints and validation, with or without Ray."""
