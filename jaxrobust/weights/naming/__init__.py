"""Weight names: converts a reference's names to ours and back, and draws new heads and stems."""
