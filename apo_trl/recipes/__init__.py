"""Recipes: describe them, check them against the installed classes, plan their memory."""
