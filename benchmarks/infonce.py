"""What do seven Matryoshka dims cost, beside one, and beside the textbook? And both ways beside one? Time and peak
memory of InfoNCE, forward and backward.

    python benchmarks/infonce.py [--sizes 1024 2048 ...] [--width 3584] [--forms ours ...] [--profile]
        [--out runs/benchmarks]

On CUDA in bf16 (the Triton form), else in fp32 on the CPU (the chunked form). N = M = each size; one dim is the whole
width, seven are the paper's at 3,584 and in proportion at other widths. Memory is the peak beyond the inputs. Peers:
the textbook form, the same under torch.compile, and sentence-transformers' CachedMultipleNegativesRankingLoss, under
its MatryoshkaLoss for seven dims, where it is installed. "GEMM" is one product of N x M x E, the measure of the rest.
Prints a table; writes infonce.json row by row, and infonce.png. --forms: these, beside GEMM, alone. On a GPU, times are
those of the GPU alone, in the JSON those of whole calls too; --profile: there also ours kernel by kernel.
"""

import ctypes
import gc
import time
from pathlib import Path

import measured
import torch

from conan_kernels import info_nce
from conan_kernels.info_nce.reference import info_nce_reference

PAPER_DIMS = (256, 512, 1024, 1536, 2048, 3072, 3584)
T = 0.02
CUDA = torch.cuda.is_available()


def ours(queries, documents, target, dims):
    info_nce(queries, documents, target, T, dims=dims).loss.backward()


def both_ways(queries, documents, target, dims):
    info_nce(queries, documents, target, T, dims=dims, symmetric=True).loss.backward()


def twice(queries, documents, target, dims):
    """Both ways without a form for it; right where query i's document is document i."""
    (
        info_nce(queries, documents, target, T, dims=dims).loss
        + info_nce(documents, queries, target, T, dims=dims).loss
    ).backward()


def textbook(queries, documents, target, dims):
    info_nce_reference(queries, documents, target, T, dims=dims).loss.backward()


def gemm(queries, documents, target, dims):
    queries.detach() @ documents.detach().T


def sentence_transformers():
    """Their loss on given embeddings: `calculate_loss`, the part that follows the embedding, mini-batches of 1,024
    rows."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss

    class Model(torch.nn.Sequential):  # never called: the embeddings are given
        def get_embedding_dimension(self):
            return None

    def theirs(queries, documents, target, dims):
        model = Model(torch.nn.Identity())
        loss = CachedMultipleNegativesRankingLoss(model, scale=1 / T, mini_batch_size=1024)
        if len(dims) > 1:
            MatryoshkaLoss(model, loss, dims, [1 / len(dims)] * len(dims))  # changes loss.calculate_loss
        loss.calculate_loss([list(queries.split(1024)), list(documents.split(1024))], with_backward=True)

    return theirs


def forms():
    """Name -> function(queries, documents, target, dims) that goes forward and backward; None where it is not
    installed."""
    compiled = torch.compile(info_nce_reference)

    def textbook_compiled(queries, documents, target, dims):
        compiled(queries, documents, target, T, dims=dims).loss.backward()

    try:
        theirs = sentence_transformers()
    except ImportError as error:
        print(f"sentence-transformers is left out: {error}")
        theirs = None
    return {
        "GEMM": gemm,
        "ours": ours,
        "ours, both ways": both_ways,
        "ours, twice": twice,
        "textbook": textbook,
        "textbook, compiled": textbook_compiled,
        "sentence-transformers": theirs,
    }


def fits(name, N, E, dims):
    """Whether a form that holds the matrix has the memory for it: 4 matrices of fp32 a dim, the textbook form's own
    count."""
    if "textbook" not in name:
        return True
    if CUDA:
        return 16 * N * N * len(dims) < 0.9 * torch.cuda.mem_get_info()[0]
    return 16 * N * N * len(dims) < 0.5 * 1024 * int(
        next(x for x in open("/proc/meminfo") if "MemAvailable" in x).split()[1]
    )


def measure(form, N, E, dims, profile=False):
    """({"seconds": of the GPU once all is queued, on a CPU the best, "seconds_called": the best of whole calls}, peak
    memory beyond the inputs in bytes), after a run to warm up."""
    dtype, device = (torch.bfloat16, "cuda") if CUDA else (torch.float32, "cpu")
    queries, documents = (torch.randn(N, E, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    target = torch.arange(N, device=device)

    def queue():
        queries.grad = documents.grad = None
        form(queries, documents, target, dims)

    def run():
        queue()
        if CUDA:
            torch.cuda.synchronize()

    run()
    peak = peak_memory(run, queries, documents)
    seconds = []
    while len(seconds) < 3 or (sum(seconds) < 2.0 and len(seconds) < 20):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    called = min(seconds)
    times = {"seconds": measured.queued_seconds(queue) if CUDA else called, "seconds_called": called}
    return times | ({"kernels": measured.kernels_of(queue)} if profile and CUDA else {}), peak


def peak_memory(run, *leaves):
    for leaf in leaves:
        leaf.grad = None
    gc.collect()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, or its reuse would not count
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def status(name):
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith(name)).split()[1])


def main():
    parser = measured.Parser(__doc__, quick={"sizes": [512], "width": 256})
    sizes = [1 << power for power in (range(10, 18) if CUDA else range(9, 13))]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, metavar="N")
    parser.add_argument("--width", type=int, default=3584, metavar="E")
    parser.add_argument("--forms", nargs="+", metavar="NAME")
    parser.add_argument("--profile", action="store_true", help="also the kernels of ours, on a GPU")
    options = parser.parse_args()
    seven = tuple(options.width * dim // 3584 for dim in PAPER_DIMS)
    about = {"machine": measured.machine("cuda" if CUDA else "cpu"), "torch": torch.__version__}
    about |= {"commit": measured.commit(), "width": options.width}
    rows = measured.Rows(options.out / "infonce.json", about)
    print(f"{'form':24}{'dims':>5}{'N = M':>9}{'ms':>12}{'MiB':>10}{'of GEMM rate':>14}")
    to_measure = {name: form for name, form in forms().items() if not options.forms or name in ("GEMM", *options.forms)}
    for N in options.sizes:
        for name, form in to_measure.items():
            for dims in ((options.width,),) if name == "GEMM" else ((options.width,), seven):
                row = {"form": name, "dims": len(dims), "N": N}
                if form is None or rows.find(**row) or not fits(name, N, options.width, dims):
                    continue
                try:
                    times, peak = measure(form, N, options.width, dims, options.profile and name == "ours")
                except torch.OutOfMemoryError:
                    continue
                rows.add(row | times | {"peak_bytes": peak})
                products = 1 if name == "GEMM" else 4 if CUDA else 3  # that one pass over the columns needs
                one = rows.find(N=N, form="GEMM")["seconds"]
                print(
                    f"{name:24}{len(dims):5}{N:9,}{1e3 * times['seconds']:12,.1f}"
                    f"{peak / 2**20:10,.0f}{products * one / times['seconds']:14.0%}",
                    flush=True,
                )
        torch.compiler.reset()
    for N in options.sizes:
        cost = {(row["form"], row["dims"]): row["seconds"] for row in rows if row["N"] == N}
        against = (
            f"; both ways {cost['ours, both ways', 1] / cost['ours', 1]:.2f} times as long as one for 1 "
            f"dim, {cost['ours, both ways', 7] / cost['ours', 7]:.2f} for 7"
            if ("ours, both ways", 7) in cost
            else ""
        )
        against += (
            f", textbook / ours: {cost['textbook', 1] / cost['ours', 1]:.2f} for 1 dim"
            if ("textbook", 1) in cost
            else ""
        )
        against += f", {cost['textbook', 7] / cost['ours', 7]:.2f} for 7" if ("textbook", 7) in cost else ""
        print(f"N = M = {N:,}: 7 dims take {cost['ours', 7] / cost['ours', 1]:.2f} times as long as 1{against}")
    draw(rows, options.out)


def draw(rows, folder):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    colour = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(row["form"] for row in rows))}
    for axis, key, unit in ((axes[0], "seconds", "seconds"), (axes[1], "peak_bytes", "peak bytes beyond the inputs")):
        for name, dims in dict.fromkeys((row["form"], row["dims"]) for row in rows):
            points = [(row["N"], row[key]) for row in rows if (row["form"], row["dims"]) == (name, dims)]
            label = f"{name}, {dims} dims" if dims > 1 else name
            axis.loglog(*zip(*points), "--" if dims > 1 else "-", marker=".", color=colour[name], label=label)
        axis.set(xlabel="N = M", ylabel=unit)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"InfoNCE forward and backward, E = {rows.report['width']:,}, {rows.report['machine']}")
    figure.savefig(folder / "infonce.png", dpi=120)
    print(f"wrote {folder}/infonce.json and {folder}/infonce.png")


if __name__ == "__main__":
    main()
