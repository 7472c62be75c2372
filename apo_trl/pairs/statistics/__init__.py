"""How contrastive pairs are, and which prompts overlap with evaluation sets."""
