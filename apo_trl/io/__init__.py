"""Files, dataset rows, tokens and messages: what every other folder reads and writes with."""
