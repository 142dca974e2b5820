"""A run on disk: checkpoints written and read, resumed, locked, logged, stopped in order."""
