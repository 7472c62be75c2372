"""Settings of `apo-trl pairs`, from a recipe and the command line."""
