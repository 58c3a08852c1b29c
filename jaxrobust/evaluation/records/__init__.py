"""What is kept of an evaluation: records, verdicts image by image, what compares."""
