"""The choice of a run's weights on images that test nothing."""
