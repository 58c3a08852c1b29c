"""The study's convolutional networks, one file each."""
