"""The processes of a pod: how they start, share work, and learn that one has ended."""
