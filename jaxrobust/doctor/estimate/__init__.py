"""What a run will cost before it runs: hours, chip-hours, memory and money of every phase."""
