"""The tables of README.md, benchmarks/README.md and docs/, from the JSON under benchmarks/results/: no number in them
is typed.

    python benchmarks/tables.py [--check]

A page holds a pair of lines, `<!-- table NAME FILE.json ... -->` and `<!-- end -->`; what stands between them is made
anew. --check changes nothing and ends with 1 where a page is not as it would be made.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import recipe_report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table (\w+) ([^>]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
FORMS = {  # attn.py's names -> a column's
    "ours": "ours",
    "ours, plain": "ours, plain kernels",
    "Flex Triton": "FlexAttention",
    "Flex FLASH": "FlexAttention, FLASH",
    "SDPA cuDNN": "cuDNN",
    "padded SDPA cuDNN": "cuDNN",
    "SDPA flash": "flash-attention 2",
    "varlen": "flash-attention 2",
    "flash-attn 2": "flash-attention 2",
    "flash-attn 3": "flash-attention 3",
}


def attention(*files):
    """Forward / backward, ms, of attn.py's rows: a line a batch, alpha and D; a column a form."""
    cells = {}
    for row in _latest(files, "batch", "tokens", "D", "alpha"):
        key = (row["batch"], row["tokens"], row["D"], row["alpha"])
        if row["form"] in FORMS and "forward" in row:
            shown = f"{1e3 * row['forward']:.3g} / {1e3 * (row['both'] - row['forward']):.3g}"
            cells.setdefault(key, {})[FORMS[row["form"]]] = shown
    cells = {key: line for key, line in cells.items() if "ours" in line}
    columns = [name for name in dict.fromkeys(FORMS.values()) if any(line.get(name) for line in cells.values())]
    order = sorted(
        cells,
        key=lambda key: (
            not key[0].startswith("L = "),
            -int(key[0][4:]) if key[0].startswith("L = ") else 0,
            key[0],
            key[2],
            key[3],
        ),
    )
    return _table(
        ["batch", "D", "alpha", *columns],
        ([_batch(*key[:2]), key[2], f"{key[3]:g}", *(cells[key].get(name, "") for name in columns)] for key in order),
    )


def _latest(files, *keys):
    """The rows of all files: ours of the last alone, a peer's of the last that has it. keys: what a row is about."""
    rows = {}
    for file in files:
        for row in _read(file)["rows"]:
            if file == files[-1] or not row["form"].startswith("ours"):
                rows[row["form"], *(row[key] for key in keys)] = row
    return rows.values()


STEPS = {"text": "next token, {tokens:,} tokens", "pairs": "pairs, {tokens:,} tokens"}


def steps(*files):
    """A line a step and form of step.py."""
    lines = []
    for work, shown in STEPS.items():
        for row in sorted(_latest(files, "work"), key=lambda row: row["seconds"]):
            if row["work"] == work and row["form"] in ("ours", "transformers", "transformers, compiled"):
                cells = f"{1e3 * row['seconds']:.0f}", f"{row['tokens_per_s']:,.0f}", f"{row['share']:.0%}"
                lines.append([shown.format(**row), row["form"], *cells, f"{row['peak_bytes'] / 2**30:.0f}"])
    return _table(["step", "form", "ms", "tokens/s", "of the matrix-product rate", "peak GiB"], lines)


def infonce(*files):
    """A line a number of texts of infonce.py, a column a form, ms with one dim and with seven."""
    rows = {(row["N"], row["form"], row["dims"]): row["seconds"] for row in _latest(files, "N", "dims")}
    forms = [form for form in dict.fromkeys(form for _, form, _ in rows) if form != "GEMM"]
    forms.sort(key=lambda form: form != "ours")
    shown = lambda N, form: " / ".join(f"{1e3 * rows[N, form, d]:.3g}" for d in (1, 7) if (N, form, d) in rows)
    lines = [[f"{N:,}", *(shown(N, form) for form in forms)] for N in sorted({N for N, _, _ in rows})]
    return _table(["N = M", *(f"{form}, 1 / 7 dims" if form == "ours" else form for form in forms)], lines)


SCORES = {
    "docs.ndcg@10": "docs nDCG@10",
    **{
        f"cross_lingual.{language}.recall@20": f"{language} -> en Recall@20"
        for language in ("de", "es", "fr", "ja", "ko", "ru", "zh")
    },
    "sts.docs.spearman": "STS of docs",
    "sts.messages.spearman": "STS of messages",
    "classification.accuracy": "classification",
}


LANGUAGES = [key for key in SCORES if key.startswith("cross_lingual.")]


def scores(*files):
    """A line a task, a column a model: the stages of a stages.json, the models of a peers.json, a results.json
    (NAME=FILE.json), BM25."""
    columns = _models(files)
    return _table(
        ["", *columns], ([name, *(_score(row.get(key)) for row in columns.values())] for key, name in SCORES.items())
    )


def summary(*files):
    """As scores, in five lines: the languages are one, their average."""
    columns = _models(files)
    lines = []
    for key, name in SCORES.items():
        if key == LANGUAGES[0]:
            lines.append(
                [f"{len(LANGUAGES)} languages -> en Recall@20", *(_score(_mean(row)) for row in columns.values())]
            )
        elif key not in LANGUAGES:
            lines.append([name, *(_score(row.get(key)) for row in columns.values())])
    return _table(["held-out task", *columns], lines)


def _models(files):
    """{a column's head: its scores}. Before the first results.json stands BM25, which each of them has."""
    columns = {}
    for file in files:
        name, _, file = file.rpartition("=")
        found = _read(file)
        for row in found.get("rows", ()):
            columns[row.get("model") or f"{name} {row['stage']}".strip()] = row
        if "rows" not in found:
            columns.setdefault("BM25", {key: found.get(key.replace(".", ".bm25.", 1)) for key in SCORES})
            columns[name or file] = found
    return columns


def _score(value):
    return "" if value is None else f"{value:.3f}"


def _mean(row):
    found = [row.get(key) for key in LANGUAGES]
    return None if None in found else sum(found) / len(found)


def finetune(file):
    """A line a training of finetune.py."""
    rows = _read(file)["rows"]
    lines = []
    for row in rows:
        rate = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else ""
        memory = f"{row['peak_bytes'] / 2**30:.1f} GiB" if row.get("peak_bytes") else ""
        docs = f"{row['docs.ndcg@10']:.3f}" if "docs.ndcg@10" in row else ""
        lines.append(
            [row["trainer"], row["question"], f"{row['pairs']:,}", f"{row['seconds']:.0f}", rate, memory, docs]
        )
    return _table(["trainer", "question", "pairs", "seconds", "tokens/s", "peak memory", "docs nDCG@10"], lines)


def trainers(file):
    """Tokens a second of the trainers in a finetune.json, a line each kind of texts and precision."""
    cases = {}
    for row in (row for row in _read(file)["rows"] if row["question"] == "rate"):
        cases.setdefault((", ".join(row["data"]), row["precision"]), []).append(row)
    names = list(dict.fromkeys(row["trainer"] for rows in cases.values() for row in rows))
    lines = []
    for (data, precision), rows in cases.items():
        rates = {row["trainer"]: row["tokens_per_s"] for row in rows}
        ahead = rates["ours"] / max(rate for name, rate in rates.items() if name != "ours")
        cells = [f"{rates[name]:,.0f}" if name in rates else "" for name in names]
        lines.append([f"`{data}`", precision, f"{rows[0]['tokens']:,.0f}", *cells, f"{ahead:.1f}"])
    return _table(["texts", "products", "tokens a step", *names, "ours beside the fastest other"], lines)


def where(*files):
    """What a step's parts take, by where.py, three columns a file."""
    reports = [_read(file) for file in files]
    parts = dict.fromkeys(row["part"] for report in reports for row in report["rows"])
    lines = []
    for part in parts:
        line = [part]
        for report in reports:
            whole = sum(row[way] for row in report["rows"] for way in ("forward", "backward"))
            ways = [[row[way] for way in ("forward", "backward")] for row in report["rows"] if row["part"] == part]
            line += [f"{1e3 * one:.0f} ms" for one in ways[0]] + [f"{sum(ways[0]) / whole:.1%}"] if ways else [""] * 3
        lines.append(line)
    heads = [f"{report['precision']}: {way}" for report in reports for way in ("forward", "backward", "share")]
    return _table(["part", *heads], lines)


def ablation(*files):
    """A line a comparison of recipe.py's arms, two columns a file (NAME=FILE.json): the differences on docs and
    languages, with what they say of the paper's."""
    columns = {}
    for file in files:
        name, _, file = file.rpartition("=")
        columns[name] = _read(file)["rows"]
    lines, by_name = [], {one.name: one for rows in columns.values() for one in recipe_report.comparisons(rows)}
    for name, one in by_name.items():
        cells = []
        for rows in columns.values():
            found = [
                recipe_report.difference(rows, one, metric) for metric in (recipe_report.ENGLISH, recipe_report.MULTI)
            ]
            words = recipe_report.verdicts(one, *found)
            cells += [
                "<br>".join((recipe_report.shown(value), word)) if value else "" for value, word in zip(found, words)
            ]
        lines.append([name, *cells, recipe_report.papers(one)])
    heads = [f"{name}: {what}" for name in columns for what in ("docs nDCG@10", "languages R@20")]
    heads = ["the first, less the second", *heads, "paper, points: English, multilingual"]
    if not any(line[-1] for line in lines):  # nothing of these is in the paper
        heads, *lines = (line[:-1] for line in (heads, *lines))
    return _table(heads, lines)


def search(file):
    """A line an index and its settings, of search.py."""
    lines = []
    for row in _read(file)["rows"]:
        exact = row["index"] == "Flat"
        lines.append(
            [
                "exact" if exact else f"`{row['index']}`, `{row['search']}`",
                "" if exact else f"{row['made_s']:.0f} s",
                "" if exact else f"{row['bytes'] / 1e9:.1f} GB",
                f"{row['peak_bytes'] / 1e9:.1f} GB",
                f"{row['single_ms']:,.1f} ms",
                f"{row['batch_ms']:.1f} ms",
                "" if exact else f"{row['recall']:.2f}",
            ]
        )
    head = ["index", "made in", "on disk", "memory", "a query", "a query of 1,000", "finds of the exact 10"]
    return _table(head, lines)


def _batch(label, tokens):
    length = label.removeprefix("L = ")
    return (
        f"{max(1, tokens // int(length))} x {int(length):,}"
        if length != label
        else f"{label}, {tokens:,} tokens"
        if label == "log-normal"
        else label
    )


def planned(file):
    """Memory and time of a plan.json, planned beside measured."""
    lines = []
    for row in (row for row in _read(file)["rows"] if "planned" in row):
        bytes_planned, peak = sum(row["planned"].values()), row["peak_bytes"]
        seconds = [1e3 * row["planned_seconds"], 1e3 * row["seconds"]] if "seconds" in row else None
        lines.append(
            [
                *(row["form"], row["work"]),
                f"{bytes_planned / 2**30:.2f}",
                f"{peak / 2**30:.2f}" if peak else "",
                *(f"{one:.0f}" for one in seconds or ()),
                *([""] * 2 if not seconds else []),
            ]
        )
    return _table(["device, model", "work", "GiB planned", "GiB measured", "ms planned", "ms measured"], lines)


def lengths(file):
    """Memory and time of lengths.py by the texts' length, cut by texts and by tokens."""
    report = _read(file)
    by_kind = {}
    for row in report["rows"]:
        gib = [row[key] / 2**30 for key in ("peak_bytes", "planned_bytes")]
        cells = [f"{row['parts']}", *(f"{one:.2f} GiB" for one in gib), f"{row['seconds']:.1f} s"]
        by_kind.setdefault((row["texts"], row["count"]), []).extend(cells)
    lines = [
        [f"{count:,} of {int(kind):,} tokens" if kind.isdigit() else f"{count:,}, {kind}", *cells]
        for (kind, count), cells in by_kind.items()
    ]
    heads = [f"`{key} = {report[key]}`: parts" for key in ("chunk", "chunk_tokens")]
    return _table(["texts", *(cell for head in heads for cell in (head, "memory", "planned", "a step"))], lines)


def paper(file):
    """The hours of the paper's stages in a plan.json."""
    rows = [row for row in _read(file)["rows"] if "paper_hours" in row]
    lines = [
        [row["work"], f"{row['tokens'] / 1e9:,.0f}B", row["gpus"], f"{row['data']} x {row['tensor']}", row["chunk"],
         f"{1e3 * row['planned_seconds']:,.0f}", f"{row['mfu']:.0%}", f"{row['planned_hours']:.0f}", row["paper_hours"]]
        for row in rows
    ]  # fmt: skip
    head = ["stage", "tokens", "GPUs", "data x tensor ranks", "chunk", "ms a step", "MFU", "hours predicted"]
    return _table([*head, "hours in the paper"], lines)


def overlap(file):
    """What is sent, what of it is hidden, and what is waited for, of an overlap.json."""
    lines = []
    for row in _read(file)["rows"]:
        hidden = f"{1 - row['waits_data'] / row['sends_data']:.0%}" if row["sends_data"] else ""
        times = [f"{1e3 * row[key]:.0f}" for key in ("step", "computes", "sends_data")]
        waits = [f"{1e3 * row[key]:.0f}" for key in ("waits_data", "waits_tensor")]
        rate = f"{row['tokens_per_s_of_gpu']:,.0f}"
        mesh = f"{row['data']:,} x {row['tensor']}"
        lines.append([row["work"], f"{row['gpus']:,}", mesh, *times, hidden, *waits, rate])
    head = ["work", "GPUs", "data x tensor ranks", "step", "computes", "data ranks send", "of it hidden"]
    return _table([*head, "waits for data ranks", "for tensor ranks", "tokens/s of a GPU"], lines)


def _table(head, lines):
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def _read(file):
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


TABLES = {
    "attention": attention,
    "steps": steps,
    "infonce": infonce,
    "scores": scores,
    "summary": summary,
    "finetune": finetune,
    "trainers": trainers,
    "where": where,
    "ablation": ablation,
    "search": search,
    "planned": planned,
    "lengths": lengths,
    "paper": paper,
    "overlap": overlap,
}


def made(text):
    """A page's text with its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]](*found[3].split())}\n{found[5]}", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments, stale = parser.parse_args(), []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = made(before)
        if after != before:
            stale.append(str(page.relative_to(ROOT)))
            if not arguments.check:
                page.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'not as made' if arguments.check else 'made anew'}: {', '.join(stale)}")
    sys.exit(bool(stale and arguments.check))


if __name__ == "__main__":
    main()
