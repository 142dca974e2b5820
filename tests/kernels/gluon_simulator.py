"""Runs Gluon kernels for Hopper on a CPU: the part of Gluon that kernels/ uses, with what makes such kernels wrong.

A kernel's file is executed with this module in the place of Gluon. Each program is run on its own. Its partitions are
threads of which one runs at a time; at each barrier, copy and product a random one goes on, and copies arrive at random
times. Memory begins as NaN. The simulator raises AssertionError for

    a read or write of shared memory that a copy is still filling, or that this partition did not wait for
    a write of shared memory that a product or a copy is still reading
    a result of a product that nothing waited for
    a copy from or to memory outside the tensor
    barriers that more arrive at than they were made for, and partitions that all wait

It knows nothing of layouts, registers and time, of which compiling says what it can, and nothing of fences between
ordinary writes and what TMA and products read: only a GPU can tell that one is missing.
"""

import importlib.util
import random
import sys
import threading
import types
from contextlib import contextmanager

import pytest
import torch
import triton.experimental

GLUON = "triton.experimental.gluon"


class Stop(BaseException):
    """Ends the threads of a program in which another one failed."""


class Program:
    """One program of a launch: its partitions, and the copies under way."""

    def __init__(self, number, programs, seed):
        self.number, self.programs, self.random = number, programs, random.Random(seed)
        self.copies, self.failed = [], None
        self.turn = threading.Condition()
        self.running = None

    def run(self, partitions):
        """partitions: functions without arguments. The first exception of any is raised again."""
        self.waiting = {number: lambda: True for number in range(len(partitions))}
        threads = [threading.Thread(target=self._partition, args=item) for item in enumerate(partitions)]
        for thread in threads:
            thread.start()
        with self.turn:
            self._next()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive()
        if self.failed:
            raise self.failed

    def _partition(self, number, function):
        LOCAL.program, LOCAL.partition = self, Partition(number)
        try:
            with self.turn:
                self._sleep(number)
            function()
            LOCAL.partition.finish()
        except Stop:
            pass
        except BaseException as error:  # run raises it again
            self.failed = self.failed or error
        with self.turn:
            self.waiting.pop(number, None)
            self.running = None
            self._next()

    def pause(self, ready=lambda: True):
        """Let others go on; return when ready() holds and chance says so."""
        number = LOCAL.partition.number
        with self.turn:
            self.waiting[number] = ready
            self.running = None
            self._next()
            self._sleep(number)

    def _sleep(self, number):
        self.turn.wait_for(lambda: self.running == number or self.failed, timeout=120)
        if self.failed:
            raise Stop
        self.waiting.pop(number, None)

    def _next(self):
        """Finish some copies, then choose who goes on."""
        while not self.failed and self.waiting:
            able = [number for number, ready in self.waiting.items() if ready()]
            chosen = self.random.randrange(len(able) + len(self.copies)) if able or self.copies else None
            if chosen is None:
                self.failed = AssertionError(f"partitions {sorted(self.waiting)} wait for what never comes")
            elif chosen < len(able):
                self.running = able[chosen]
                break
            else:
                self.copies.pop(chosen - len(able))()
        self.turn.notify_all()


class Partition:
    """What one partition has under way and has seen."""

    def __init__(self, number):
        self.number = number
        self.products, self.stores = [], []  # each a function that ends it
        self.seen = {}  # barrier: phases of it that were waited for

    def finish(self):
        assert not self.products, "a product is under way at the end"
        assert not self.stores, "a copy still reads shared memory at the end"


LOCAL = threading.local()


class Cell:
    """A piece of shared memory that is filled as a whole."""

    def __init__(self):
        self.filling, self.readers, self.filled_by = 0, 0, None

    def check_read(self):
        assert not self.filling, "read of memory that a copy is filling"
        if self.filled_by:
            barrier, phase = self.filled_by
            assert LOCAL.partition.seen.get(barrier, 0) >= phase, "read of memory without a wait for its barrier"

    def check_write(self):
        assert not self.filling, "write to memory that a copy is filling"
        assert not self.readers, "write to memory that is still being read"


class Shared:
    """Shared memory, or a view of it. Its first dim's indices are cells of their own."""

    def __init__(self, data, cells):
        self.data, self.cells = data, cells
        self.dtype, self.shape = data.dtype, list(data.shape)

    def index(self, number):
        return Shared(self.data[int(number)], [self.cells[int(number)]])

    def reshape(self, shape):
        return Shared(self.data.view(shape), self.cells)

    def slice(self, first, number, dim):
        return Shared(self.data.narrow(dim, first, number), self.cells)

    def permute(self, order):
        return Shared(self.data.permute(order), self.cells)

    def load(self, layout):
        for cell in self.cells:
            cell.check_read()
        return self.data.clone()

    def store(self, value):
        assert list(value.shape) == self.shape and value.dtype == self.dtype
        for cell in self.cells:
            cell.check_write()
            cell.filled_by = None
        self.data.copy_(value)


class Barrier:
    def __init__(self):
        self.count = None

    def open(self):
        if self.arrivals == 0 and self.bytes == 0:
            self.phase, self.arrivals = self.phase + 1, self.count

    def arrive(self, number):
        assert 0 < number <= self.arrivals, "more arrivals than the barrier was made for"
        self.arrivals -= number
        self.open()


class Barriers:
    def __init__(self, number):
        self.all = [Barrier() for _ in range(number)]

    def index(self, number):
        return self.all[int(number)]


def pause(ready=lambda: True):
    if getattr(LOCAL, "program", None) and hasattr(LOCAL, "partition"):
        LOCAL.program.pause(ready)


def init(barrier, count):
    barrier.count = barrier.arrivals = count
    barrier.phase = barrier.bytes = 0


def expect(barrier, bytes):
    barrier.bytes += bytes
    barrier.arrive(1)


def arrive(barrier, count=1, pred=True):
    if not pred:
        return
    barrier.arrive(count)
    pause()


def wait(barrier, phase, pred=True):
    if pred:
        pause(lambda: barrier.phase & 1 != phase)
        LOCAL.partition.seen[barrier] = barrier.phase


class Descriptor:
    """A tensor map of TMA. base: a tensor, whose storage is what there is."""

    def __init__(self, base, shape, strides, block, layout=None):
        assert all(stride * base.element_size() % 16 == 0 for stride in strides[:-1]) and strides[-1] == 1
        assert all(0 < size <= 2**32 for size in shape) and all(0 <= stride < 2**39 for stride in strides)
        self.base, self.shape_of_tensor, self.strides, self.block = base, shape, strides, block
        self.dtype, self.layout = base.dtype, layout
        self.memory = torch.empty(0, dtype=base.dtype).set_(base.untyped_storage())

    def elements(self, coordinates):
        """Which elements of memory each number of a block is, and whether the tensor has them."""
        size = self.base.element_size()
        at, steps, inside = self.base.storage_offset() * size, torch.tensor(0), torch.tensor(True)
        for first, limit, stride, number in zip(map(int, coordinates), self.shape_of_tensor, self.strides, self.block):
            assert 0 <= first < 2**31
            at += first * stride * size
            steps = steps[..., None] + torch.arange(number) * stride
            inside = inside[..., None] & (first + torch.arange(number) < limit)
        at = (at + 2**63) % 2**64 - 2**63  # addresses have 64 bits
        assert at % size == 0
        elements = at // size + steps
        assert ((elements >= 0) & (elements < len(self.memory)))[inside].all(), "a copy from or to outside the tensor"
        return elements.where(inside, 0), inside


def read(descriptor, coordinates, barrier, target):
    assert target.shape == descriptor.block and target.dtype == descriptor.dtype
    for cell in target.cells:
        cell.check_write()
        cell.filling += 1
    target.data.fill_(torch.nan)
    elements, inside = descriptor.elements(coordinates)

    def arrives():
        target.data.copy_(torch.where(inside, descriptor.memory[elements], 0))
        phase = barrier.phase + 1
        for cell in target.cells:
            cell.filling -= 1
            cell.filled_by = barrier, phase
        barrier.bytes -= target.data.numel() * target.data.element_size()
        barrier.open()

    LOCAL.program.copies.append(arrives)
    pause()


def write(descriptor, coordinates, source):
    assert source.shape == descriptor.block and source.dtype == descriptor.dtype
    for cell in source.cells:
        cell.check_read()
        cell.readers += 1
    elements, inside = descriptor.elements(coordinates)

    def leaves():
        descriptor.memory[elements[inside]] = source.data[inside]
        for cell in source.cells:
            cell.readers -= 1

    LOCAL.partition.stores.append(leaves)
    pause()


def store_wait(pendings):
    while len(LOCAL.partition.stores) > pendings:
        LOCAL.partition.stores.pop(0)()


class UnderWay:
    """A product's sums, which nothing may use before a wait."""

    def __init__(self, sums, product):
        self.sums, self.product = sums, product


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    assert is_async and isinstance(b, Shared)
    shared = [x for x in (a, b) if isinstance(x, Shared)]
    cells = [cell for x in shared for cell in x.cells]
    for cell in cells:
        cell.check_read()
        cell.readers += 1
    a, b = (x.data if isinstance(x, Shared) else x for x in (a, b))
    assert a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16)
    before = acc.sums if isinstance(acc, UnderWay) else acc
    sums = a.float() @ b.float() + (before if use_acc else 0)

    def ends():
        for cell in cells:
            cell.readers -= 1

    LOCAL.partition.products.append(ends)
    pause()
    return UnderWay(sums, ends)


def warpgroup_mma_wait(num_outstanding, deps):
    products = LOCAL.partition.products
    while len(products) > num_outstanding:
        products.pop(0)()
    for dep in deps:
        assert not isinstance(dep, UnderWay) or dep.product not in products, "a result that nothing waited for"
    results = tuple(dep.sums if isinstance(dep, UnderWay) else dep for dep in deps)
    return results[0] if len(results) == 1 else results


def warp_specialize(functions_and_arguments, warps, registers):
    assert len(functions_and_arguments) == len(warps) + 1 == len(registers) + 1
    LOCAL.program.run([lambda f=f, a=a: f(*a) for f, a in functions_and_arguments])


class Pointer:
    def __init__(self, memory, at=0):
        self.memory, self.at = memory, at

    def __add__(self, more):
        return Pointer(self.memory, self.at + more)


def load(pointer, mask=None, other=None):
    at = torch.as_tensor(pointer.at).long()
    if mask is None:
        return pointer.memory[at]
    return torch.where(mask, pointer.memory[at.where(mask, 0)], other)


def store(pointer, value, mask):
    pointer.memory[pointer.at[mask].long()] = value[mask].to(pointer.memory.dtype)


def allocate_shared_memory(dtype, shape, layout):
    if dtype == torch.int64:
        return Barriers(shape[0])
    data = torch.full(shape, torch.nan, dtype=dtype)
    cells = [Cell() for _ in range(shape[0])]
    return Shared(data, cells)


class Layout:
    def __init__(self, *arguments, **named):
        pass


def jit(function=None, **options):
    """gluon.jit, with and without options: the function itself."""
    return function or (lambda function: function)


def _gluon():
    """The modules that a kernel's file imports from, by name."""
    plain = dict(
        constexpr=constant,
        float32=torch.float32,
        float16=torch.float16,
        bfloat16=torch.bfloat16,
        int32=torch.int32,
        int64=torch.int64,
        program_id=lambda axis: torch.tensor(LOCAL.program.number, dtype=torch.int32),
        num_programs=lambda axis: LOCAL.program.programs,
        arange=lambda first, last, layout: torch.arange(first, last, dtype=torch.int32),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        convert_layout=lambda x, layout: x,
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        where=lambda condition, a, b: torch.where(condition, a, b),
        cdiv=lambda a, b: -(-a // b),
        exp2=torch.exp2,
        log2=torch.log2,
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        static_range=range,
        load=load,
        store=store,
        allocate_shared_memory=allocate_shared_memory,
        warp_specialize=warp_specialize,
        barrier=lambda: None,
        **dict.fromkeys(
            ("NVMMASharedLayout", "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"), Layout
        ),
    )
    barriers = dict(init=init, expect=expect, arrive=arrive, wait=wait, MBarrierLayout=Layout)
    copies = dict(async_load=read, async_store=write, store_wait=store_wait)
    hopper = dict(
        fence_async_shared=lambda: None,
        mbarrier=types.SimpleNamespace(**barriers),
        tma=types.SimpleNamespace(**copies),
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
    )
    return {
        GLUON: dict(
            jit=jit, constexpr_function=lambda function: function, language=_module(GLUON + ".language", plain)
        ),
        GLUON + ".language": plain,
        GLUON + ".language.nvidia.hopper": hopper,
        GLUON + ".nvidia.hopper": dict(TensorDescriptor=Descriptor),
    }


def constant(value):
    """A gl.constexpr of a number: the number, with the attribute `value`."""
    return type("constant", (type(value),), {"value": value})(value)


def _module(name, contents):
    module = types.ModuleType(name)
    vars(module).update(contents)
    return module


@contextmanager
def in_place_of_gluon():
    """Within it, imports from Gluon get the simulator."""
    stubs = {name: _module(name, contents) for name, contents in _gluon().items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(triton.experimental, "gluon", stubs[GLUON], raising=False)
        yield


def simulated(file, blocks=None):
    """The module in `file`, with this simulator in the place of Gluon; `blocks` in the place of hopper/blocks.py."""
    spec = importlib.util.spec_from_file_location("simulated_" + file.stem, file)
    module = importlib.util.module_from_spec(spec)
    with in_place_of_gluon(), pytest.MonkeyPatch.context() as patch:
        if blocks:
            patch.setitem(sys.modules, "conan_kernels.attention.hopper.blocks", simulated(blocks))
        spec.loader.exec_module(module)
    return module


def launch(kernel, programs, arguments, seed):
    """kernel(**arguments) in `programs` programs, one after another. Tensors are pointers to their first element."""
    for number in range(programs):
        LOCAL.program = Program(number, programs, seed + number)
        given = {name: Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        kernel(**given)
