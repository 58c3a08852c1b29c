"""Which images of a data set are read: the grammar of splits, lists of images, storage."""
