"""What several networks of the study are made of."""
