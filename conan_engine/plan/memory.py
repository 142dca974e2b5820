"""The memory of a training step, by kind, in bytes of one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from conan_engine.model.lm_head import CHUNK_LOGITS

if TYPE_CHECKING:
    from conan_engine.config import Model as ModelSettings
    from conan_engine.plan.layout import Layout
    from conan_engine.plan.loads import Load


# on a CPU, measured: bytes of Python, torch and the loader, and the share of all others that lies unused between them
PROCESS, FRAGMENTS = 440 << 20, 0.06


class Form(NamedTuple):
    """How a rank computes: on "cuda" or "cpu", in bfloat16 or float32, with recompute = "block" or without; `data`
    ranks share out the data, `tensor` ranks a model.
    """

    device: str
    bfloat16: bool
    recompute: bool = False
    data: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Bytes of a number of the matrix products."""
        return 2 if self.bfloat16 else 4


def of_weights(layout: Layout, form: Form) -> dict[str, int]:
    """Bytes held all the time, by kind.

    A weight takes 2 in bfloat16 on a GPU, else 4; a trained one 4 for its gradient and, of each rank's share, 8 for
    the moments and 4 for the float32 weight, unless the weights are float32 (parallel/sharded_adamw.py). On a CPU the
    copy that a checkpoint is written from counts too.
    """
    half, share = form.bfloat16 and form.device == "cuda", -(-layout.trained // form.data)
    kinds = {
        "weights": (2 if half else 4) * layout.parameters,
        "gradients": 4 * layout.trained,
        "master weights": 4 * share if half else 0,
        "moments": 8 * share,
    }
    if form.device == "cpu":
        kinds["checkpoint"] = 12 * share
    return {kind: size for kind, size in kinds.items() if size}


def of(layout: Layout, load: Load, form: Form) -> dict[str, int]:
    """Bytes of a device at the peak of a step, by kind."""
    kinds = of_weights(layout, form) | of_step(layout, load, form)
    if form.device == "cpu":
        kinds |= {"process": PROCESS, "fragments": round(FRAGMENTS * sum(kinds.values()))}
    return kinds


def of_step(layout: Layout, load: Load, form: Form) -> dict[str, int]:
    """Bytes that the step adds at its peak, by kind.

    activations: what the backward pass needs of the tokens of the largest part. workspace: of the loss, or of a block's
    backward pass, or of the token table's gradient when the activations are gone: the largest.
    """
    shape, T = layout.shape, load.at_once
    kept, used = _of_block(shape, form)
    residual = shape.width / form.tensor
    each, again = ((4 + form.size) * residual, kept) if form.recompute else (kept, 0)
    # once: the last norm's input and output, RoPE's angles, the tokens
    activations = T * (shape.layers * each + again + 8 * residual + 4 * shape.head + 12)
    if form.bfloat16 and form.device == "cpu":
        activations += 2 * layout.matrices  # autocast casts the weights, for the backward pass too
    loss = _of_head(layout, T, form) if load.learnt else _of_vectors(layout, load, form)
    end = 3 * form.size * layout.table if layout.table_trained else 0
    return {"activations": round(activations), "workspace": round(max(T * used, loss, end - activations))}


def _of_block(shape: ModelSettings, form: Form) -> tuple[float, float]:
    """Bytes per token of one block: (kept for its backward pass, used in it).

    Kept: the residual stream before both norms (float32) and after; queries, keys, values, attention's output and its
    log-sum-exps; the inputs and the output of SwiGLU. On a CPU SDPA reads float32, and as many heads of keys as of
    queries. qk_norm has its own inputs and output, in float32. Tensor ranks share out all but the norms' outputs.
    """
    q, kv, F, C = shape.heads * shape.head, shape.kv_heads * shape.head, shape.ffn, shape.width
    size = form.size
    if form.device == "cuda":
        inner = size * (2 * q + 2 * kv + 3 * F)
        inner += 8 * (q + kv) + (2 * (q + kv) if form.bfloat16 else 0) if shape.qk_norm else 0
    else:
        rotated = q + (1 if shape.qk_norm else 2) * kv
        repeated = 2 * q if q != kv else 0
        inner = 4 * (rotated + repeated + q) + size * (q + 3 * F)
        if shape.qk_norm:
            values = 0 if form.bfloat16 and repeated else kv
            inner += 4 * (2 * (q + kv) + values)
    used = (3 if form.device == "cuda" else 5) * size * F
    return (8 * C + inner + 4 * shape.heads) / form.tensor + 2 * size * C, used / form.tensor + 12 * C


def _of_head(layout, T, form):
    """Bytes of the LM head: a chunk of logits, the gradients of its matrix and of the hidden states, and copies of
    these.
    """
    gradient = 4 * layout.table + (2 * layout.table if form.bfloat16 else 0) if layout.table_trained else 0
    # on a CPU the softmax of bfloat16 logits is taken in float32
    of_logit = form.size if form.device == "cuda" or not form.bfloat16 else 8
    return of_logit * CHUNK_LOGITS[form.device] + gradient + 3 * form.size * T * layout.shape.width


def _of_vectors(layout, load, form):
    """Bytes of InfoNCE: vectors and their gradients, of this rank's texts and of the documents of all ranks."""
    C = layout.shape.width
    return 4 * C * (2 * load.texts + 2 * load.queries + 3 * form.data * load.documents)
