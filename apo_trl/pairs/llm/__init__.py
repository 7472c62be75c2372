"""Requests to language models: servers and models in this process, limits, and the response cache."""
