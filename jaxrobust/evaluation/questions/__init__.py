"""What the command asks: a target, images, one threat or several, corruptions."""
