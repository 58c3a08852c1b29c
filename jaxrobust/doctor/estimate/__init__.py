"""Estimates of a run's cost before it starts: time, chip-hours, memory and money per phase."""
