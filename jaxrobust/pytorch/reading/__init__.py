"""From a PyTorch module to a program: exported, decomposed, read or refused."""
