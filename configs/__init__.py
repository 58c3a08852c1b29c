"""Recipes: `--config NAME` finds them here, also where only the wheel is installed."""
