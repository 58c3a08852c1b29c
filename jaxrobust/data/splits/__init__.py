"""Which images of a data set are read: the split grammar, lists of images, storage."""
