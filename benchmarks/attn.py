"""Is soft-masked attention as fast as attention without a mask, and how far is it from the machine's limit?

    python benchmarks/attn.py [--quick] [--forms NAME ...] [--out DIR] [--device cpu]

A table and a plot for each question: (1) forward and backward against length, 512 to 32k, at alpha 0, 0.3 and 1; (2)
packed batches as embedding models see them; (3) the share of the bf16 matrix-product rate, measured on the same
machine; (4) peak memory, forward and backward. bf16, H = 32, G = 8, D = 112 and 128. At D = 112 the kernels split the
head dim: where a row of it takes longer than its twin at 128, padding would have been better. On Hopper, "ours, plain"
has the kernels of every other GPU. What a batch shares between layers (our plan, FlexAttention's block mask) is made
before.

Peers: SDPA by each of PyTorch's backends, FlexAttention with the same mask (compiled; its Triton backend, and FLASH
where flash-attn-4 is installed), flash-attn where installed, and for packed batches padded, nested and varlen SDPA. Who
cannot take a shape or a mask is left out, with the reason. TFLOP/s count what the mask leaves: 4 D a pair of tokens
forward, 2.5 times that backward. Forward runs with gradients on; backward is both minus forward. Times are medians of
what the GPU takes once the host has queued all of it; the JSON has those of whole calls too, as *_called.

With --device cpu the kernels run in Triton's interpreter: that shows that everything runs, and is no measure of speed.
Prints; writes attn.json after every row, the most telling first, and attn_*.png at the end where matplotlib is
installed, to DIR (runs/benchmarks). The same command again goes on behind the rows that are there.
"""

import os
import platform
import statistics
import time

import attn_forms
import attn_plots
import measured
import torch

ALPHAS = (0.3, 1.0, 0.0)  # first the one that few can do


def median_seconds(run, device):
    if device == "cuda":
        import triton

        return triton.testing.do_bench(run, return_mode="median") / 1e3  # clears the L2 cache between runs
    run()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(build, problem, expected):
    """-> seconds forward and of both, queued (CUDA) and called, peak bytes of both beyond the form's inputs (CUDA),
    largest difference from `expected`."""
    form = build(problem)
    with measured.environment(**form.environment):
        return measure_form(form, problem, expected)


def measure_form(form, problem, expected):
    def both():
        return torch.autograd.grad(form.run(), form.leaves, form.dout)

    difference = (form.packed(form.run().detach()) - expected).abs().max().item() if expected is not None else 0.0
    both()
    result = {"difference": difference, "peak_bytes": None}
    if problem.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    for name, run in (("forward", form.run), ("both", both)):
        called = median_seconds(run, problem.device)
        result |= {f"{name}_called": called, name: called}
        if problem.device == "cuda":
            result[name] = measured.queued_seconds(run)
    return result


def gemm_rate(device, dtype):
    """FLOP/s of the fastest of a few square matrix products."""
    rates = []
    for n in (4096, 8192, 16384) if device == "cuda" else (512, 1024):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * n**3 / median_seconds(lambda: a @ b, device))
    return max(rates)


def machine(device):
    versions = measured.versions("torch", "triton", "flash-attn", "flash-attn-4") | {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
    }
    return {"machine": measured.machine(device), "device": device, "commit": measured.commit(), "versions": versions}


def rated(row, problem, gemm):
    """A row with its FLOP/s, None where noise is larger than the time, and their shares of `gemm`."""
    seconds = {"forward": row["forward"], "backward": row["both"] - row["forward"]}
    flops = {"forward": problem.flops, "backward": 2.5 * problem.flops}
    for what in seconds:
        row[f"{what}_flops"] = flops[what] / seconds[what] if seconds[what] > 0 else None
        row[f"{what}_share"] = row[f"{what}_flops"] and row[f"{what}_flops"] / gemm
    return row


def line(row):
    about = f"{row['form']:22}{row['batch']:>16}{row['alpha']:6}{row['D']:5}"
    if "left_out" in row:
        return f"{about}  left out: {row['left_out'][:90]}"
    times = f"{1e3 * row['forward']:10.3f}{1e3 * (row['both'] - row['forward']):10.3f}"
    rates = "".join(shown(row[f"{what}_flops"], 1e12, "10.3g") for what in ("forward", "backward"))
    shares = "".join(shown(row[f"{what}_share"], 1, "10.1%") for what in ("forward", "backward"))
    return f"{about}{times}{rates}{shares}{shown(row['peak_bytes'], 2**20, '10,.0f')}{row['difference']:9.0e}"


def shown(value, unit, form):
    """The value in units, "-" in its place where there is none; form: as of an f-string, two digits wide."""
    return format("-", f">{form[:2]}") if value is None else format(value / unit, form)


def run_question(question, problems, forms, rows, gemm, device, quick):
    """A row of each form for each problem: {"batch": name, "lengths": [...], "alpha", "H", "G", "D", "dtype"}."""
    print(
        f"\n{question}\n{'form':22}{'batch':>16}{'alpha':>6}{'D':>5}"
        f"{'fwd ms':>10}{'bwd ms':>10}{'fwd TF/s':>10}{'bwd TF/s':>10}"
        f"{'fwd/GEMM':>10}{'bwd/GEMM':>10}{'peak MiB':>10}{'differs':>9}"
    )
    for batch, shape in problems:
        torch.manual_seed(0)
        problem, expected = attn_forms.Problem(**shape, device=device), None
        about = {"question": question, "batch": batch, "tokens": sum(shape["lengths"])}
        about |= {key: shape[key] for key in ("alpha", "D", "H", "G")}
        for name, build in forms.items():
            slow = quick and name.startswith("padded") and not problem.even  # 20 seconds each
            if slow or rows.find(form=name, **about):
                continue
            if expected is None and name != "ours":
                with torch.no_grad():
                    expected = attn_forms.ours(problem).run()
            row = {"form": name, **about}
            try:
                row = rated(row | measure(build, problem, expected), problem, gemm)
            except Exception as error:  # whatever a peer raises for what it does not take; the row says it
                row["left_out"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
            print(line(row), flush=True)
            rows.add(row)
            if device == "cuda":
                torch.cuda.empty_cache()
        torch.compiler.reset()


def summarise(rows):
    """Against the best peer, batch by batch: above 1 is faster."""
    print("\nours beside the fastest peer, forward / forward and backward, as times as fast")
    timed = [row for row in rows if "forward" in row]
    for key in dict.fromkeys((row["batch"], row["alpha"], row["D"]) for row in timed):
        same = [row for row in timed if (row["batch"], row["alpha"], row["D"]) == key]
        own = [row for row in same if row["form"] == "ours"]
        peers = [row for row in same if row["form"] not in ("ours", "ours, plain", "reference")]
        if own and peers:
            best = {what: min(peers, key=lambda row: row[what]) for what in ("forward", "both")}
            found = ", ".join(f"{best[what][what] / own[0][what]:.2f} ({best[what]['form']})" for what in best)
            print(f"{key[0]:>16}  alpha {key[1]}  D {key[2]}: {found}")


def shapes(cpu, quick):
    """Batches of one length and packed batches, [(name, lengths), ...] each."""
    if cpu:
        lengths = [64, 32] if quick else [64, 128, 256]
    else:
        lengths = [16384, 2048] if quick else [2**n for n in range(15, 8, -1)]
    tokens = 64 if cpu else 16384
    even = [(f"L = {n}", [n] * max(1, tokens // n)) for n in lengths]
    torch.manual_seed(0)  # log-normal lengths: median 128, half of the tokens in sequences above some 350
    number, median, most = (8, 16, 64) if cpu else (128 if quick else 512, 128, 4096)
    drawn = torch.randn(number).exp().mul(median).round().clamp(1, most).int().tolist()
    return even, [("log-normal", drawn), ("4 x 16", [16] * 4) if cpu else ("32 x 512", [512] * 32)]


def main():
    parser = measured.Parser(__doc__, quick={}, device=True)
    parser.add_argument("--forms", nargs="+", metavar="NAME", help="of the table's first column: these peers alone")
    options = parser.parse_args()
    cpu = options.device == "cpu"
    if cpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: on the first call
        print(
            "On a CPU `ours` runs in Triton's interpreter, one tile after another in NumPy: no number below is "
            "a speed of the kernels."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    dtype, (H, G), dims = (torch.float32, (2, 1), (112,)) if cpu else (torch.bfloat16, (32, 8), (112, 128))
    even, batches = shapes(cpu, options.quick)
    gemm = gemm_rate(options.device, dtype)
    rows = measured.Rows(options.out / "attn.json", machine(options.device))
    gemm = rows.report.setdefault("gemm_flops", gemm)  # an earlier start's, where this one goes on
    print(f"{rows.report['machine']}: matrix products at {gemm / 1e12:.3g} TFLOP/s in {dtype}")
    dense, ragged = attn_forms.peers(options.device)
    own = {"ours": attn_forms.ours} | ({"reference": attn_forms.reference} if cpu else {})
    if not cpu and torch.cuda.get_device_capability() == (9, 0):
        own["ours, plain"] = attn_forms.plain
    padded = {f"padded {name}": form for name, form in dense.items() if name.startswith("SDPA")}
    questions = {
        "Against length (questions 1, 3 and 4)": (even, dense),
        "Packed batches (question 2)": (batches, padded | ragged),
    }
    for D in dims:
        for question, (batch_lengths, peers) in questions.items():
            if options.quick and D != dims[0] and batch_lengths is batches:
                continue
            chosen = {name: form for name, form in peers.items() if not options.forms or name in options.forms}
            shape = {"H": H, "G": G, "D": D, "dtype": dtype}
            problems = [
                (name, {"lengths": lengths, "alpha": alpha, **shape})
                for alpha in ALPHAS
                for name, lengths in batch_lengths
            ]
            run_question(question, problems, own | chosen, rows, gemm, options.device, options.quick)
    if not cpu:
        summarise(rows)
    attn_plots.draw(rows, rows.report["machine"], options.out)


if __name__ == "__main__":
    main()
