"""The backward kernel of soft-masked attention for Hopper (sm_90) that computes dq, in Gluon: for bf16 and fp16, D from
64 to 128.

It computes what dq_block of kernels/attention/gradients.py computes; blocks.py says who does what. A block keeps 128
queries and the gradients of their results, both consumers theirs in registers. A ring brings the keys and values in
pairs of 64 tokens. A consumer's steps of a pair:

    s, dp                      the two products begin
    p                          from s, while dp is under way
    ds = p * (dp - delta)
    dq                         begins, and ends before the next pair

The other consumer's products run meanwhile: they take longer than all that a consumer does besides its own.

What the weights need of each row and column lies ready in whole tiles (row_sums in ../schedule.py): rows past a
sequence's end have lse = inf, hence weight 0, and columns past it a bias of -inf.
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
    block_ahead,
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
    tiles_of,
    write,
)


@gluon.jit
def last_column(mixed, future, length):
    """Where the columns end that a block of rows sees; the last MIXED tile may reach past the sequence."""
    return gl.minimum(gl.maximum(mixed, future), length)


@gluon.jit
def produce(
    sources, plan, order, heads, block, ring,
    H: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr, BY_ROW: gl.constexpr,
):  # fmt: skip
    """Queries and the gradients of their results, then the keys and values that they see."""
    HALF: gl.constexpr = BLOCK // 2
    q, dout, k, v, closed_bias = sources
    heads_q, heads_k, heads_v = heads
    keys, values, biases, full, empty = ring
    n, turn = 0, 0
    number, ahead, back, blocks = blocks_of_program(order, H)
    while number < blocks:
        head, start, length, first_row, ones, padded = block_of(number, order, plan, H, BLOCK)
        plain, mixed, future = tiles_of(first_row, length, ones, BLOCK, BY_ROW)
        of_q, of_dout = place(start, length, first_row, head, heads_q), place(start, length, first_row, head, H)
        bring_block(turn, block, q, dout, of_q, of_dout, HALF, W)
        group = head // (H // G)
        for position in range(0, last_column(mixed, future, length), HALF):
            tile, arrived = room((keys, full, empty), n, HALF * W * 4 + HALF * 4, STAGES)
            read(k, place(start, length, position, group, heads_k), arrived, tile)
            read(v, place(start, length, position, group, heads_v), arrived, values.index(n % STAGES))
            read(closed_bias, [padded + position], arrived, biases.index(n % STAGES))
            n += 1
        turn += 1
        number += ahead
        ahead, back = back, ahead


@gluon.jit
def loaded(slices, LAYOUT: gl.constexpr):
    """Parts of a tile in registers."""
    found = ()
    for part in gl.static_range(len(slices)):
        found = found + (slices[part].load(LAYOUT),)
    return found


@gluon.jit
def add_columns(
    dq, n, position, plain, mixed, q, dout, ring, rows, of_rows, scale,
    HALF: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr, BY_ROW: gl.constexpr,
):  # fmt: skip
    """dq [64, W] and what pair n of the ring, the columns from `position` on, adds to it -> dq, dout."""
    BY_COLUMN: gl.constexpr = gl.SliceLayout(0, sums(HALF))
    keys, values, biases, full, empty = ring
    log_sum, future_log_sum, delta = of_rows
    mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
    k, v = keys.index(n % STAGES).reshape([HALF, W]), values.index(n % STAGES).reshape([HALF, W])
    s = inner_products(q, parts(k, D), HALF, HALF)
    dp = inner_products(dout, parts(v, D), HALF, HALF)
    s = warpgroup_mma_wait(number_of_parts(D), deps=[s])
    # Branches, since ptxas moves no exponential out of them and behind the wait for dp.
    if position < plain:
        p = gl.exp2(s * scale - log_sum[:, None])
    elif position >= mixed:
        column_bias = biases.index(n % STAGES).load(BY_COLUMN)[None, :]
        p = gl.exp2(s * scale + column_bias - future_log_sum[:, None])
    else:
        column_bias = biases.index(n % STAGES).load(BY_COLUMN)[None, :]
        past = (position + gl.arange(0, HALF, BY_COLUMN))[None, :] <= rows[:, None]
        if BY_ROW:
            p = gl.exp2(s * scale + column_bias - gl.where(past, log_sum[:, None], future_log_sum[:, None]))
        else:
            p = gl.exp2(s * scale + gl.where(past, 0.0, column_bias) - log_sum[:, None])
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = gl.convert_layout((p * (dp - delta[:, None])).to(k.dtype), factors(W))
    if W == 64:  # ptxas of CUDA 12.8 and 12.9 would give ds the registers of dout, if nothing used those behind it
        dq, ds, kept = warpgroup_mma_wait(0, deps=[warpgroup_mma(ds, k, dq, is_async=True), ds, dout[0]])
        dout = (kept,)
    else:
        dq, ds = warpgroup_mma_wait(0, deps=[warpgroup_mma(ds, k, dq, is_async=True), ds])
    mbarrier.arrive(empty.index(n % STAGES))
    return dq, dout


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, dq, sums_of_rows, plan, order, scale, block, ring,
    H: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr, BY_ROW: gl.constexpr,
):  # fmt: skip
    """Rows 64 * CONSUMER to 64 * CONSUMER + 63 of every block."""
    HALF: gl.constexpr = BLOCK // 2
    LOGITS: gl.constexpr = sums(HALF)
    queries, douts, full, empty = block
    log_sums, future_log_sums, deltas, padded_rows = sums_of_rows
    n, turn = 0, 0
    number, ahead, back, blocks = blocks_of_program(order, H)
    block_now = block_ahead(number, blocks, order, plan, H, BLOCK)
    while number < blocks:
        head, start, length, first_row, ones, padded = block_now
        number += ahead
        ahead, back = back, ahead
        block_now = block_ahead(number, blocks, order, plan, H, BLOCK)
        plain, mixed, future = tiles_of(first_row, length, ones, BLOCK, BY_ROW)
        rows = first_row + CONSUMER * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LOGITS))
        row = head.to(gl.int64) * padded_rows + padded + rows
        of_rows = gl.load(log_sums + row), gl.load(future_log_sums + row), gl.load(deltas + row)
        mbarrier.wait(full.index(turn % 2), turn // 2 & 1)
        free_block_before(turn, empty)
        tile = queries.index(turn % 2 * 2 + CONSUMER)
        q = loaded(parts(tile.reshape([HALF, W]), D), factors(HALF))
        dout = loaded(parts(douts.index(turn % 2 * 2 + CONSUMER).reshape([HALF, W]), D), factors(HALF))

        total = gl.zeros([HALF, W], gl.float32, sums(W))
        # a consumer's own rows see no column after their last if the future is closed; rows past the end see none
        own_row, last = first_row + CONSUMER * HALF, last_column(mixed, future, length)
        end = gl.where(own_row >= length, 0, gl.where(ones >= 0, last, gl.minimum(last, own_row + HALF)))
        for position in range(0, end, HALF):
            of_block = plain, mixed, q, dout, ring, rows, of_rows, scale
            total, dout = add_columns(total, n, position, *of_block, HALF, D, W, STAGES, BY_ROW)
            n += 1
        n = leave_out(n, last - end, ring, HALF, STAGES)

        # dq leaves through the memory of q
        tile.reshape([HALF, W]).store((total * (scale / LOG2_E)).to(tile.dtype))
        fence_async_shared()
        barrier()
        write(dq, place(start, length, first_row + CONSUMER * HALF, head, H), tile)
        turn += 1
    tma.store_wait(0)


@gluon.jit
def dq_blocks(
    q, k, v, dout, dq, closed_bias, log_sums, future_log_sums, deltas, plan, order, padded_rows, heads_q, heads_k,
    heads_v, scale,
    H: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr,
    BY_ROW: gl.constexpr,
):  # fmt: skip
    """dq of all blocks. padded_rows: how many each head has in log_sums. heads_*, scale: as in forward_blocks."""
    HALF: gl.constexpr = BLOCK // 2
    block = memory_of_block(q, HALF, W)
    ring = (
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, HALF, W], k.layout),
        gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, HALF, W], k.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, HALF], closed_bias.layout),
        barriers(STAGES, 1),
        barriers(STAGES, 2),
    )
    fence_async_shared()
    sources = q, dout, k, v, closed_bias
    heads = heads_q, heads_k, heads_v
    rows = log_sums, future_log_sums, deltas, padded_rows
    gl.warp_specialize(
        [
            (consume, (0, dq, rows, plan, order, scale, block, ring, H, BLOCK, D, W, STAGES, BY_ROW)),
            (consume, (1, dq, rows, plan, order, scale, block, ring, H, BLOCK, D, W, STAGES, BY_ROW)),
            (produce, (sources, plan, order, heads, block, ring, H, G, BLOCK, W, STAGES, BY_ROW)),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [240, 24],  # registers of their threads
    )
