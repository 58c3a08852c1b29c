"""The computation of an update: augmentation, attack, loss, gradients, optimizer, averages."""
