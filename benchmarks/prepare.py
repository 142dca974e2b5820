"""How fast does text become token shards, beside the tokenizer alone and beside Hugging Face datasets.map + tokenizers?

    python benchmarks/prepare.py [--source docstrings] [--megabytes 60] [--workers 1 2] [--rounds 3]
        [--out runs/benchmarks]

The text: what the packages installed here bring, "docstrings" (900 characters each) or "catalogues" (110), as four
files of JSON Lines. Ours, as `python -m conan_engine.prepare` does it: read, checked, encoded, written, synced. The
tokenizer alone: sentencepiece's `encode` with one thread on lists of the same texts in memory, the texts shared out to
as many processes that are started and filled before the clock runs; its ids are dropped. Hugging Face:
load_dataset("json"), then map in batches of 1,000 with num_proc processes and the same vocabulary in the `tokenizers`
library. Start of the processes counts for ours and for Hugging Face. Everything is measured in turn, `rounds` times; a
ratio is the median over the rounds.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measured

from conan_engine.config import Pretrain
from conan_engine.config import Tokenizer as TokenizerSettings
from conan_engine.data import build
from conan_engine.data.sources import installed
from conan_engine.data.tokenizer import Tokenizer

FILES = 4


def write_texts(folder, source, size):
    """Texts of about so many bytes in all, as files of a folder; -> them."""
    own = [record["text"] for record in installed.READERS[source, "text"]()]
    texts, written = [], 0
    while written < size:
        texts.append(own[len(texts) * 7919 % len(own)])  # a prime: mixed
        written += len(texts[-1].encode("utf-8", "surrogatepass"))
    folder.mkdir()
    for i in range(FILES):
        with open(folder / f"{i}.jsonl", "w", encoding="utf-8") as file:
            for text in texts[i * len(texts) // FILES : (i + 1) * len(texts) // FILES]:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return texts


def ours(folder, tokenizer, workers):
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        job = build.make_job(str(folder / "texts"), "pretrain", Pretrain(), tokenizer, out)
        began = time.perf_counter()
        shards = build.make_shards([job], tokenizer, workers)[job.folder]
        seconds = time.perf_counter() - began
        return seconds, shards.tokens


def _encode(model, texts, ready, go, done):
    tokenizer = Tokenizer.load(model)
    ready.put(True)
    go.wait()
    done.put(
        sum(
            len(ids)
            for i in range(0, len(texts), 1000)
            for ids in tokenizer.processor.encode(texts[i : i + 1000], num_threads=1)
        )
    )


def alone(folder, model, texts, workers):
    context = multiprocessing.get_context("spawn")
    ready, go, done = context.Queue(), context.Event(), context.Queue()
    processes = [
        context.Process(target=_encode, args=(model, texts[i::workers], ready, go, done)) for i in range(workers)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        ready.get()
    began = time.perf_counter()
    go.set()
    tokens = sum(done.get() for _ in processes)
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return seconds, tokens


HUGGING_FACE = """
import sys, time
from datasets import load_dataset
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])

def encode(batch):
    return {"ids": [encoding.ids for encoding in tokenizer.encode_batch(batch["text"])]}

began = time.perf_counter()
texts = load_dataset("json", data_files=sys.argv[1] + "/texts/*.jsonl", split="train", cache_dir=sys.argv[3])
workers = int(sys.argv[4])
found = texts.map(encode, batched=True, num_proc=workers if workers > 1 else None, remove_columns=["text"])
seconds = time.perf_counter() - began
print(seconds, sum(len(ids) for ids in found["ids"]))
"""


def hugging_face(folder, workers):
    with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": cache,
        }
        command = [sys.executable, "-c", HUGGING_FACE, folder, folder / "tokenizer.json", cache, str(workers)]
        seconds, tokens = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout.split()
        return float(seconds), int(tokens)


def main():
    parser = measured.Parser(__doc__, quick={"megabytes": 2.0, "workers": [1], "rounds": 1})
    parser.add_argument("--source", choices=("docstrings", "catalogues"), default="docstrings")
    parser.add_argument("--megabytes", type=float, default=60.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    result = {
        "commit": measured.commit(),
        "source": arguments.source,
        "machine": measured.processor(),
        "cores": os.cpu_count(),
        "versions": measured.versions("sentencepiece", "datasets", "tokenizers"),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=arguments.out)).resolve()
    try:
        texts = write_texts(folder / "texts", arguments.source, arguments.megabytes * 1e6)
        settings = TokenizerSettings(vocab_size=16_384, train_bytes=8_000_000)
        tokenizer = build.make_tokenizer(settings, [(str(folder / "texts"), "pretrain", None)], folder)
        forms = {
            "ours": lambda n: ours(folder, tokenizer, n),
            "sentencepiece alone": lambda n: alone(folder, folder / Tokenizer.FILE, texts, n),
        }
        if result["versions"]["datasets"] and result["versions"]["tokenizers"]:
            from conan_engine.export.fast_tokenizer import convert

            convert(tokenizer).save(str(folder / "tokenizer.json"))
            forms["datasets.map + tokenizers"] = lambda n: hugging_face(folder, n)
        seconds = {(name, workers): [] for name in forms for workers in arguments.workers}
        for _ in range(arguments.rounds):
            for name, workers in seconds:
                took, tokens = forms[name](workers)
                seconds[name, workers].append(took)
                if name == "ours":
                    result["tokens"] = tokens
        megabytes = sum(path.stat().st_size for path in (folder / "texts").iterdir()) / 1e6
        print(f"{megabytes:.0f} MB of JSON Lines, {len(texts):,} texts, {result['tokens']:,} tokens\n")
        print(f"{'':28}{'processes':>10}{'Mtokens/s':>11}{'MB/s':>7}{'ours is':>10}{'of one process':>16}")
        for (name, workers), took in seconds.items():
            row = {
                "form": name,
                "workers": workers,
                "seconds": took,
                "tokens_per_s": result["tokens"] / statistics.median(took),
                "ours_is_times": statistics.median(b / a for a, b in zip(seconds["ours", workers], took)),
                "of_one_process": statistics.median(b / a for a, b in zip(took, seconds[name, arguments.workers[0]])),
            }
            result.setdefault("rows", []).append(row)
            print(
                f"{name:28}{workers:10}{row['tokens_per_s'] / 1e6:11.2f}{megabytes / statistics.median(took):7.1f}"
                f"{row['ours_is_times']:8.2f} "
                f"x{row['of_one_process']:14.2f} x"
            )
        (arguments.out / "prepare.json").write_text(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
