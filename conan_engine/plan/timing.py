"""Predicted seconds of what a GPU computes in a step.

Three rates bound it: matrix products, attention's products, and memory, over which all between them moves. The shares
of a device's data sheet that they reach were measured on an H200 (benchmarks/results/attn-h200.json, infonce-h200.json
and step-h200.json); for other devices the same shares are assumed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from conan_engine.model.lm_head import CHUNK_LOGITS
from conan_kernels.attention import hopper

if TYPE_CHECKING:
    from conan_engine.config import Model as ModelSettings
    from conan_engine.plan.devices import Device
    from conan_engine.plan.layout import Layout
    from conan_engine.plan.loads import Load
    from conan_engine.plan.memory import Form

PRODUCTS = 0.75  # of the peak; 0.79 for the largest square ones
MEMORY, OPTIMIZER = 0.7, 0.86  # of the memory's rate
# of the peak, of attention over long texts with heads padded to a power of 2, forward and backward; and the length that
# reaches half of it, causal and open
HOPPER, PLAIN = (0.72, 0.55, 600, 150), (0.47, 0.35, 700, 150)
CONTRAST, OF_DIM = 0.55, 0.14  # of the peak, of InfoNCE over one dim; and the share of the time that each dim more adds
LAUNCH = (2e-4, 5e-4)  # seconds that Python takes to start a block's kernels, forward and backward
STEP = 3e-3  # seconds a step in which the device waits for the host: the batch, the loss, the norm


class Times(NamedTuple):
    """Seconds of one part of a step: of a block, forward and backward; of the token table; and of the LM head with its
    gradients. Once a step: of InfoNCE, in place of the LM head, and of the optimizer.
    """

    block: float
    block_backward: float
    loss: float
    table: float
    table_backward: float
    optimizer: float


def of(layout: Layout, load: Load, form: Form, device: Device) -> Times:
    """The Times of a step, whose parts are assumed to be equal."""
    rate, moved = PRODUCTS * 1e12 * device.tflops, MEMORY * 1e12 * device.bandwidth
    shape, t, layers = layout.shape, form.tensor, layout.shape.layers
    T, C = load.tokens / load.parts, layout.shape.width
    products = sum(
        max(2 * T * p.numel() / rate, 2 * (T * sum(p.shape) + p.numel()) / moved)
        for p in layout.model.blocks[0].parameters()
        if p.ndim == 2
    )
    forward, backward = attention(shape, load, form, device)
    # bytes of the norms and the residual stream, SwiGLU, and RoPE, each read and written once
    q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    between = T * (24 * C + 6 * shape.ffn + 8 * (q + kv)) / t
    between_backward = T * (36 * C + 10 * shape.ffn + 8 * (q + kv)) / t
    trained = layout.matrices / layers if layout.table_trained else layout.trained / layers
    return Times(
        block=max(LAUNCH[0], products + forward + between / moved),
        # the gradients of the weights are added to the sums in float32
        block_backward=max(LAUNCH[1], 2 * products + backward + (between_backward + 10 * trained) / moved),
        loss=_head(layout, load, rate, moved) if load.learnt else _contrast(layout, load, form, 1e12 * device.tflops),
        table=6 * T * C / t / moved,
        table_backward=((12 * layout.table if layout.table_trained else 0) + 6 * T * C / t) / moved,
        optimizer=STEP + (4 + 30 / form.data) * layout.trained / (moved / MEMORY * OPTIMIZER),
    )


def attention(shape: ModelSettings, load: Load, form: Form, device: Device) -> tuple[float, float]:
    """Seconds of one layer's attention, (forward, backward), over one part."""
    forward, backward, causal, open_ = HOPPER if device.hopper and shape.head in hopper.DIMS else PLAIN
    padded, half = 1 << (shape.head - 1).bit_length(), open_ if load.both_ways else causal
    flop = 4 * padded * shape.heads / form.tensor * load.pairs / load.parts
    length = load.pairs / load.tokens * (1 if load.both_ways else 2)
    reached = 1e12 * device.tflops * length / (length + half)
    return flop / (forward * reached), 2.5 * flop / (backward * reached)


def _head(layout, load, rate, moved):
    """Seconds of the LM head and its gradients: three products, and passes over the logits and over the table."""
    logits = load.learnt / load.parts * layout.table / layout.shape.width
    passes = 6 * logits + (12 * math.ceil(logits / CHUNK_LOGITS["cuda"]) + 14) * layout.table
    return 6 * logits * layout.shape.width / rate + passes / moved


def _contrast(layout, load, form, peak):
    """Seconds of InfoNCE and its gradients, once a step: four products."""
    flop = 8 * layout.shape.width * load.queries * load.documents * form.data
    return flop / (CONTRAST * peak) * (1 + OF_DIM * (load.dims - 1))
