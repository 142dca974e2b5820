"""How fast are a run's vectors made, and how large is what makes them? Ours beside every exported form, on the same
texts and cores.

    python benchmarks/inference.py RUN [--texts 2000] [--rounds 3] [--out runs/benchmarks]

The texts are docstrings that the demo holds out. In every round each form encodes all of them once, in batches of its
own default size; of the rounds the median counts. The cosine is the lowest with ours. llama.cpp takes part where
`make check-gguf` has built it. Prints a table; writes inference.json.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import measured
import numpy as np
import onnxruntime
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from conan_engine.evaluation.encoder import Encoder
from conan_engine.evaluation.tasks import docs_search, held_out_docs
from conan_engine.export import gguf, onnx, sentence_transformers

BATCH = 32  # sentence-transformers' own; onnxruntime has none


def by_sentence_transformers(folder, run, dtype):
    sentence_transformers.write(folder, run, Encoder.load(run), dtype)
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
    return lambda texts: model.encode(texts, batch_size=BATCH, show_progress_bar=False).astype(np.float32)


def by_onnx(folder, run, _):
    encoder = Encoder.load(run)
    onnx.write(folder, run, encoder, "float32")
    tokenizer, options = Tokenizer.from_file(str(folder / "tokenizer.json")), onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    tokenizer.enable_truncation(encoder.max_tokens)
    tokenizer.enable_padding()

    def encode(texts):
        order = np.argsort([len(text) for text in texts], kind="stable")
        out = np.empty((len(texts), encoder.model.config.width), np.float32)
        for rows in np.array_split(order, -(-len(texts) // BATCH)):
            found = tokenizer.encode_batch_fast([texts[i] for i in rows])
            ids, mask = np.array([row.ids for row in found]), np.array([row.attention_mask for row in found])
            (out[rows],) = session.run(None, {"input_ids": ids, "attention_mask": mask})
        return out

    return encode


def by_llama_cpp(folder, run, dtype):
    from llama_cpp import Llama

    encoder = Encoder.load(run)
    gguf.write(folder, run, encoder, dtype)
    context = max(512, encoder.max_tokens)
    threads = torch.get_num_threads()
    model = Llama(
        str(next(folder.iterdir())),
        embedding=True,
        n_ctx=context,
        n_batch=context,
        n_ubatch=context,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def encode(texts):
        # as tokens, cut as ours are; it packs as many texts into a batch as fit
        found = np.array(model.embed([cut(text) for text in texts]), np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def cut(text):
        ids = encoder.tokenizer.encode(text)
        return text if len(ids) <= encoder.max_tokens else encoder.tokenizer.decode(ids[: encoder.max_tokens])

    return encode


FORMS = {
    "sentence-transformers, float32": (by_sentence_transformers, "float32"),
    "sentence-transformers, bfloat16": (by_sentence_transformers, "bfloat16"),
    "onnxruntime, float32": (by_onnx, "float32"),
    "llama.cpp, f32": (by_llama_cpp, "float32"),
    "llama.cpp, f16": (by_llama_cpp, "float16"),
    "llama.cpp, q8_0": (by_llama_cpp, "q8_0"),
}


def size(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def main():
    parser = measured.Parser(__doc__, quick={"texts": 200, "rounds": 1})
    parser.add_argument("run")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    texts = docs_search(held_out_docs()).documents[: options.texts]
    ours = Encoder.load(options.run)
    forms = {"ours, float32": (ours.encode, 4 * sum(p.numel() for p in ours.model.parameters()))}
    with tempfile.TemporaryDirectory() as temporary:
        for name, (make, dtype) in FORMS.items():
            folder = Path(temporary, name)
            folder.mkdir()
            try:
                forms[name] = make(folder, options.run, dtype), size(folder)
            except ImportError as error:
                print(f"{name}: left out ({error})")
        expected = ours.encode(texts)
        # and they are warm
        cosine = {name: float((encode(texts) * expected).sum(1).min()) for name, (encode, _) in forms.items()}
        seconds = {name: [] for name in forms}
        for _ in range(options.rounds):
            for name, (encode, _) in forms.items():
                started = time.perf_counter()
                encode(texts)
                seconds[name].append(time.perf_counter() - started)
    rows = [
        {
            "form": name,
            "bytes": bytes,
            "texts_per_second": len(texts) / statistics.median(seconds[name]),
            "lowest_cosine": cosine[name],
            "seconds": seconds[name],
        }
        for name, (_, bytes) in forms.items()
    ]
    print(f"{len(texts):,} texts, {torch.get_num_threads()} threads")
    for row in rows:
        print(
            f"{row['form']:34}{row['bytes'] / 1e6:8.1f} MB{row['texts_per_second']:9,.0f} texts/s  cosine "
            f"{row['lowest_cosine']:.6f}"
        )
    commit = measured.commit()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "inference.json"
    path.write_text(
        json.dumps(
            {
                "texts": len(texts),
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "commit": commit,
                "rows": rows,
            },
            indent=1,
        )
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
