"""Ranks and devices: the mesh and its collectives, tensor parallelism, the sharded optimiser, signs of life."""
