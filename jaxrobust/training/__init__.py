"""Training: `run` is a full run, `loop` its steps, `step` the computation of one of them."""
