"""A run on the disk: checkpoints written and read, resumed, locked, logged, stopped in order."""
