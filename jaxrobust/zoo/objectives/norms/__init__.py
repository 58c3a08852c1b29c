"""What several norms do together in a step: ascend from one point, or meet in one loss."""
