"""Image transforms: evaluation preprocessing, augmentations, corruptions."""
