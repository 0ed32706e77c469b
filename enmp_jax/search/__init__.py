"""Search over masks: evolution strategies, the loop, the archive, and the controls to compare with."""
