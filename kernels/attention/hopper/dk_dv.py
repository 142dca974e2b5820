"""The backward kernel of soft-masked attention for Hopper (sm_90) that computes dk and dv, in Gluon: for bf16 and fp16,
D from 64 to 128.

It computes what dk_dv_block of kernels/attention/gradients.py computes; blocks.py says who does what. A block keeps 128
keys and their values. A ring brings, for one head after another, the queries and the gradients of their results in
pairs of 64 tokens, with what the weights need of each row (row_sums in ../schedule.py): rows past a sequence's end have
lse = inf, hence weight 0. Columns past it get numbers that go nowhere. All is transposed, columns x rows, so that the
products read the weights from registers. A consumer's steps of a pair:

    s, dp                      the two products begin
    p                          from s, while dp is under way
    dv                         begins
    ds = p * (dp - delta)      from dp, while dv is under way
    dk                         begins, and ends before the next pair

dk and dv take 128 of a thread's 240 registers, s and dp 64: nothing of the next pair can be under way within the same
consumer. The other consumer's products run meanwhile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from conan_kernels.attention.hopper.blocks import (
    LOG2_E,
    barrier,
    barriers,
    block_of,
    blocks_of_program,
    bring_block,
    factors,
    free_block_before,
    inner_products,
    leave_out,
    memory_of_block,
    number_of_parts,
    parts,
    place,
    read,
    room,
    sums,
    write,
)


@gluon.jit
def columns_of(first_row, length, ones, BLOCK: gl.constexpr, BY_ROW: gl.constexpr):
    """A slot's block of columns -> (its first column, where its FUTURE, MIXED and PLAIN rows begin).

    The block of the last rows has the first columns: those have the most rows, as the last rows have columns.
    """
    first_column = (gl.cdiv(length, BLOCK) - 1) * BLOCK - first_row
    last_column = gl.minimum(first_column + BLOCK, length)
    all_ones = ones >= (length if BY_ROW else last_column)
    mixed = gl.where(all_ones, 0, first_column)
    plain = gl.where(all_ones, 0, gl.cdiv(last_column - 1, BLOCK // 2) * (BLOCK // 2))
    return first_column, gl.where(ones >= 0, 0, mixed), mixed, plain


@gluon.jit
def produce(
    sources, plan, order, padded_rows, heads, block, ring,
    H: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr, BY_ROW: gl.constexpr,
):  # fmt: skip
    """Keys and values, then the rows that see them, of each head that shares them."""
    HALF: gl.constexpr = BLOCK // 2
    HEADS: gl.constexpr = H // G
    k, v, q, dout, log_sums, future_log_sums, deltas = sources
    heads_q, heads_k, heads_v = heads
    queries, douts, row_sums, full, empty = ring
    n, turn = 0, 0
    number, ahead, back, blocks = blocks_of_program(order, G)
    while number < blocks:
        group, start, length, first_row, ones, padded = block_of(number, order, plan, G, BLOCK)
        first_column, future, _, _ = columns_of(first_row, length, ones, BLOCK, BY_ROW)
        of_k = place(start, length, first_column, group, heads_k)
        of_v = place(start, length, first_column, group, heads_v)
        bring_block(turn, block, k, v, of_k, of_v, HALF, W)
        for head in range(group * HEADS, group * HEADS + HEADS):
            for position in range(future, length, HALF):
                tile, arrived = room((queries, full, empty), n, HALF * W * 4 + HALF * (12 if BY_ROW else 8), STAGES)
                row = head * padded_rows + padded + position
                read(q, place(start, length, position, head, heads_q), arrived, tile)
                read(dout, place(start, length, position, head, H), arrived, douts.index(n % STAGES))
                read(log_sums, [row], arrived, row_sums.index(n % STAGES * 3))
                read(deltas, [row], arrived, row_sums.index(n % STAGES * 3 + 1))
                if BY_ROW:
                    read(future_log_sums, [row], arrived, row_sums.index(n % STAGES * 3 + 2))
                n += 1
        turn += 1
        number += ahead
        ahead, back = back, ahead


@gluon.jit
def add_rows(
    dk, dv, n, position, mixed, plain, k, v, ring, columns, column_bias, scale,
    HALF: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr, BY_ROW: gl.constexpr,
):  # fmt: skip
    """dk and dv [64, W] and what pair n of the ring, the rows from `position` on, adds to them."""
    BY_ROWS: gl.constexpr = gl.SliceLayout(0, sums(HALF))
    queries, douts, row_sums, full, empty = ring
    mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
    q, dout = queries.index(n % STAGES).reshape([HALF, W]), douts.index(n % STAGES).reshape([HALF, W])
    s = inner_products(parts(k, D), parts(q, D), HALF, HALF)
    dp = inner_products(parts(v, D), parts(dout, D), HALF, HALF)
    log_sum = row_sums.index(n % STAGES * 3).load(BY_ROWS)[None, :]
    s = warpgroup_mma_wait(number_of_parts(D), deps=[s])
    if position >= plain:
        p = gl.exp2(s * scale - log_sum)
    elif BY_ROW:
        future_log_sum = row_sums.index(n % STAGES * 3 + 2).load(BY_ROWS)[None, :]
        past = columns[:, None] <= (position + gl.arange(0, HALF, BY_ROWS))[None, :]
        p = gl.exp2(s * scale - gl.where(past, log_sum, future_log_sum))
    elif position < mixed:
        p = gl.exp2(s * scale + column_bias[:, None] - log_sum)
    else:
        past = columns[:, None] <= (position + gl.arange(0, HALF, BY_ROWS))[None, :]
        p = gl.exp2(s * scale + gl.where(past, 0.0, column_bias[:, None]) - log_sum)
    weights = gl.convert_layout(p.to(q.dtype), factors(W))
    dv = warpgroup_mma(weights, dout, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    delta = row_sums.index(n % STAGES * 3 + 1).load(BY_ROWS)[None, :]
    ds = gl.convert_layout((p * (dp - delta)).to(q.dtype), factors(W))
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    dk, dv, weights, ds = warpgroup_mma_wait(0, deps=[dk, dv, weights, ds])
    mbarrier.arrive(empty.index(n % STAGES))
    return dk, dv


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, dk, dv, bias, plan, order, scale, block, ring,
    HEADS: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr,
    BY_ROW: gl.constexpr,
):  # fmt: skip
    """Columns 64 * CONSUMER to 64 * CONSUMER + 63 of every block."""
    HALF: gl.constexpr = BLOCK // 2
    LOGITS: gl.constexpr = sums(HALF)
    keys, values, full, empty = block
    n, turn = 0, 0
    number, ahead, back, blocks = blocks_of_program(order, G)
    while number < blocks:
        group, start, length, first_row, ones, _ = block_of(number, order, plan, G, BLOCK)
        first_column, future, mixed, plain = columns_of(first_row, length, ones, BLOCK, BY_ROW)
        columns = first_column + CONSUMER * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LOGITS))
        column_bias = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, LOGITS))
        if not BY_ROW:
            column_bias = gl.load(bias + start + columns, mask=columns < length, other=0.0)
        tile_k, tile_v = keys.index(turn % 2 * 2 + CONSUMER), values.index(turn % 2 * 2 + CONSUMER)
        k, v = tile_k.reshape([HALF, W]), tile_v.reshape([HALF, W])
        mbarrier.wait(full.index(turn % 2), turn // 2 & 1)
        free_block_before(turn, empty)

        total_k = gl.zeros([HALF, W], gl.float32, sums(W))
        total_v = gl.zeros([HALF, W], gl.float32, sums(W))
        of_block = mixed, plain, k, v, ring, columns, column_bias, scale
        # no row before a consumer's own first column sees it if the future is closed; nor does any one past the end
        own_column = first_column + CONSUMER * HALF
        begin = gl.where(own_column >= length, length, gl.where(ones >= 0, future, own_column))
        for _ in range(HEADS):
            n = leave_out(n, begin - future, ring, HALF, STAGES)
            for position in range(begin, length, HALF):
                total_k, total_v = add_rows(total_k, total_v, n, position, *of_block, HALF, D, W, STAGES, BY_ROW)
                n += 1

        # dk and dv leave through the memory of k and v
        k.store((total_k * (scale / LOG2_E)).to(k.dtype))
        v.store(total_v.to(v.dtype))
        fence_async_shared()
        barrier()
        write(dk, place(start, length, first_column + CONSUMER * HALF, group, G), tile_k)
        write(dv, place(start, length, first_column + CONSUMER * HALF, group, G), tile_v)
        turn += 1
        number += ahead
        ahead, back = back, ahead
    tma.store_wait(0)


@gluon.jit
def dk_dv_blocks(
    q, k, v, dout, dk, dv, log_sums, future_log_sums, deltas, bias, plan, order, padded_rows, heads_q, heads_k,
    heads_v, scale,
    H: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr,
    BY_ROW: gl.constexpr,
):  # fmt: skip
    """dk and dv of all blocks, summed over the heads that share them. Arguments as in dq.dq_blocks."""
    HALF: gl.constexpr = BLOCK // 2
    block = memory_of_block(k, HALF, W)
    ring = (
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, HALF, W], q.layout),
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, HALF, W], q.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES * 3, HALF], log_sums.layout),
        barriers(STAGES, 1),
        barriers(STAGES, 2),
    )
    fence_async_shared()
    sources = k, v, q, dout, log_sums, future_log_sums, deltas
    heads = heads_q, heads_k, heads_v
    gl.warp_specialize(
        [
            (consume, (0, dk, dv, bias, plan, order, scale, block, ring, H // G, G, BLOCK, D, W, STAGES, BY_ROW)),
            (consume, (1, dk, dv, bias, plan, order, scale, block, ring, H // G, G, BLOCK, D, W, STAGES, BY_ROW)),
            (produce, (sources, plan, order, padded_rows, heads, block, ring, H, G, BLOCK, W, STAGES, BY_ROW)),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [240, 24],  # registers of their threads
    )
