"""The forward kernel of soft-masked attention for Hopper (sm_90), in Gluon: for bf16 and fp16, D from 64 to 128.

It computes what tiles.forward_block computes, tile by tile; blocks.py says who does what. While a tile's softmax runs,
the product of the weights before it with their values is under way, and so are the other consumer's products.

A block's first tile is its MIXED one, the only one with a mask for each entry; where it has none, tile 0 by the same
code. Then come PLAIN and FUTURE tiles. The bias of FUTURE ("column") is a product too: three columns of ones times the
three pieces of the bias of each column (split_bias in ../schedule.py), which also close the columns past a sequence's
end. So a FUTURE entry costs no arithmetic and no register more than a PLAIN one, and its tile D / 16 + 1 products with
the keys instead of D / 16. For "row" and "uniform" the bias is one number a row and goes where the row's maximum is
taken off.
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
    block_at,
    block_of,
    blocks_of_program,
    factors,
    free_block_before,
    inner_products,
    parts,
    place,
    place_ahead,
    read,
    room,
    sums,
    tiles_of,
    write,
)


@gluon.constexpr_function
def constants():
    """The layout in which 4 warps write [64, 16]."""
    return gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])


@gluon.jit
def first_tile(plain, mixed, BLOCK: gl.constexpr):
    """Where the tile begins that a block begins with, and its first PLAIN tile of the others."""
    return gl.where(mixed > plain, plain, 0), gl.where(mixed > plain, 0, BLOCK)


@gluon.jit
def bring(
    n, sources, rings, position, start, length, group, row_of_pieces,
    FUTURE: gl.constexpr, BLOCK: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tile n of the ring: the keys and values from `position` on, and in FUTURE the pieces of their bias."""
    k, v, pieces, heads_k, heads_v = sources
    keys, values, bias = rings
    tile, full = room(keys, n, BLOCK * W * 2 + (BLOCK * 32 if FUTURE else 0), STAGES)
    read(k, place(start, length, position, group, heads_k), full, tile)
    if FUTURE:
        read(pieces, [row_of_pieces + position, 0], full, bias.index(n % STAGES))
    tile, full = room(values, n, BLOCK * W * 2, STAGES)
    read(v, place(start, length, position, group, heads_v), full, tile)


@gluon.jit
def produce(
    q, closed_bias, sources, plan, order, heads_q, queries, rings,
    H: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr, BY_ROW: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = BLOCK // 2
    n, turn = 0, 0
    number, ahead, back, blocks = blocks_of_program(order, H)
    while number < blocks:
        head, start, length, first_row, ones, row_of_pieces = block_of(number, order, plan, H, BLOCK)
        plain, mixed, future = tiles_of(first_row, length, ones, BLOCK, BY_ROW)
        first, begin = first_tile(plain, mixed, BLOCK)
        tiles, first_biases, full, empty = queries
        mbarrier.wait(empty.index(turn % 2), turn // 2 & 1 ^ 1)
        mbarrier.expect(full.index(turn % 2), BLOCK * W * 2 + BLOCK * 4)
        read(closed_bias, [row_of_pieces + first], full.index(turn % 2), first_biases.index(turn % 2))
        for half in gl.static_range(2):
            coordinates = place(start, length, first_row + half * HALF, head, heads_q)
            read(q, coordinates, full.index(turn % 2), tiles.index(turn % 2 * 2 + half))
        of_block = start, length, head // (H // G), row_of_pieces
        bring(n, sources, rings, first, *of_block, False, BLOCK, W, STAGES)
        n += 1
        for position in range(begin, plain, BLOCK):
            bring(n, sources, rings, position, *of_block, False, BLOCK, W, STAGES)
            n += 1
        for position in range(mixed, future, BLOCK):
            bring(n, sources, rings, position, *of_block, True, BLOCK, W, STAGES)
            n += 1
        turn += 1
        number += ahead
        ahead, back = back, ahead


@gluon.jit
def add_values(out, p, values, n, BLOCK: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr):
    """Begin out + p @ v of tile n, once its values are there."""
    mbarrier.wait(values[1].index(n % STAGES), n // STAGES & 1)
    return warpgroup_mma(p, values[0].index(n % STAGES).reshape([BLOCK, W]), out, is_async=True)


@gluon.jit
def attend(
    state, n, more, q, rings, ones, row_bias, scale,
    FUTURE: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The online softmax over tile n, and the product of tile n - 1's weights with their values.

    state: out, which lacks tile n - 1, its weights p, peak, total. Tile n is there. more: whether another tile follows.
    """
    keys, values, bias = rings
    out, p, peak, total = state
    k = keys[0].index(n % STAGES).reshape([BLOCK, W])
    s = inner_products(parts(q, D), parts(k, D), BLOCK // 2, BLOCK)
    if FUTURE:
        s = warpgroup_mma(ones, bias.index(n % STAGES).permute((1, 0)), s, is_async=True)
    out = add_values(out, p, values, n - 1, BLOCK, W, STAGES)
    s = warpgroup_mma_wait(1, deps=[s])  # all but the values' product
    mbarrier.arrive(keys[2].index(n % STAGES))
    if FUTURE:
        higher = gl.maximum(peak, gl.max(s, 1) * scale + row_bias)
        weights = gl.exp2(s * scale + (row_bias - higher)[:, None])
    else:
        higher = gl.maximum(peak, gl.max(s, 1) * scale)
        weights = gl.exp2(s * scale - higher[:, None])
    shrink = gl.exp2(peak - higher)
    total = total * shrink + gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(q.dtype), factors(W))
    # The wait for the next tile stands here, since ptxas moves nothing across the branch in it: without it, all
    # exponentials would come behind the wait for the values' product.
    mbarrier.wait(keys[1].index((n + 1) % STAGES), (n + 1) // STAGES & 1, more)
    out, p = warpgroup_mma_wait(0, deps=[out, p])
    mbarrier.arrive(values[2].index((n - 1) % STAGES))
    OUT: gl.constexpr = sums(W)
    return out * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None], p, higher, total


@gluon.jit
def attend_first(
    n, first, rows, q, keys, first_bias, row_bias, scale,
    BY_ROW: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The softmax over a block's first tile, whose columns begin at `first` -> p, peak, total."""
    mbarrier.wait(keys[1].index(n % STAGES), n // STAGES & 1)
    k = keys[0].index(n % STAGES).reshape([BLOCK, W])
    s = inner_products(parts(q, D), parts(k, D), BLOCK // 2, BLOCK)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, sums(BLOCK))
    columns = first + gl.arange(0, BLOCK, COLUMNS)
    tile = first_bias.load(COLUMNS)[None, :]  # -inf past the end
    if BY_ROW:
        tile = tile + row_bias[:, None]
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(keys[2].index(n % STAGES))
    s = s * scale + gl.where(columns[None, :] <= rows[:, None], 0.0, tile)
    peak = gl.max(s, 1)
    weights = gl.exp2(s - peak[:, None])
    return gl.convert_layout(weights.to(q.dtype), factors(W)), peak, gl.sum(weights, 1)


@gluon.jit
def attend_block(
    n, columns, rows, of_block, first_bias,
    BY_ROW: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All tiles of a block -> the next tile's number, sums of weights times values [64, W], peak, total."""
    first, begin, plain, mixed, future, length = columns
    q, rings, ones_tile, row_bias, scale = of_block
    keys, values = rings[0], rings[1]
    p, peak, total = attend_first(n, first, rows, q, keys, first_bias, row_bias, scale, BY_ROW, BLOCK, D, W, STAGES)
    n += 1
    mbarrier.wait(keys[1].index(n % STAGES), n // STAGES & 1, (begin < plain) | (mixed < future))
    state = gl.zeros([BLOCK // 2, W], gl.float32, sums(W)), p, peak, total
    for position in range(begin, plain, BLOCK):
        more = (position + BLOCK < plain) | (mixed < future)
        state = attend(state, n, more, *of_block, False, BLOCK, D, W, STAGES)
        n += 1
    for position in range(mixed, future, BLOCK):
        state = attend(state, n, position + BLOCK < future, *of_block, True, BLOCK, D, W, STAGES)
        n += 1
    sums_of_values, p, peak, total = state
    sums_of_values = add_values(sums_of_values, p, values, n - 1, BLOCK, W, STAGES)
    sums_of_values = warpgroup_mma_wait(0, deps=[sums_of_values])
    mbarrier.arrive(values[2].index((n - 1) % STAGES))
    return n, sums_of_values, peak, total


@gluon.jit
def leave_out(n, columns, rings, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    """Leave a block's tiles to the other consumer -> the next tile's number."""
    first, begin, plain, mixed, future, length = columns
    tiles = 1 + gl.cdiv(gl.maximum(plain - begin, 0), BLOCK) + gl.cdiv(gl.maximum(future - mixed, 0), BLOCK)
    for _ in range(tiles):
        for ring in gl.static_range(2):
            mbarrier.wait(rings[ring][1].index(n % STAGES), n // STAGES & 1)
            mbarrier.arrive(rings[ring][2].index(n % STAGES))
        n += 1
    return n


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, out, lse, plan, order, bias, T, scale, queries, rings, ones_tile,
    H: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr, BY_ROW: gl.constexpr,
):  # fmt: skip
    """Rows 64 * CONSUMER to 64 * CONSUMER + 63 of every block."""
    HALF: gl.constexpr = BLOCK // 2
    LOGITS: gl.constexpr = sums(BLOCK)
    tiles, first_biases, full, empty = queries
    n, turn = 0, 0
    number, ahead, back, blocks = blocks_of_program(order, H)
    place_now = place_ahead(number, blocks, order, H)
    while number < blocks:
        head, start, length, first_row, ones, _ = block_at(place_now, number, plan, H, BLOCK)
        number += ahead
        ahead, back = back, ahead
        place_now = place_ahead(number, blocks, order, H)
        plain, mixed, future = tiles_of(first_row, length, ones, BLOCK, BY_ROW)
        first, begin = first_tile(plain, mixed, BLOCK)
        rows = first_row + CONSUMER * HALF + gl.arange(0, HALF, gl.SliceLayout(1, LOGITS))
        row_bias = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, LOGITS))
        if BY_ROW:
            row_bias = gl.load(bias + start + rows, mask=rows < length, other=0.0)
        tile = tiles.index(turn % 2 * 2 + CONSUMER)
        q = tile.reshape([HALF, W])
        mbarrier.wait(full.index(turn % 2), turn // 2 & 1)
        free_block_before(turn, empty)

        columns = first, begin, plain, mixed, future, length
        if first_row + CONSUMER * HALF < length:
            of_block = q, rings, ones_tile, row_bias, scale
            n, sums_of_values, peak, total = attend_block(
                n, columns, rows, of_block, first_biases.index(turn % 2), BY_ROW, BLOCK, D, W, STAGES
            )
            # out leaves through the memory of q
            q.store((sums_of_values * gl.convert_layout(1 / total, gl.SliceLayout(1, sums(W)))[:, None]).to(q.dtype))
            fence_async_shared()
            barrier()
            write(out, place(start, length, first_row + CONSUMER * HALF, head, H), tile)
            row_of_lse = lse + head.to(gl.int64) * T + start + rows
            gl.store(row_of_lse, (peak + gl.log2(total)) / LOG2_E, mask=rows < length)
        else:  # all of its rows lie past the end
            n = leave_out(n, columns, rings, BLOCK, STAGES)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T"])
def forward_blocks(
    q, k, v, pieces, closed_bias, out, lse, plan, order, bias, T, heads_q, heads_k, heads_v, scale,
    H: gl.constexpr, G: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr,
    BY_ROW: gl.constexpr,
):  # fmt: skip
    """out and lse of all blocks. heads_*: how many heads a token's stride spans. scale includes log2(e)."""
    DTYPE: gl.constexpr = q.dtype
    queries = (
        gl.allocate_shared_memory(DTYPE, [4, 1, 1, BLOCK // 2, W], q.layout),
        gl.allocate_shared_memory(gl.float32, [2, BLOCK], closed_bias.layout),
        barriers(2, 1),
        barriers(2, 2),  # both consumers leave
    )
    keys = (
        gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK, W], k.layout),
        barriers(STAGES, 1),
        barriers(STAGES, 2),
    )
    values = (
        gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK, W], v.layout),
        barriers(STAGES, 1),
        barriers(STAGES, 2),
    )
    bias_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, 16], pieces.layout)
    ones = gl.allocate_shared_memory(DTYPE, [BLOCK // 2, 16], pieces.layout)
    FLAT: gl.constexpr = constants()
    column = gl.arange(0, 16, gl.SliceLayout(0, FLAT))[None, :] + gl.zeros([BLOCK // 2, 16], gl.int32, FLAT)
    ones.store((column < 3).to(gl.float32).to(DTYPE))
    fence_async_shared()

    rings = keys, values, bias_tiles
    sources = k, v, pieces, heads_k, heads_v
    gl.warp_specialize(
        [
            (consume, (0, out, lse, plan, order, bias, T, scale, queries, rings, ones, H, BLOCK, D, W, STAGES, BY_ROW)),
            (consume, (1, out, lse, plan, order, bias, T, scale, queries, rings, ones, H, BLOCK, D, W, STAGES, BY_ROW)),
            (produce, (q, closed_bias, sources, plan, order, heads_q, queries, rings, H, G, BLOCK, W, STAGES, BY_ROW)),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [240, 24],  # registers of their threads
    )
