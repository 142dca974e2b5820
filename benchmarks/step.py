"""How fast is a whole training step? Tokens a second, share of the machine's matrix-product rate and peak memory,
beside transformers.

    python benchmarks/step.py [--config configs/conan-1.4b.toml] [--set --model.layers=2 ...] [--forms ours ...]
        [--profile] [--out runs/benchmarks]

Two steps of the config's model, forward, backward and update: `text`, the next token of 4 texts of 4,096 tokens (stages
1 and 2), and `pairs`, InfoNCE over the Matryoshka dims of 64 queries and their documents, of log-normal lengths, 16 and
128 tokens in the median, 512 at most (stages 3 and 4, bidirectional). The peer is transformers' Llama of the same
shape, as its Trainer has it: float32 weights under bfloat16 autocast, SDPA, fused AdamW; with and without
torch.compile; queries and documents padded to the longest of each. "Share" counts 6 FLOP a weight and real token (the
token table where it is the LM head) and 12 D a head and visible pair of tokens, whatever a form computes beyond them.
Times are medians. Prints a table; writes step.json after every row. --profile: on a GPU also, by torch.profiler, the
kernels of a step of ours, how often each runs and how long.
"""

import argparse
import gc
import json
import statistics
import time

import measured
import torch
import torch.nn.functional as F

from conan_engine.model import losses
from conan_engine.model.transformer import Transformer, count_parameters
from conan_engine.parallel.mesh import Mesh
from conan_engine.parallel.sharded_adamw import ShardedAdamW
from conan_engine.settings import load
from conan_kernels.info_nce.reference import info_nce_reference

LEARNING_RATE, TEMPERATURE = 1e-5, 0.02


class Work:
    """A step's texts: lists of token ids, on the CPU. FLOP counts what is real, not padding."""

    def __init__(self, name, config, vocab, scale):
        generator = torch.Generator().manual_seed(1)
        self.name, self.causal = name, name == "text"
        if self.causal:
            lengths = [4096 // scale] * 4
        else:
            half, most = 64 // scale, 512 // scale
            spread = torch.randn(2 * half, generator=generator).exp()
            lengths = (
                (spread * torch.tensor([16 / scale] * half + [128 / scale] * half))
                .round()
                .clamp(1, most)
                .int()
                .tolist()
            )
        self.lengths, self.tokens = lengths, sum(lengths)
        self.texts = [torch.randint(vocab, (n,), generator=generator, dtype=torch.int32) for n in lengths]
        weights = count_parameters(config, vocab) - (0 if self.causal else vocab * config.width)
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in lengths)
        self.flops = 6 * weights * self.tokens + 12 * config.head * config.heads * config.layers * pairs


def ours(work, config, mesh):
    """One step as train.py takes it."""
    vocab = config.tokenizer.vocab_size
    with torch.device(mesh.device):
        model = Transformer(config.model, vocab, config.precision).init_weights(1)
    bfloat16 = mesh.device.type == "cuda" and model.in_bfloat16()
    optimizer = ShardedAdamW(model, mesh, 1e-3, torch.bfloat16 if bfloat16 else torch.float32)
    tokens = torch.cat(work.texts).to(mesh.device)
    cu_seqlens = F.pad(torch.tensor(work.lengths), (1, 0)).cumsum(0).int().to(mesh.device)
    group = torch.arange(len(work.texts) // 2, device=mesh.device)

    def step():
        optimizer.send_next()
        if work.causal:
            loss = model.next_token_loss(tokens, cu_seqlens, tokens.long().roll(-1)) / len(tokens)
        else:
            queries, documents = model.embed(tokens, cu_seqlens, 1.0).chunk(2)
            loss, _ = losses.info_nce(queries, documents, group, group, TEMPERATURE, mesh.data, dims_of(config))
        loss.backward()
        norm = optimizer.reduce_gradients()
        optimizer.step(LEARNING_RATE, min(1.0, 1.0 / (norm + 1e-6)))
        optimizer.zero_gradients()

    step.close = optimizer.close  # until then its hooks keep it in memory
    return step


def dims_of(config):
    return [dim for dim in config.supervised.dims if dim < config.model.width] + [config.model.width]


def transformers(compiled):
    def form(work, config, mesh):
        from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

        shape, vocab = config.model, config.tokenizer.vocab_size
        theirs = LlamaConfig(
            vocab_size=vocab,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head,
            max_position_embeddings=shape.context,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
            is_causal=work.causal,
        )
        with torch.device(mesh.device):
            model = (LlamaForCausalLM if work.causal else LlamaModel)(theirs)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=1e-3, fused=True
        )
        forward = torch.compile(model) if compiled else model
        texts = torch.nn.utils.rnn.pad_sequence  # [B, L], padding 0
        half = len(work.texts) // 2
        batches = [work.texts] if work.causal else [work.texts[:half], work.texts[half:]]
        inputs = [texts(batch, batch_first=True).long().to(mesh.device) for batch in batches]
        own = [
            (torch.arange(x.shape[1]) < torch.tensor([len(text) for text in batch])[:, None]).to(mesh.device)
            for x, batch in zip(inputs, batches)
        ]
        target = torch.arange(half, device=mesh.device)

        def pooled(x, own):
            hidden = forward(input_ids=x, attention_mask=own.long()).last_hidden_state.float()
            return (hidden * own[..., None]).sum(1) / own.sum(1, keepdim=True)

        def step():
            with torch.autocast(mesh.device.type, torch.bfloat16):
                if work.causal:
                    loss = forward(input_ids=inputs[0], labels=inputs[0]).loss
                else:
                    vectors = [pooled(*one) for one in zip(inputs, own)]
            if not work.causal:
                loss = info_nce_reference(*vectors, target, TEMPERATURE, dims=dims_of(config)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return form


FORMS = {"ours": ours, "transformers": transformers(False), "transformers, compiled": transformers(True)}


def seconds_of(run, device, least=1.5):
    """Median of single runs, after two to warm up."""
    run()
    run()
    found = []
    while len(found) < 3 or (sum(found) < least and len(found) < 50):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def gemm_rate(device):
    """FLOP/s of a large square bfloat16 product (float32 on a CPU): the best of three, which differ by a tenth."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device, 0.5) for _ in range(3))


def main():
    parser = measured.Parser(__doc__, quick={"scale": 16})
    parser.add_argument("--config", default="configs/conan-1.4b.toml")
    parser.add_argument(
        "--set",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="--key=value",
        help="settings over the config's; last on the line",
    )
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--profile", action="store_true", help="also the kernels of a step of ours, on a GPU")
    parser.add_argument("--scale", type=int, default=1, help="divides the lengths and the number of pairs")
    options = parser.parse_args()
    config = load(options.config, options.set)
    mesh = Mesh(config.device)
    options.out.mkdir(parents=True, exist_ok=True)
    gemm, cuda = gemm_rate(mesh.device), mesh.device.type == "cuda"
    machine = measured.machine(mesh.device.type)
    report = {
        "machine": machine,
        "commit": measured.commit(),
        "versions": measured.versions("torch", "triton", "transformers"),
        "gemm_flops": gemm,
        "parameters": count_parameters(config.model, config.tokenizer.vocab_size),
        "rows": [],
    }
    print(f"{machine}: matrix products at {gemm / 1e12:.3g} TFLOP/s; {report['parameters'] / 1e9:.2f}B parameters")
    print(f"{'form':26}{'work':>8}{'tokens':>9}{'ms':>10}{'tokens/s':>11}{'of GEMM rate':>14}{'peak GiB':>10}")
    for form in options.forms:  # ours first: what a peer leaves in the device's memory would count as ours
        for name in ("text", "pairs"):
            work = Work(name, config.model, config.tokenizer.vocab_size, options.scale)
            row, step = {"form": form, "work": name, "tokens": work.tokens}, None
            try:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                step = FORMS[form](work, config, mesh)
                row["seconds"] = seconds_of(step, mesh.device)
                row["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
                if options.profile and cuda and form == "ours":
                    row["kernels"] = measured.kernels_of(step)
            except Exception as error:  # a peer may lack the memory, or a compiler; the row says it
                row["left_out"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
                print(f"{form:26}{name:>8}  left out: {row['left_out']}", flush=True)
            else:
                row |= {"tokens_per_s": work.tokens / row["seconds"], "share": work.flops / row["seconds"] / gemm}
                peak = f"{row['peak_bytes'] / 2**30:10.1f}" if cuda else f"{'-':>10}"
                print(
                    f"{form:26}{name:>8}{work.tokens:9,}{1e3 * row['seconds']:10.1f}"
                    f"{row['tokens_per_s']:11,.0f}{row['share']:14.1%}{peak}",
                    *(
                        f"{1e3 * took:14.3f} ms {calls:6.0f}  {name[:90]}"
                        for name, calls, took in row.get("kernels", [])[:40]
                    ),
                    sep="\n",
                    flush=True,
                )
            getattr(step, "close", lambda: None)()
            step = None  # with it, its model leaves the memory
            report["rows"].append(row)
            (options.out / "step.json").write_text(json.dumps(report, indent=1))
            torch.compiler.reset()
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
    mesh.close()


if __name__ == "__main__":
    main()
