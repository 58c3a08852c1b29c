"""The processes of a pod: how they start, share work, and hear of each other's end."""
