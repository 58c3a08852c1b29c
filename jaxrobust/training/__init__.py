"""Training: `run` holds a whole run, `loop` its steps, `step` what one of them computes."""
