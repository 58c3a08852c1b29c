"""The evaluations that the command runs: a target, images, threats, corruptions."""
