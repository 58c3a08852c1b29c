"""What `tools/prepare_imagenet.py` reads and writes: tar files, folders, records."""
