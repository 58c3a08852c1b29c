"""What the CPU computes otherwise: programs rewritten after they are traced."""
