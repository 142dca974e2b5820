"""Ranks and devices: the mesh and its collectives, tensor parallelism, the sharded optimizer, signs of life."""
