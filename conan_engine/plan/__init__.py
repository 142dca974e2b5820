"""What a run needs before it is started: memory, time, and what its ranks send each other."""
