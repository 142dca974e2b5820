"""The plots of attn.py's rows."""

FIGURES = (  # file, what it draws, its unit
    ("length", ("forward_flops", "backward_flops"), "FLOP/s"),
    ("gemm", ("forward_share", "backward_share"), "share of the measured GEMM rate"),
    ("memory", ("peak_bytes",), "peak bytes, forward and backward"),
)


def draw(rows, name, folder):
    """attn_*.png of the rows' first D, the model's; the others stand in the table. name: the machine's."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    timed = [row for row in rows if "forward" in row]
    timed = [row for row in timed if row["D"] == timed[0]["D"]]
    by_length = [row for row in timed if row["batch"].startswith("L = ")]
    packed = [row for row in timed if row not in by_length]
    for file, keys, unit in FIGURES:
        if any(row[key] is not None for row in by_length for key in keys):
            draw_by_length(by_length, keys, unit, name, folder / f"attn_{file}.png")
    if packed:
        draw_packed(packed, folder / "attn_packed.png")
    print(f"wrote the plots to {folder}")


def draw_by_length(rows, keys, unit, name, path):
    """A line of panels a key, a panel an alpha, a curve a form."""
    import matplotlib.pyplot as plt

    alphas = sorted({row["alpha"] for row in rows})
    size = {"figsize": (14, 4 * len(keys)), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(len(keys), len(alphas), **size)
    for key, line in zip(keys, axes):
        for alpha, axis in zip(alphas, line):
            here = [row for row in rows if row["alpha"] == alpha and row[key] is not None]
            for form in dict.fromkeys(row["form"] for row in here):
                points = [(int(row["batch"][4:]), row[key]) for row in here if row["form"] == form]
                axis.plot(*zip(*points), marker=".", label=form, linewidth=2.5 if form == "ours" else 1)
            axis.set_xscale("log", base=2)
            of = f"{key.partition('_')[0]}, {unit}" if len(keys) > 1 else unit
            axis.set(title=f"alpha = {alpha}", xlabel="tokens a sequence", ylabel=of)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"Soft-masked attention, D = {rows[0]['D']}, {name}")
    figure.savefig(path, dpi=120)


def draw_packed(rows, path):
    """A panel a batch and alpha, a bar a form."""
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["batch"], row["alpha"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels):
        here = [row for row in rows if (row["batch"], row["alpha"]) == panel]
        colours = ["C1" if row["form"] == "ours" else "C0" for row in here]
        axis.barh([row["form"] for row in here], [1e3 * row["both"] for row in here], color=colours)
        axis.set(title=f"{panel[0]}, alpha {panel[1]}", xlabel="ms, forward and backward")
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)
