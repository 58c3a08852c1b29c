"""What an update computes: augmentation, attack, loss, gradients, optimiser, averages."""
