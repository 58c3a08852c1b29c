"""Commands that bring weights in, write them for others, and compare both."""
