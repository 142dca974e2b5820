"""The forward Triton kernel of soft-masked attention, and what it shares with the backward kernels (gradients.py).

A program owns a block of one sequence and walks the tiles of the other axis. There are three kinds of tiles, each with
its own loop, so that a loop contains nothing that its kind does not need:

    PLAIN   every M_ij is 1: the past, columns with j <= alpha * l, everything at alpha = 1
    MIXED   on the diagonal: past and future
    FUTURE  every j > i: the bias is one vector, by column or by row

The head dim D need not be a power of two: a row is W columns, of which those from D on are zeros. With W = D, 112
columns are 64 + 32 + 16, the bits of D, as tuples of tensors; with W = 128 they are one tensor. The first saves an
eighth of the products and of shared memory, and costs more waits between them; architecture.py says which an
architecture uses. (A table of first columns and widths as an argument would read better, but Triton before 3.8 compiles
no nested tuples.)
"""

import triton
import triton.language as tl

PLAIN: tl.constexpr = tl.constexpr(0)
MIXED: tl.constexpr = tl.constexpr(1)
FUTURE: tl.constexpr = tl.constexpr(2)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
PLAN_CHUNK: tl.constexpr = tl.constexpr(1024)


@triton.jit(do_not_specialize=["B", "T", "slots"])
def plan_blocks(cu_seqlens, alpha, plan, bias, valid, B, T, slots, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Decide on the device which block of which sequence each program owns, so that nothing waits for cu_seqlens.

    Sequence b has the slots from start // BLOCK + b up to those of the next sequence: at least ceil(l / BLOCK), and T
    // BLOCK + B in all, which the host knows. A slot is (start, l, first row of the block, ones): ones is how many
    leading columns (rows for "row") have M = 1, or -1 if the future is closed. l = 0 means nothing to do. Long rows
    come first. bias [T] is log2 M of the future at a column ("column") or row ("row", "uniform"). valid [B]: whether
    the sequence lies within the batch, and alpha within [0, 1].
    """
    b = tl.program_id(0)
    chunk = tl.arange(0, PLAN_CHUNK)
    first_chunk, step = tl.program_id(1) * PLAN_CHUNK, tl.num_programs(1) * PLAN_CHUNK
    start, end, a = tl.load(cu_seqlens + b), tl.load(cu_seqlens + b + 1), tl.load(alpha)
    whole = ((b > 0) | (start == 0)) & ((b < B - 1) | (end == T))
    tl.store(valid + b, (start <= end) & whole & (a >= 0) & (a <= 1))  # false for NaN

    length = end - start
    free = a * length
    ones = length * (a == 1).to(tl.int32) if MASK == "uniform" else free.to(tl.int32)
    ones = tl.where(a > 0, ones, -1)
    first_slot, last_slot = start // BLOCK + b, end // BLOCK + b + 1
    blocks = tl.cdiv(length, BLOCK)
    for first in range(first_chunk, last_slot - first_slot, step):
        offset = first + chunk
        slot = first_slot + offset
        inside = (slot < last_slot) & (slot >= 0) & (slot < slots)
        tl.store(plan + slot * 4, start + 0 * slot, mask=inside)
        tl.store(plan + slot * 4 + 1, tl.where(offset < blocks, length, 0), mask=inside)
        tl.store(plan + slot * 4 + 2, (blocks - 1 - offset) * BLOCK, mask=inside)
        tl.store(plan + slot * 4 + 3, ones + 0 * slot, mask=inside)
    for first in range(first_chunk, length, step):
        position = first + chunk
        ratio = a + 0.0 * position if MASK == "uniform" else free / (position + 1).to(tl.float32)
        token = start + position
        tl.store(bias + token, tl.log2(tl.minimum(ratio, 1.0)), mask=(position < length) & (token >= 0) & (token < T))


@triton.jit
def load(pointer, first, limit, stride, ROWS: tl.constexpr, D: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr):
    """ROWS rows from `first` on, in parts; with MASKED, 0 from row `limit` on. A part begins where the higher bits
    of W end.
    """
    rows = tl.arange(0, ROWS)
    pointer += tl.cast(first, tl.int64) * stride
    parts = ()
    for bit in tl.static_range(8):
        if W & (128 >> bit):
            columns = W // (256 >> bit) * (256 >> bit) + tl.arange(0, 128 >> bit)
            pointers = pointer + rows[:, None] * stride + columns[None, :]
            if W > D:
                inside = (columns < D)[None, :]
                if MASKED:
                    inside = inside & (first + rows < limit)[:, None]
                parts = parts + (tl.load(pointers, mask=inside, other=0.0),)
            elif MASKED:
                parts = parts + (tl.load(pointers, mask=(first + rows < limit)[:, None], other=0.0),)
            else:
                parts = parts + (tl.load(pointers),)
    return parts


@triton.jit
def store(pointer, parts, first, limit, stride, ROWS: tl.constexpr, D: tl.constexpr):
    rows = tl.arange(0, ROWS)
    pointer += tl.cast(first, tl.int64) * stride
    column = 0
    for part in tl.static_range(len(parts)):
        columns = column + tl.arange(0, parts[part].shape[1])
        pointers = pointer + rows[:, None] * stride + columns[None, :]
        inside = (first + rows < limit)[:, None] & (columns < D)[None, :]
        tl.store(pointers, parts[part].to(pointer.dtype.element_ty), mask=inside)
        column += parts[part].shape[1]


@triton.jit
def zeros(ROWS: tl.constexpr, W: tl.constexpr):
    parts = ()
    for bit in tl.static_range(8):
        if W & (128 >> bit):
            parts = parts + (tl.zeros((ROWS, 128 >> bit), tl.float32),)
    return parts


@triton.jit
def times(parts, factor):
    scaled = ()
    for part in tl.static_range(len(parts)):
        scaled = scaled + (parts[part] * factor,)
    return scaled


@triton.jit
def inner_products(a, b):
    """a @ b.T over all parts; fp32 at full precision ("ieee"), since TF32 would keep 10 bits."""
    s = tl.dot(a[0], b[0].T, input_precision="ieee")
    for part in tl.static_range(1, len(a)):
        s = tl.dot(a[part], b[part].T, s, input_precision="ieee")
    return s


@triton.jit
def add_product(sums, p, b):
    """sums + p @ b, part by part."""
    added = ()
    for part in tl.static_range(len(sums)):
        added = added + (tl.dot(p.to(b[part].dtype), b[part], sums[part], input_precision="ieee"),)
    return added


@triton.jit
def query_tiles(first_row, length, ones, BM: tl.constexpr, BN: tl.constexpr, BY_ROW: tl.constexpr):
    """For a block of rows: where its PLAIN, MIXED and FUTURE columns end."""
    last_row = tl.minimum(first_row + BM, length)
    plain = tl.maximum(first_row + 1, ones)
    if BY_ROW:
        plain = tl.where(ones >= last_row, length, tl.maximum(first_row, ones) + 1)
    plain = tl.minimum(plain, length) // BN * BN
    mixed = tl.maximum(plain, tl.cdiv(last_row, BN) * BN)
    return plain, mixed, tl.where(ones >= 0, length, mixed)


@triton.jit
def query_bias(bias, rows, first, length, KIND: tl.constexpr, BN: tl.constexpr, BY_ROW: tl.constexpr):
    """log2 M of a tile of rows x the columns from `first` on; -inf for columns past the end."""
    columns = first + tl.arange(0, BN)
    if BY_ROW:
        # loaded here, so that it takes no registers in PLAIN loops
        row_bias = tl.load(bias + rows, mask=rows < length, other=0.0)[:, None]
        tile = tl.where((columns < length)[None, :], row_bias, float("-inf"))
    else:
        tile = tl.load(bias + columns, mask=columns < length, other=float("-inf"))[None, :]
    if KIND == MIXED:
        tile = tl.where(columns[None, :] <= rows[:, None], 0.0, tile)
    return tile


@triton.jit
def attend(
    out, total, peak, q, k, v, bias, rows, begin, end, length, stride_k, stride_v, scale,
    KIND: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """The online softmax over the columns from `begin` to `end`. scale includes log2(e), since the hardware's
    exponential is exp2.
    """
    if begin < end:  # if a loop may run zero times, ptxas waits for each wgmma before it issues the next (its C7515)
        for first in tl.range(begin, end, BN):
            s = inner_products(q, load(k, first, length, stride_k, BN, D, W, KIND != PLAIN))  # [BM, BN]
            if KIND == PLAIN:
                higher = tl.maximum(peak, tl.max(s, 1) * scale)
                p = tl.exp2(tl.fma(s, scale, -higher[:, None]))  # one instruction before the exponential
            else:
                s = tl.fma(s, scale, query_bias(bias, rows, first, length, KIND, BN, BY_ROW))
                higher = tl.maximum(peak, tl.max(s, 1))
                p = tl.exp2(s - higher[:, None])
            shrink = tl.exp2(peak - higher)
            total = total * shrink + tl.sum(p, 1)
            out = add_product(times(out, shrink[:, None]), p, load(v, first, length, stride_v, BN, D, W, KIND != PLAIN))
            peak = higher
    return out, total, peak


@triton.jit
def load_slot(slot):
    """A slot of the plan, as plan_blocks describes it; start is int64."""
    return tl.load(slot).to(tl.int64), tl.load(slot + 1), tl.load(slot + 2), tl.load(slot + 3)


@triton.jit(do_not_specialize=["T"])
def forward_block(
    q, k, v, out, lse, plan, bias, T, stride_q, stride_k, stride_v, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BY_ROW: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """out and lse of BM rows of one sequence and head."""
    slot, head = plan + tl.program_id(0) * 4, tl.program_id(1)
    start, length, first_row, ones = load_slot(slot)
    if length == 0:
        return
    group = head // (H // G)
    k += start * stride_k + group * D
    v += start * stride_v + group * D
    bias += start
    rows = first_row + tl.arange(0, BM)
    block = load(q + start * stride_q + head * D, first_row, length, stride_q, BM, D, W, True)  # [BM, D]
    plain, mixed, future = query_tiles(first_row, length, ones, BM, BN, BY_ROW)

    # Column 0 is in the past of every row, so the first loop that runs makes peak finite.
    state = zeros(BM, W), tl.zeros((BM,), tl.float32), tl.full((BM,), float("-inf"), tl.float32)
    fixed = length, stride_k, stride_v, scale
    a, total, peak = attend(*state, block, k, v, bias, rows, 0, plain, *fixed, PLAIN, BN, D, W, BY_ROW)
    a, total, peak = attend(a, total, peak, block, k, v, bias, rows, plain, mixed, *fixed, MIXED, BN, D, W, BY_ROW)
    a, total, peak = attend(a, total, peak, block, k, v, bias, rows, mixed, future, *fixed, FUTURE, BN, D, W, BY_ROW)

    store(out + start * (H * D) + head * D, times(a, (1 / total)[:, None]), first_row, length, H * D, BM, D)
    tl.store(lse + head.to(tl.int64) * T + start + rows, (peak + tl.log2(total)) / LOG2_E, mask=rows < length)
