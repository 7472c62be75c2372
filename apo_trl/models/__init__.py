"""Models and adapters: load, merge, and the packaged small model."""
