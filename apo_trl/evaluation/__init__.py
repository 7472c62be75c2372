"""Suggest a loss before training, and score the result: anchor, evaluate, compare and report."""
