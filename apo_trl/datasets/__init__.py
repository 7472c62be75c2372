"""Preference datasets in training: checks, filters, and the order of rows."""
