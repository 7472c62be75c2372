"""The command `apo-trl`: one file per command."""
