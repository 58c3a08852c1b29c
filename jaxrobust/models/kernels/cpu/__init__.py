"""CPU versions of computations: programs rewritten after tracing."""
