"""Compiles a Triton kernel for a GPU that need not be there, and reads the machine code (SASS). Needs no CUDA toolkit:
Triton's wheel brings ptxas, cuobjdump and nvdisasm. Not under TRITON_INTERPRET, which compiles nothing."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from conan_kernels.architecture import FUSION

# a program's most
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Triton 3.6 spills those of dk_dv_block, 3.9 none; with them it is 1.2 times as fast as with the largest tile that
# spills none (H200). The kernels in Gluon keep some numbers of their threads on the stack, outside all loops.
SPILLS = {("dk_dv_block", 90): 21, ("forward_blocks", 90): 41, ("dq_blocks", 90): 9, ("dk_dv_blocks", 90): 80}
MATRIX_PRODUCTS = {90: ("HGMMA",), 100: ("UTCHMMA", "HMMA")}  # on others HMMA
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
OPCODES = (
    "HGMMA",
    "HMMA",
    "UTCHMMA",
    "FFMA",
    "FADD",
    "FMUL",
    "FMNMX",
    "FSEL",
    "MUFU",
    "LDG",
    "LDGSTS",
    "ISETP",
    "LDL",
    "STL",
    "WARPGROUP",
    "BAR",
)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\d\s+)?([A-Z][A-Zx0-9_.]*)", re.M)


@dataclass
class Machine:
    """stack and shared_bytes in bytes (a thread's, a program's), registers a thread, sass as nvdisasm prints it."""

    stack: int
    registers: int
    shared_bytes: int
    sass: str

    def count(self, opcode):
        """How often an instruction occurs, with any modifiers: count("HGMMA") includes HGMMA.64x128x16.F32.BF16."""
        return sum(
            number for name, number in opcodes(self.sass).items() if name == opcode or name.startswith(opcode + ".")
        )

    @property
    def spills(self):
        return self.count("STL") + self.count("LDL")

    def loops(self):
        """The text of the innermost loops in the order of the code. Loops of less than 16 instructions are none: they
        wait (sm_100: for a matrix product), or end the program. Nor are jumps back from behind the last EXIT: there
        stand waits that the program left for, to return where it was."""
        lines = self.sass[: self.sass.rfind("EXIT")].splitlines()  # none at all: a compiler that gave up left a trap
        at = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(\.L\w+):", line))}
        spans = set()
        for number, line in enumerate(lines):
            target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
            if target and at.get(target[1], number) < number - 16:
                spans.add((at[target[1]], number))
        inner = [a for a in sorted(spans) if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return ["\n".join(lines[first : last + 1]) for first, last in inner]


def in_flight(loop, opcode):
    """Of the instructions `opcode` of a loop (text), how many stand between a group of wgmma and the wait for it."""
    pending = found = 0
    for line in loop.splitlines():
        name = INSTRUCTION.match(line)
        if not name:
            continue
        if name[1].startswith("HGMMA") and "gsb0" in line:  # the last of a group
            pending += 1
        elif name[1].startswith("WARPGROUP.DEPBAR"):  # waits until no more than this many groups are pending
            pending = min(pending, int(re.search(r"gsb0, (0x\w+)", line)[1], 16))
        found += bool(pending) and name[1].startswith(opcode)
    return found


def lost_factors(loop):
    """The registers of a loop (text) that are a product's factor in each turn, loaded before the loop, and that the
    loop writes behind it: ptxas of CUDA 12.8 and 12.9 gave the factors of two products the same ones."""
    written, kept = set(), set()
    for line in loop.splitlines():
        name = INSTRUCTION.match(line)
        if not name:
            continue
        product = re.search(r"HGMMA\S* R\d+, R(\d+), gdesc", line)
        if product:
            first = int(product[1])
            kept |= set(range(first, first + 4)) - written
        target = re.match(r"\s+R(\d+)\b", line.partition(name[1])[2])
        if target and not product:
            first, wide = int(target[1]), 4 if re.search(r"\.128|M88\.4", name[1]) else 2 if "64" in name[1] else 1
            written |= set(range(first, first + wide))
    return kept & written


def faults(row):
    """What is wrong with a kernel described by soft_mask_compile.py or info_nce_compile.py: a list of words, empty if
    nothing is."""
    found = []
    if row["spills"] > SPILLS.get((row["kernel"], row["arch"]), 0) or (row["stack"] and not row["spills"]):
        found.append(f"{row['spills']} spills, {row['stack']} bytes of stack")
    if not row["shared_bytes"] <= SHARED_BYTES[row["arch"]]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, {SHARED_BYTES[row['arch']]} at most")
    if row["dtype"] != "fp32":
        products = MATRIX_PRODUCTS.get(row["arch"], ("HMMA",))
        if not row["loops"] or not all(any(loop[name] for name in products) for loop in row["loops"]):
            found.append(f"a loop without {' or '.join(products)}")
    if any(loop.get("lost_factors") for loop in row["loops"]):
        found.append("a loop overwrites a factor that its next turn needs")
    return found


def describe(machine):
    """For JSON: what it uses, and its innermost loops, how many instructions and those of OPCODES with any
    modifiers."""
    loops = [describe_loop(loop) for loop in machine.loops()]
    used = {
        "stack": machine.stack,
        "spills": machine.spills,
        "registers": machine.registers,
        "shared_bytes": machine.shared_bytes,
    }
    return used | {"loops": loops}


def describe_loop(loop):
    found = opcodes(loop)
    return {"instructions": found.total()} | {name: counted(found, name) for name in OPCODES}


def counted(loop, opcode):
    return sum(number for name, number in loop.items() if name.partition(".")[0] == opcode)


def opcodes(sass):
    return Counter(match[1] for match in INSTRUCTION.finditer(sass))


def compile(fn, signature, constants, target, num_warps, num_stages, aligned=(), source=ASTSource, **options):
    """fn: a @triton.jit function. signature: {argument: type, e.g. "*bf16", "i32", "fp32"}. constants: {argument: value
    of a tl.constexpr}. target: 80, 90, ... aligned: arguments that 16 divides (pointers always are; what a kernel does
    not specialise, Triton never knows). source: Gluon's for a @gluon.jit function. options: others of Triton's, as at a
    launch -> Machine."""
    position = fn.arg_names.index
    options |= {"num_warps": num_warps, "num_stages": num_stages} | FUSION
    source = source(
        fn,
        {name: "constexpr" if name in constants else signature[name] for name in fn.arg_names},
        constexprs={(position(name),): value for name, value in constants.items()},
        attrs={
            (position(name),): [["tt.divisibility", 16]]
            for name, parameter in zip(fn.arg_names, fn.params)
            if name not in constants
            and (signature[name].startswith("*") or (name in aligned and not parameter.do_not_specialize))
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _read("cuobjdump", "-res-usage", file.name)
        sass = _read("nvdisasm", "-c", file.name)
    stack, registers = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("STACK", "REG"))
    return Machine(stack, registers, compiled.metadata.shared, sass)


def _read(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
