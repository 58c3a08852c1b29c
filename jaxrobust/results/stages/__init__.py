"""What follows a training in one command: the choice of weights, attacks on them, their export."""
