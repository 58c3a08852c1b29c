"""Networks of the study at 32 px, searched cells and further objectives."""
