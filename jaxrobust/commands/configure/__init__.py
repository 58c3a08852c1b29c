"""Commands that write and look through configs."""
