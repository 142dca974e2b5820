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

import importlib
import inspect
import os
import platform
import statistics
import time
from dataclasses import dataclass, field, replace

import measured
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from conan_kernels import soft_mask_attention, soft_mask_plan
from conan_kernels.attention.reference import soft_mask_attention_reference, soft_mask_bias

ALPHAS = (0.3, 1.0, 0.0)  # first the one that few can do
PLAIN = {"CONAN_HOPPER": "0"}


class Problem:
    """A packed batch: q [T, H, D], k and v [T, G, D], dout [T, H, D]."""

    def __init__(self, lengths, alpha, H, G, D, device, dtype):
        self.lengths, self.alpha, self.H, self.G, self.D, self.device = lengths, alpha, H, G, D, device
        T, self.B, self.L = sum(lengths), len(lengths), max(lengths)
        self.q, self.k, self.v, self.dout = (
            torch.randn(T, heads, D, device=device, dtype=dtype) for heads in (H, G, G, H)
        )
        self.cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
        self.even = len(set(lengths)) == 1
        pairs = sum(n * (n + 1) // 2 if alpha == 0 else n * n for n in lengths)
        self.flops = 4 * D * H * pairs  # forward

    def own(self):
        """bool [B, L]: what of a padded batch is not padding."""
        return torch.arange(self.L, device=self.device) < self.cu_seqlens.diff()[:, None]

    def padded(self, x):
        """[T, heads, D] -> [B, heads, L, D]"""
        if self.even:
            return x.view(self.B, self.L, *x.shape[1:]).transpose(1, 2)
        dense = x.new_zeros(self.B, self.L, *x.shape[1:])
        dense[self.own()] = x
        return dense.transpose(1, 2)

    def packed(self, x):
        x = x.transpose(1, 2)
        return x.flatten(0, 1) if self.even else x[self.own()]


@dataclass
class Form:
    """run() -> out, in the form's own layout, as are the leaves and dout; packed(out) -> [T, H, D]."""

    run: object
    leaves: tuple
    dout: torch.Tensor
    packed: object = lambda out: out
    environment: dict = field(default_factory=dict)  # variables that its kernels are chosen by


def leaves(*tensors):
    return tuple(x.detach().requires_grad_() for x in tensors)


def ours(p):
    qkv = leaves(p.q, p.k, p.v)
    alpha = torch.tensor(p.alpha, device=p.device)
    plan = soft_mask_plan(p.q, p.cu_seqlens, alpha)
    return Form(lambda: soft_mask_attention(*qkv, p.cu_seqlens, alpha, plan=plan), qkv, p.dout)


def plain(p):
    """ours without the kernels for Hopper."""
    with measured.environment(**PLAIN):
        return replace(ours(p), environment=PLAIN)


def reference(p):
    qkv = leaves(p.q, p.k, p.v)
    return Form(lambda: soft_mask_attention_reference(*qkv, p.cu_seqlens, p.alpha), qkv, p.dout)


def sdpa(backend):
    def form(p):
        qkv = leaves(*map(p.padded, (p.q, p.k, p.v)))
        mask = None
        if 0 < p.alpha < 1:  # [L, L], or [B, 1, L, L] where lengths differ
            biases = [
                soft_mask_bias(n, p.alpha, dtype=torch.float32, device=p.device)
                for n in ([p.L] if p.even else p.lengths)
            ]
            # finite: padding rows are not NaN
            padded = [F.pad(bias, (0, p.L - len(bias)) * 2, value=-1e4) for bias in biases]
            mask = (padded[0] if p.even else torch.stack(padded)[:, None]).to(p.q.dtype)
        elif p.alpha == 1 and not p.even:
            mask = p.own()[:, None, None, :].expand(-1, 1, p.L, -1)

        def run(gqa=True):
            q, k, v = qkv
            if not gqa:
                k, v = (x.repeat_interleave(p.H // p.G, dim=1) for x in (k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=p.alpha == 0, enable_gqa=gqa)

        try:
            torch.autograd.grad(run(), qkv, p.padded(p.dout))
            return Form(run, qkv, p.padded(p.dout), p.packed)
        except RuntimeError:  # this backend knows no grouped heads: they are copied for it, within its time
            return Form(lambda: run(gqa=False), qkv, p.padded(p.dout), p.packed)

    return form


def nested(p):
    if 0 < p.alpha < 1:
        raise ValueError("nested tensors take no mask")
    qkv = leaves(p.q, p.k, p.v)
    offsets = p.cu_seqlens.long()

    def run():
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                x.repeat_interleave(p.H // x.shape[1], dim=1), offsets, min_seqlen=min(p.lengths), max_seqlen=p.L
            )
            for x in qkv
        )
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=p.alpha == 0).transpose(1, 2).values()

    return Form(run, qkv, p.dout)


def varlen(p):
    """PyTorch's own varlen attention, which is flash-attention 2."""
    from torch.nn.attention.varlen import varlen_attn

    if 0 < p.alpha < 1:
        raise ValueError("takes no mask")
    qkv = leaves(p.q, p.k, p.v)
    known = inspect.signature(varlen_attn).parameters
    options = (
        {"window_size": (-1, 0) if p.alpha == 0 else (-1, -1)}
        if "window_size" in known
        else {"is_causal": p.alpha == 0}
    )

    def run():
        q, k, v = qkv
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:  # torch before 2.12: the heads are copied for it, within its time
            k, v = (x.repeat_interleave(p.H // p.G, dim=1) for x in (k, v))
        return varlen_attn(q, k, v, p.cu_seqlens, p.cu_seqlens, p.L, p.L, **options)

    return Form(run, qkv, p.dout)


def flash_attn(module):
    def form(p):
        attend = importlib.import_module(module).flash_attn_varlen_func
        if 0 < p.alpha < 1:
            raise ValueError("takes no mask")
        qkv = leaves(p.q, p.k, p.v)
        lengths = dict(cu_seqlens_q=p.cu_seqlens, cu_seqlens_k=p.cu_seqlens, max_seqlen_q=p.L, max_seqlen_k=p.L)

        def run():
            out = attend(*qkv, **lengths, causal=p.alpha == 0)
            return out[0] if isinstance(out, tuple) else out

        return Form(run, qkv, p.dout)

    return form


def flex(backend):
    def form(p):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # else one row of all tokens, [1, heads, T, D]
        heads = p.padded if p.even else lambda x: x.transpose(0, 1)[None]
        qkv = leaves(*map(heads, (p.q, p.k, p.v)))
        length = p.L if p.even else len(p.q)
        score_mod = block_mask = None
        if 0 < p.alpha < 1:
            columns = [torch.arange(1, n + 1, device=p.device) / n for n in ([p.L] if p.even else p.lengths)]
            bias = (p.alpha / torch.cat(columns)).clamp(max=1).log()  # [length], of the future of each column

            def score_mod(score, b, h, q, k):
                return torch.where(k <= q, score, score + bias[k])

        if p.alpha == 0 or not p.even:
            sequence = torch.zeros(length, dtype=torch.int32, device=p.device)
            if not p.even:
                sequence = torch.repeat_interleave(torch.arange(p.B, device=p.device), p.cu_seqlens.diff())

            def visible(b, h, q, k):
                return (sequence[q] == sequence[k]) & ((k <= q) | (p.alpha > 0))

            def causal(b, h, q, k):
                return k <= q

            block_mask = create_block_mask(causal if p.even else visible, None, None, length, length, device=p.device)
        compiled = torch.compile(flex_attention, dynamic=False)
        options = {"BACKEND": backend}

        def run():
            return compiled(*qkv, score_mod=score_mod, block_mask=block_mask, enable_gqa=True, kernel_options=options)

        return Form(run, qkv, heads(p.dout), p.packed if p.even else lambda out: out[0].transpose(0, 1))

    return form


def peers(device):
    """({name: form} for sequences of one length, the same for packed batches); says who is not installed."""
    dense = {"SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION), "SDPA math": sdpa(SDPBackend.MATH)}
    if device == "cpu":
        print("left out, for they need a GPU: SDPA cuDNN, SDPA efficient, varlen, FlexAttention's backward, flash-attn")
        return dense, {"nested SDPA": nested}
    dense |= {"SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION), "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION)}
    either = {"Flex Triton": flex("TRITON")}
    for name, module, form in (
        ("Flex FLASH", "flash_attn.cute", flex("FLASH")),
        ("flash-attn 2", "flash_attn", flash_attn("flash_attn")),
        ("flash-attn 3", "flash_attn_interface", flash_attn("flash_attn_interface")),
        ("flash-attn 4", "flash_attn.cute", flash_attn("flash_attn.cute")),
    ):
        try:
            importlib.import_module(module)
            either[name] = form
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return dense | either, {"nested SDPA": nested, "varlen": varlen} | either


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


def shown(value, unit, form):
    """The value in units, "-" in its place where there is none; form: as of an f-string, two digits wide."""
    return format("-", f">{form[:2]}") if value is None else format(value / unit, form)


def run_question(rows, question, shapes, forms, options, H, G, dtype, gemm):
    print(
        f"\n{question}\n{'form':22}{'batch':>16}{'alpha':>6}{'D':>5}"
        f"{'fwd ms':>10}{'bwd ms':>10}{'fwd TF/s':>10}{'bwd TF/s':>10}"
        f"{'fwd/GEMM':>10}{'bwd/GEMM':>10}{'peak MiB':>10}{'differs':>9}"
    )
    for (label, lengths), alpha, D in shapes:
        torch.manual_seed(0)
        problem, expected = Problem(lengths, alpha, H, G, D, options.device, dtype), None
        for name, build in forms.items():
            about = {
                "question": question,
                "form": name,
                "batch": label,
                "tokens": sum(lengths),
                "alpha": alpha,
                "D": D,
                "H": H,
                "G": G,
            }
            if expected is None and name != "ours":
                with torch.no_grad():
                    expected = ours(problem).run()
            slow = options.quick and name.startswith("padded") and not problem.even  # 20 seconds each
            if slow or rows.find(**about):
                continue
            row = dict(about)
            try:
                row |= measure(build, problem, expected)
            except Exception as error:  # whatever a peer raises for what it does not take; the row says it
                row["left_out"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
                print(f"{name:22}{label:>16}{alpha:6}{D:5}  left out: {row['left_out'][:90]}", flush=True)
            else:
                backward = row["both"] - row["forward"]
                row["forward_flops"] = problem.flops / row["forward"]
                # noise beyond the time itself
                row["backward_flops"] = 2.5 * problem.flops / backward if backward > 0 else None
                for what in ("forward", "backward"):
                    row[f"{what}_share"] = row[f"{what}_flops"] and row[f"{what}_flops"] / gemm
                rates = shown(row["forward_flops"], 1e12, "10.3g"), shown(row["backward_flops"], 1e12, "10.3g")
                shares = shown(row["forward_share"], 1, "10.1%"), shown(row["backward_share"], 1, "10.1%")
                times = f"{1e3 * row['forward']:10.3f}{1e3 * backward:10.3f}"
                print(
                    f"{name:22}{label:>16}{alpha:6}{D:5}",
                    times,
                    *rates,
                    *shares,
                    shown(row["peak_bytes"], 2**20, "10,.0f"),
                    f"{row['difference']:9.0e}",
                    sep="",
                    flush=True,
                )
            rows.add(row)
            if options.device == "cuda":
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


def draw(rows, name, folder):
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if "forward" in row]
    if not timed:
        return
    D = timed[0]["D"]  # the model's; the others stand in the table
    by_length = [row for row in timed if row["batch"].startswith("L = ") and row["D"] == D]
    for what, keys, unit in (
        ("length", ("forward_flops", "backward_flops"), "FLOP/s"),
        ("gemm", ("forward_share", "backward_share"), "share of the measured GEMM rate"),
        ("memory", ("peak_bytes",), "peak bytes, forward and backward"),
    ):
        if all(row[key] is None for row in by_length for key in keys):
            continue
        figure, axes = plt.subplots(
            len(keys), len(ALPHAS), figsize=(14, 4 * len(keys)), layout="constrained", squeeze=False
        )
        for line, key in zip(axes, keys):
            for axis, alpha in zip(line, sorted(ALPHAS)):
                for form in dict.fromkeys(row["form"] for row in by_length):
                    own = [
                        row
                        for row in by_length
                        if (row["form"], row["alpha"]) == (form, alpha) and row[key] is not None
                    ]
                    points = [(int(row["batch"][4:]), row[key]) for row in own]
                    if points:
                        axis.plot(*zip(*points), marker=".", label=form, linewidth=2.5 if form == "ours" else 1)
                axis.set_xscale("log", base=2)
                axis.set(
                    title=f"alpha = {alpha}",
                    xlabel="tokens a sequence",
                    ylabel=f"{key.partition('_')[0]}, {unit}" if len(keys) > 1 else unit,
                )
        axes[0, 0].legend(fontsize=7)
        figure.suptitle(f"Soft-masked attention, D = {D}, {name}")
        figure.savefig(folder / f"attn_{what}.png", dpi=120)
    packed = [row for row in timed if not row["batch"].startswith("L = ") and row["D"] == D]
    batches = list(dict.fromkeys((row["batch"], row["alpha"]) for row in packed))
    figure, axes = plt.subplots(1, len(batches), figsize=(4 * len(batches), 4), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], batches):
        rows = [row for row in packed if (row["batch"], row["alpha"]) == key]
        axis.barh(
            [row["form"] for row in rows],
            [1e3 * row["both"] for row in rows],
            color=["C1" if row["form"] == "ours" else "C0" for row in rows],
        )
        axis.set(title=f"{key[0]}, alpha {key[1]}", xlabel="ms, forward and backward")
        axis.invert_yaxis()
    figure.savefig(folder / "attn_packed.png", dpi=120)
    print(f"wrote the plots to {folder}")


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
    lengths = (
        ([64, 32] if cpu else [16384, 2048])
        if options.quick
        else [64, 128, 256]
        if cpu
        else [2**n for n in range(15, 8, -1)]
    )
    tokens = 64 if cpu else 16384
    even = [(f"L = {n}", [n] * max(1, tokens // n)) for n in lengths]

    torch.manual_seed(0)  # log-normal lengths: median 128, half of the tokens in sequences above some 350
    number, median, most = (8, 16, 64) if cpu else (128 if options.quick else 512, 128, 4096)
    drawn = torch.randn(number).exp().mul(median).round().clamp(1, most).int().tolist()
    batches = [("log-normal", drawn), ("4 x 16" if cpu else "32 x 512", [16] * 4 if cpu else [512] * 32)]

    gemm = gemm_rate(options.device, dtype)
    rows = measured.Rows(options.out / "attn.json", machine(options.device))
    gemm = rows.report.setdefault("gemm_flops", gemm)  # an earlier start's, where this one goes on
    print(f"{rows.report['machine']}: matrix products at {gemm / 1e12:.3g} TFLOP/s in {dtype}")
    dense, ragged = peers(options.device)
    own = {"ours": ours} | ({"reference": reference} if cpu else {})
    if not cpu and torch.cuda.get_device_capability() == (9, 0):
        own["ours, plain"] = plain
    padded = {f"padded {name}": form for name, form in dense.items() if name.startswith("SDPA")}
    chosen = [
        {name: form for name, form in peers.items() if not options.forms or name in options.forms}
        for peers in (dense, padded | ragged)
    ]
    for D in dims:
        for question, shapes, peer in (
            ("Against length (questions 1, 3 and 4)", even, chosen[0]),
            ("Packed batches (question 2)", batches, chosen[1]),
        ):
            if D == dims[0] or not options.quick or shapes is even:
                run_question(
                    rows,
                    question,
                    [(shape, alpha, D) for alpha in ALPHAS for shape in shapes],
                    own | peer,
                    options,
                    H,
                    G,
                    dtype,
                    gemm,
                )
    if not cpu:
        summarise(rows)
    draw(rows, rows.report["machine"], options.out)


if __name__ == "__main__":
    main()
