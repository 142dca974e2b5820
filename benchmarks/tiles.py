"""Which tile sizes suit this GPU? Time of each attention kernel by launch options: what kernels/architecture.py is to
say for it.

    python benchmarks/tiles.py [--dims 112 128] [--widths 128] [--length 16384] [--out runs/benchmarks] [--device cpu]

H = 32, G = 8, bf16, at alpha 0, 0.3 and 1, one sequence of --length tokens; heads of --dims numbers are computed as
they are and, where they are narrower, filled up to each of --widths. Spills and registers are Triton's count. All sizes
are compiled first, in as many processes as there are cores. With --device cpu Triton's interpreter shows that it runs,
and times nothing worth knowing. Prints a table; writes tiles.json.
"""

import itertools
import json
import multiprocessing
import os

import attn
import attn_forms
import measured
import torch

SIZES = {  # (BM, BN, num_warps, num_stages); what spills much is left out when it is timed
    "forward": (
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 3),
        (128, 32, 8, 3),
        (64, 64, 4, 3),
        (128, 64, 4, 3),
    ),
    "dq": ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
    "dk_dv": ((32, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 3), (64, 128, 8, 4), (64, 64, 4, 2), (32, 64, 4, 3)),
}
MOST_SPILLS = 60
SHARE = {"forward": 1, "dq": 1.5, "dk_dv": 2}  # FLOP, beside the forward's two products


def launcher(kernel, size, problem, width):
    """A function that launches the kernel once and returns what Triton compiled for it."""
    from conan_kernels import soft_mask_attention
    from conan_kernels.attention import gradients, launch, tiles

    p, (T, H, D) = problem, problem.q.shape
    alpha, scale = torch.tensor(p.alpha, device=p.device), D**-0.5
    options = dict(zip(("BM", "BN", "num_warps", "num_stages"), size)) | (
        {} if kernel == "forward" else {"maxnreg": 255}
    )
    out, lse = soft_mask_attention(p.q, p.k, p.v, p.cu_seqlens, alpha, return_lse=True)
    block = options["BN" if kernel == "dk_dv" else "BM"]
    bias, plan = lse.new_empty(T), p.cu_seqlens.new_empty(T // block + p.B, 4)
    launch.slots_of(p.cu_seqlens, alpha, bias, plan, "column", block)
    delta = (out.float() * p.dout.float()).sum(-1).T.contiguous()
    rest = plan, bias, T, p.q.stride(0), p.k.stride(0), p.v.stride(0), scale * tiles.LOG2_E.value
    shape = {"H": H, "G": p.G, "D": D, "W": width, "BY_ROW": False}
    if kernel == "forward":
        return lambda: tiles.forward_block[(len(plan), H)](p.q, p.k, p.v, out, lse, *rest, **shape, **options)
    dq, dk, dv = (torch.empty_like(x) for x in (p.q, p.k, p.v))
    if kernel == "dq":
        return lambda: gradients.dq_block[(len(plan), H)](
            p.q, p.k, p.v, out, p.dout, lse, delta, dq, *rest, **shape, **options
        )
    return lambda: gradients.dk_dv_block[(len(plan), p.G)](
        p.q, p.k, p.v, p.dout, lse, delta, dk, dv, *rest, **shape, **options
    )


def compiled(job):
    """(registers, spills) of (kernel, size, D, width), or why there are none; what Triton made is in its cache for all
    processes."""
    kernel, size, D, width = job
    try:
        found = launcher(kernel, size, attn_forms.Problem([256], 1.0, 32, 8, D, "cuda", torch.bfloat16), width)()
        torch.cuda.synchronize()
        return found.n_regs, found.n_spills
    except Exception as error:  # too much shared memory, or whatever a compiler says
        return str(error).strip().partition("\n")[0][:120]


def main():
    parser = measured.Parser(__doc__, quick={"length": 2048, "dims": [112]}, device=True)
    parser.add_argument("--dims", type=int, nargs="+", default=(112, 128))
    parser.add_argument("--widths", type=int, nargs="+", default=(128,))
    parser.add_argument("--length", type=int, default=16384)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"
    dtype, H, G = (torch.bfloat16, 32, 8) if cuda else (torch.float32, 2, 1)
    widths = [(D, W) for D in options.dims for W in sorted({D, *options.widths}) if W >= D]
    jobs = [(kernel, size, D, W) for D, W in widths for kernel, sizes in SIZES.items() for size in sizes]
    with multiprocessing.get_context("spawn").Pool() as pool:
        used = dict(zip(jobs, pool.map(compiled, jobs, chunksize=1) if cuda else itertools.repeat((None, 0))))
    report = attn.machine(options.device) | {"length": options.length, "rows": []}
    options.out.mkdir(parents=True, exist_ok=True)
    print(
        f"{'kernel':10}{'BM x BN, warps, stages':>24}{'D':>5}{'W':>5}{'alpha':>7}"
        f"{'ms':>10}{'TFLOP/s':>9}{'registers':>11}{'spills':>8}"
    )
    for (D, W), alpha in itertools.product(widths, attn.ALPHAS):
        torch.manual_seed(0)
        problem = attn_forms.Problem([options.length], alpha, H, G, D, options.device, dtype)
        for kernel, size in ((kernel, size) for kernel, sizes in SIZES.items() for size in sizes):
            row = {"kernel": kernel, "size": size, "D": D, "W": W, "alpha": alpha}
            found = used[kernel, size, D, W]
            if isinstance(found, str) or found[1] > MOST_SPILLS:
                row["left_out"] = found if isinstance(found, str) else f"{found[1]} spills"
            else:
                row |= dict(zip(("registers", "spills"), found)) | {
                    "seconds": attn.median_seconds(launcher(kernel, size, problem, W), options.device)
                }
                rate = problem.flops * SHARE[kernel] / row["seconds"]
                print(
                    f"{kernel:10}{'{} x {}, {}, {}'.format(*size):>24}{D:5}{W:5}{alpha:7}{1e3 * row['seconds']:10.3f}"
                    f"{rate / 1e12:9.3g}{found[0] or '-':>11}{found[1]:8}",
                    flush=True,
                )
            report["rows"].append(row)
        (options.out / "tiles.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
