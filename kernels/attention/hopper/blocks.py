"""What the kernels for Hopper share: the blocks of a program, the coordinates of TMA, rings of tiles in shared memory.

Each kernel is persistent: one program on each multiprocessor takes blocks, those with most tiles first
(../schedule.py), forwards and backwards in turn, so that all end at about the same time. Nothing is atomic, and
each number of a result has one owner. In a program

    one producer (a warp)      brings tiles by TMA, always as far ahead as there is room: the rings do not drain where
                               a block, a head or a sequence ends
    two consumers (4 warps)    own half a block each. While one computes weights, the other's products are under way

A tile of tokens past a sequence's end would hold the next sequence's. Descriptors of four dims forbid it: token x of l
is at LIMIT - l + x of LIMIT, and TMA reads zeros from LIMIT on and writes nothing there. What that adds to the address,
LIMIT strides of tokens, the first dim takes off, modulo 2^64 (launch.descriptor).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from conan_kernels.attention import hopper

# three names that are others before Triton 3.9, 3.9 and 3.8
read = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
write = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

LIMIT = gl.constexpr(hopper.LIMIT)
LOG2_E = gl.constexpr(hopper.LOG2_E)


@gluon.constexpr_function
def sums(columns):
    """The layout of a consumer's sums of products."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def factors(columns):
    """The layout of a consumer's factors in registers, of products with sums of `columns`."""
    return gl.DotOperandLayout(operand_index=0, parent=sums(columns), k_width=2)


@gluon.jit
def blocks_of_program(order, H: gl.constexpr):
    """A program's first block, how far it is to the next and from that to the one after, and where blocks end."""
    number = gl.program_id(0)
    return number, 2 * (gl.num_programs(0) - number) - 1, 2 * number + 1, gl.load(order) * H


@gluon.jit
def block_of(number, order, plan, H: gl.constexpr, BLOCK: gl.constexpr):
    """Block `number` of all heads' -> (head, start, length, first row, ones, where its sequence begins if every
    slot has BLOCK rows)."""
    return block_at(gl.load(order + 1 + number // H), number, plan, H, BLOCK)


@gluon.jit
def block_at(place, number, plan, H: gl.constexpr, BLOCK: gl.constexpr):
    """block_of, whose slot in the plan is `place`."""
    slot = plan + place * 4
    length, first_row = gl.load(slot + 1), gl.load(slot + 2)
    first_slot = place - (gl.cdiv(length, BLOCK) - 1 - first_row // BLOCK)
    return number % H, gl.load(slot), length, first_row, gl.load(slot + 3), first_slot * BLOCK


@gluon.jit
def place_ahead(number, blocks, order, H: gl.constexpr):
    """The slot of a block that may be past the end. Loaded a block ahead, since it takes hundreds of cycles to come."""
    return gl.load(order + 1 + gl.minimum(number, blocks - 1) // H)


@gluon.jit
def block_ahead(number, blocks, order, plan, H: gl.constexpr, BLOCK: gl.constexpr):
    """block_of a block that may be past the end, for whom has the registers to load all of it a block ahead."""
    last = gl.minimum(number, blocks - 1)
    return block_at(place_ahead(number, blocks, order, H), last, plan, H, BLOCK)


@gluon.jit
def tiles_of(first_row, length, ones, BLOCK: gl.constexpr, BY_ROW: gl.constexpr):
    """Where the PLAIN, MIXED and FUTURE columns of a block of rows end, as tiles.query_tiles has it."""
    last_row = gl.minimum(first_row + BLOCK, length)
    plain = gl.maximum(first_row + 1, ones)
    if BY_ROW:
        plain = gl.where(ones >= last_row, length, gl.maximum(first_row, ones) + 1)
    plain = gl.minimum(plain, length) // BLOCK * BLOCK
    mixed = gl.maximum(plain, gl.cdiv(last_row, BLOCK) * BLOCK)
    return plain, mixed, gl.where(ones >= 0, length, mixed)


@gluon.jit
def place(start, length, position, head, heads):
    """Coordinates of a token and a head (launch.descriptor). heads: how many the stride of a token spans."""
    return [LIMIT, (start + length) * heads + head, LIMIT - length + position, 0]


@gluon.jit
def room(ring, n, BYTES: gl.constexpr, STAGES: gl.constexpr):
    """Wait until tile n of the ring has a place, and announce its bytes -> (its memory, the barrier that they open)."""
    tiles, full, empty = ring
    mbarrier.wait(empty.index(n % STAGES), n // STAGES & 1 ^ 1)
    mbarrier.expect(full.index(n % STAGES), BYTES)
    return tiles.index(n % STAGES), full.index(n % STAGES)


@gluon.jit
def memory_of_block(source, HALF: gl.constexpr, W: gl.constexpr):
    """Memory for the two tiles that a block keeps, and for those of the next: bring_block's `memory`."""
    return (
        gl.allocate_shared_memory(source.dtype, [4, 1, 1, HALF, W], source.layout),
        gl.allocate_shared_memory(source.dtype, [4, 1, 1, HALF, W], source.layout),
        barriers(2, 1),
        barriers(2, 2),  # both consumers leave
    )


@gluon.jit
def bring_block(turn, memory, a, b, place_a, place_b, HALF: gl.constexpr, W: gl.constexpr):
    """The two tiles that a block keeps, each in two halves. place_*: where they begin."""
    tiles_a, tiles_b, full, empty = memory
    mbarrier.wait(empty.index(turn % 2), turn // 2 & 1 ^ 1)
    mbarrier.expect(full.index(turn % 2), HALF * W * 8)
    for half in gl.static_range(2):
        limit, row, token, column = place_a
        read(a, [limit, row, token + half * HALF, column], full.index(turn % 2), tiles_a.index(turn % 2 * 2 + half))
        limit, row, token, column = place_b
        read(b, [limit, row, token + half * HALF, column], full.index(turn % 2), tiles_b.index(turn % 2 * 2 + half))


@gluon.jit
def leave_out(n, tokens, ring, HALF: gl.constexpr, STAGES: gl.constexpr):
    """Leave the next pairs of a ring, of so many tokens, to the other consumer -> the pair after them."""
    full, empty = ring[3], ring[4]
    for _ in range(0, tokens, HALF):
        mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
        mbarrier.arrive(empty.index(n % STAGES))
        n += 1
    return n


@gluon.jit
def free_block_before(turn, empty):
    """What the block before wrote has left shared memory: the producer may fill it. Asked for a block later, when it
    has long been so."""
    tma.store_wait(0)
    mbarrier.arrive(empty.index((turn + 1) % 2), pred=turn > 0)


@gluon.jit
def parts(tile, D: gl.constexpr):
    """The first D columns of a tile in shared memory, without the zeros after them: 64, and the bits of what is left.

    A slice has a power of two of columns. Each part of a product is a group of its own for warpgroup_mma_wait.
    """
    found = (tile.slice(0, 64, 1),)
    for bit in gl.static_range(3):
        if (D - 64) & (64 >> bit):
            found = found + (tile.slice(64 + (D - 64) // (128 >> bit) * (128 >> bit), 64 >> bit, 1),)
    return found


@gluon.constexpr_function
def number_of_parts(D):
    return 1 + bin(D - 64).count("1")


@gluon.jit
def inner_products(a, b, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Begin a @ b.T of two tiles in parts -> the sums under way [ROWS, COLUMNS]."""
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, sums(COLUMNS))
    s = warpgroup_mma(a[0], b[0].permute((1, 0)), zeros, use_acc=False, is_async=True)
    for part in gl.static_range(1, len(a)):
        s = warpgroup_mma(a[part], b[part].permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(NUMBER):
        mbarrier.init(made.index(number), count=ARRIVALS)
    return made
