"""Changes of an image: how evaluation prepares it, augmentations, corruptions."""
