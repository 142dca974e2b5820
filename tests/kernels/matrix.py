"""Every kernel with every Triton that the README promises, for every architecture: `make matrix`.

For each version an environment of its own, kept between runs: that Triton in build/triton/VERSION, before everything
else of this environment. In it all sizes that ship in bf16 and fp16 are compiled for all architectures (compiled ones
are cached) and held to sass.faults; a part of the parity tests runs in its interpreter, and the tests of machine code.
A line for each version and architecture, and what is wrong; exit code 1 if anything is.

    python tests/kernels/matrix.py [--versions 3.6.0 ...] [--archs 90 ...] [--dims 112 ...] [--dtypes bf16 ...]
        [--no-parity]
"""

import argparse
import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import sass
from soft_mask_compile import DIMS

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / "build/triton"
VERSIONS = {  # and what else of an older day its interpreter needs. torch 2.11 brings 3.6, 2.12 brings 3.7
    "3.6.0": ("numpy==2.3.5",),  # 2.4 makes no number of an array of one
    "3.7.1": (),
    "3.8.0": (),
    "3.9.0": (),
}
PARITY = (
    "attention/test_api.py::test_as_exact_as_pytorch",
    "attention/test_api.py::test_large_logits_do_not_overflow",
    "attention/test_api.py::test_a_planted_error_is_found",
    "info_nce/test_api.py::test_equals_textbook",
    "info_nce/test_api.py::test_half_precision_equals_textbook",
    "info_nce/test_api.py::test_margin_leaves_out_what_the_textbook_leaves_out",
    "pointwise/test_api.py",
    "attention/test_compiled.py",
    "attention/test_schedule.py",
    "attention/hopper",
    "info_nce/test_compiled.py",
    "pointwise/test_compiled.py",
)


def environment(version):
    """The variables under which Python imports that Triton, which is installed if it is not there yet."""
    folder = ENVIRONMENTS / version
    if not (folder / "triton").exists():
        # beside, then renamed: what is there is whole
        partial = folder.with_suffix(".partial")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                partial,
                f"triton=={version}",
                *VERSIONS.get(version, ()),
            ],
            check=True,
        )
        partial.rename(folder)
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {"PYTHONPATH": str(folder)}


def compiled(script, variables, *arguments):
    """The rows that a compile script prints; a kernel that does not compile ends it, and is a fault."""
    command = [sys.executable, "-W", "ignore", HERE / script, *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return rows, done.stderr.strip().splitlines()[-1:] if done.returncode else []


def check(version, chosen):
    """Prints a line an architecture and one for parity -> the number of those that fall short."""
    variables, failed = environment(version), 0
    for arch in chosen.archs:
        options = "--archs", arch, "--dtypes", *chosen.dtypes
        attention, broken = compiled(
            "soft_mask_compile.py", variables, *options, "--dims", *chosen.dims, "--processes", os.cpu_count()
        )
        info_nce, also_broken = compiled("info_nce_compile.py", variables, *options)
        pointwise, broken_too = compiled("pointwise_compile.py", variables, "--archs", arch)
        gluon, broken_as_well = compiled("hopper_compile.py", variables) if arch == 90 else ([], [])
        faults = collections.Counter()
        for row in attention + info_nce + pointwise + gluon:
            faults.update(
                f"{row['kernel']} {row['dtype']} {row.get('D', row.get('case', ''))}: {fault}"
                for fault in sass.faults(row)
            )
        faults.update(broken + also_broken + broken_too + broken_as_well)
        failed += report(
            f"triton {version}  sm_{arch:<4}", f"{len(attention + info_nce + pointwise + gluon)} kernels", faults
        )
    if chosen.parity:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            *(str(HERE / test) for test in PARITY),
        ]
        done = subprocess.run(
            command, env=variables | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=HERE.parent.parent
        )
        lines = done.stdout.strip().splitlines() or ["pytest printed nothing"]
        failed += report(
            f"triton {version}  parity ",
            lines[-1],
            [line for line in lines if line.startswith(("FAILED", "ERROR"))] if done.returncode else [],
        )
    return failed


def report(what, count, faults):
    print(
        f"{what}  {'FALLS SHORT' if faults else 'holds'}  {count}",
        *(f"    {fault}" for fault in sorted(faults)),
        sep="\n",
        flush=True,
    )
    return bool(faults)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--archs", type=int, nargs="+", default=tuple(sass.SHARED_BYTES), choices=sass.SHARED_BYTES)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--dtypes", nargs="+", default=("bf16", "fp16"))
    parser.add_argument("--no-parity", dest="parity", action="store_false")
    chosen = parser.parse_args()
    sys.exit(1 if sum(check(version, chosen) for version in chosen.versions) else 0)
