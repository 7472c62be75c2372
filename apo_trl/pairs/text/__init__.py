"""Text in and out of models: templates, revisions, verdicts and filters."""
