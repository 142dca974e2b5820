"""Soft-masked attention for Hopper (sm_90) in Gluon: forward.py, dq.py and dk_dv.py, with what they share in blocks.py.

The plain kernels one folder up stay for every other GPU, for Triton's interpreter, and as what these are compared with.
"""

import math

DIMS = (64, 80, 96, 112, 128)  # the head dims that they take
BLOCK = 128  # rows of a block, columns of a tile of the forward kernel
STAGES = 2  # forward: tiles of keys in shared memory, and tiles of values
PAIRS = {64: 4, 128: 3}  # backward, by columns of a tile: pairs of tiles of the other axis
LIMIT = 1 << 30  # where every sequence ends for TMA
LOG2_E = math.log2(math.e)
