"""The command `apo-trl`: arguments, a call, and what it prints."""
