"""Attacks as pure functions over a `logits_fn`."""
