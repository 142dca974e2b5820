"""Hard negatives: mined by nearest-neighbour search, scored by a teacher, replaced during training."""
