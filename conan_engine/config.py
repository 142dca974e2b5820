"""Every setting and its default, once. Defaults are the paper's (arXiv 2509.12892) where it gives one; "ours" marks
our own decisions. A TOML file overrides them, and `--section.key=value` overrides the file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

STAGES = ("pretrain", "sft", "weak", "supervised")
TABLES = ("data", "sts", "texts")  # of sources, in a stage
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
METRICS = ("loss", "ndcg@10", "recall@20", "spearman")  # of validation


def within(interval: str, default: float) -> Any:
    """A number's default, and the interval that it has to be in, such as "[0, 1)"."""
    return field(default=default, metadata={"range": interval})


@dataclass
class RopeScaling:
    """Slower turns for a longer context, as Llama 3 has them."""

    factor: float = within("(0, 1e6]", 1.0)  # by which the slowest turns are slowed; 1 = none
    # turns of less than this many rounds in the original context are slowed by the factor, ...
    low_freq_factor: float = within("(0, 1e6]", 1.0)
    high_freq_factor: float = within("(0, 1e6]", 4.0)  # ... of more than this many not at all
    original_context: int = within("[1, 2**30]", 8192)


@dataclass
class Model:
    # wide and shallow on purpose: the embedding width of a 7B model at 1.5B parameters
    layers: int = within("[1, 1000]", 8)
    width: int = within("[1, 2**20]", 3584)
    ffn: int = within("[1, 2**22]", 8192)
    heads: int = within("[1, 2**16]", 32)
    kv_heads: int = within("[1, 2**16]", 8)
    context: int = within("[1, 2**30]", 32768)  # tokens
    head_dim: int = within("[0, 2**16]", 0)  # numbers a head; 0 = width / heads
    norm_eps: float = within("(0, 1]", 1e-6)
    qk_norm: bool = False  # an RMSNorm for each head's queries and keys, as in Qwen3
    rope_theta: float = within("[1, 1e15]", 1e6)  # ours: the usual base for a 32k context
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    vocab_size: int = within("[0, 2**24]", 0)  # rows of the token table; 0 = as many as the tokenizer has tokens
    # the LM head is the token table; false: a matrix of its own, which the contrastive stages do without
    tied: bool = True
    # ours: token vectors times this enter the first block; the LM head takes them as they are
    embedding_scale: float = within("(0, 1e9]", 1.0)
    pooling: str = "mean"  # "mean" over the sequence's own tokens, or "last" token (ours)

    @property
    def head(self) -> int:
        """Numbers a head, D."""
        return self.head_dim or self.width // self.heads


@dataclass
class Tokenizer:
    # an existing .model file or tokenizer.json; empty: that of init_from, or train one from the stages' data
    path: str = ""
    vocab_size: int = within("[1, 2**24]", 150_000)
    processes: int = within("[0, 1024]", 0)  # that make token shards, on rank 0's machine; 0 = one a CPU core
    # ours: at most this much text, evenly sampled (the paper: about 400k texts)
    train_bytes: int = within("[1, 1e15]", 2_000_000_000)


@dataclass
class Source:
    """What a stage's table of data says of one source: a number, its weight, or a table of these."""

    weight: float = 1.0
    # our key -> the file's, where it is not ours: query = "title"
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    in_batch_negatives: bool = True  # false: its queries are told apart from their own hard negatives only (supervised)
    hard_negatives: int = -1  # in use a query; -1: negatives.count (supervised)
    # false: what a teacher says of its queries does not count, as of a language that the teacher does not know
    # (supervised)
    distil: bool = True

    def count(self, negatives: Negatives) -> int:
        """Hard negatives in use a query; negatives: the config's Negatives."""
        return negatives.count if self.hard_negatives == -1 else self.hard_negatives


@dataclass
class Stage:
    """What all four stages share."""

    # source -> weight, or a table; steps are shared out in proportion ...
    data: dict[str, Source] = field(default_factory=dict)
    # ours: ... to weight * records ** size_power: 0 by weight alone, 1 by size, between is a temperature
    size_power: float = within("[0, 2]", 0.0)
    steps: int = within("[0, 2**31)", 0)
    # rows of max_tokens tokens (LM) or queries (contrastive) a step, over all ranks
    batch: int = within("[1, 2**31)", 64)
    # rows or sequences computed at a time on one rank; 0 = all at once. Same result, less memory
    chunk: int = within("[0, 2**31)", 0)
    max_tokens: int = within("[1, 2**30]", 512)  # a longer text is cut (contrastive) or split (pretrain)
    lr: float = within("[0, 1]", 1e-4)
    warmup: float = within("[0, 1]", 0.05)  # share of the steps
    final_lr: float = within("[0, 1]", 0.1)  # ours: linear decay to this share of lr
    weight_decay: float = within("[0, 10]", 1e-3)
    clip: float = within("(0, 1e9]", 1.0)  # ours: gradient norm
    # ours: what the stage changed is kept to this share at its end, the rest of the weights is as it began (WiSE-FT,
    # arXiv 2109.01903)
    blend: float = within("(0, 1]", 1.0)


@dataclass
class Pretrain(Stage):
    batch: int = 256
    max_tokens: int = 32768
    # ours: above 0, this share of the tokens is hidden and predicted, bidirectional (masked next token: LLM2Vec, arXiv
    # 2404.05961)
    masked: float = within("[0, 1)", 0.0)


@dataclass
class Sft(Stage):
    lr: float = 2e-5
    warmup: float = 0.02
    max_tokens: int = 32768


@dataclass
class Weak(Stage):
    # above 0: as many queries a step as so many tokens hold, all ranks together, instead of `batch`
    batch_tokens: int = within("[0, 2**31)", 0)
    temperature: float = within("[1e-3, 100]", 0.02)  # ours: the paper writes none
    # how the soft mask opens: "linear" (best in the paper), "accelerating", "decelerating"; or not at all: "open",
    # "closed"
    alpha: str = "linear"
    mask: str = "column"  # which future weights open first: "column", "row", "uniform" (recipe: soft mask)
    # ours: Matryoshka from this stage on; none: the whole vector alone, as in the paper
    dims: list[int] = field(default_factory=list)
    # ours: a document whose cosine is above the positive's by more than this is no negative (Qwen3-Embedding,
    # GISTEmbed); 2: each is one
    margin: float = within("[-2, 2]", 2.0)
    margin_strategy: str = "absolute"  # that is a cosine, or "relative", a share of the positive's
    symmetric: bool = False  # ours: a document also finds its query, the mean of both ways
    # ours: other queries are negatives of a query, too, and with symmetric other documents of a document (GTE, arXiv
    # 2308.03281)
    same_side: bool = False
    # who scores pairs: "module:function", "sentence-transformers:FOLDER", "cross-encoder:FOLDER"; empty: the data's own
    # "score" column
    teacher: str = ""
    min_score: float = within("[-1e9, 1e9]", 0.4)  # pairs that the teacher scores below this are dropped
    # ours: "cosine", a teacher's vectors are targets of `texts`: of each of the model's vectors, as many numbers as the
    # teacher's have
    distil: str = ""
    distil_teacher: str = ""  # who has them: "sentence-transformers:FOLDER" or "module:object"; empty: teacher
    distil_weight: float = within("[0, 1e6]", 1.0)  # L = L_InfoNCE + distil_weight * (1 - cosine)
    texts: dict[str, Source] = field(default_factory=dict)  # sources of texts without pairs, for distil
    texts_batch: int = within("[1, 2**31)", 64)  # a step, over all ranks


@dataclass
class Supervised(Stage):
    batch: int = 4
    temperature: float = within("[1e-3, 100]", 0.02)  # ours
    dims: list[int] = field(default_factory=lambda: [256, 512, 1024, 1536, 2048, 3072, 3584])  # Matryoshka
    margin: float = within("[-2, 2]", 2.0)  # as weak.margin; hard negatives, too
    margin_strategy: str = "absolute"
    symmetric: bool = False  # as weak.symmetric, and weak.same_side
    same_side: bool = False
    sts: dict[str, Source] = field(default_factory=dict)  # sources of scored sentence pairs
    sts_batch: int = within("[1, 2**31)", 32)
    sts_temperature: float = within("[1e-3, 100]", 0.05)  # the usual CoSENT scale of 20
    beta: float = within("[0, 1e3]", 0.8)  # L = L_InfoNCE + beta * L_CoSENT (Conan-embedding-v1)
    # ours: a teacher's scores of a query's positive and hard negatives are targets: "kl", by their softmax;
    # "margin_mse", by the positive's lead (arXiv 2010.02666)
    distil: str = ""
    distil_weight: float = within("[0, 1e6]", 1.0)  # L = L_InfoNCE + beta * L_CoSENT + distil_weight * L_distil
    # the teacher's score over this is what the model's cosine over `temperature` is to be: the same for cosines, 1 for
    # logits
    distil_temperature: float = within("[1e-3, 1e3]", 0.02)
    teacher: str = ""  # who gives them, as weak.teacher; empty: the records' own pos_scores and neg_scores
    # ours: both in each step, as in the paper, or "alternating", CoSENT alone in every other one
    balance: str = "together"


@dataclass
class Lora:
    # of the adapters that are trained in place of the weights of init_from; 0 = the weights themselves
    rank: int = within("[0, 2**16]", 0)
    alpha: float = within("(0, 1e6]", 32.0)  # ours: what the adapters add is multiplied by alpha / rank
    # the matrices of a block that have one
    targets: list[str] = field(default_factory=lambda: ["qkv", "attention_out", "gate_up", "ffn_out"])


@dataclass
class Negatives:
    count: int = within("[0, 2**15)", 7)  # hard negatives in use a query
    pool: int = within("[0, 2**15)", 32)  # ours: candidates mined a query, best first
    # ours: "Flat", exact; or a faiss index factory string ("IVF4096,SQfp16"); or "random": no search, any documents
    index: str = "Flat"
    search: str = ""  # ours: how the index is searched, in faiss' words ("nprobe=32")
    dim: int = within("[0, 2**20]", 0)  # ours: the first numbers of the vectors that are compared; 0 = all
    # ours: a candidate is a false negative if its cosine is above the positive's less 1 - this share of it
    max_ratio: float = within("[0, 10]", 0.95)
    # what low and bound are: cosines, or "quantile" (ours), the share of the negatives mined first whose cosine is
    # lower
    bounds: str = "cosine"
    low: float = within("[-2, 2]", 0.4)  # dynamic replacement: replace if S_0 < low, or ...
    factor: float = within("[0, 1e3]", 1.2)  # ... if factor * S_i < S_0 and S_i < bound
    bound: float = within("[-2, 2]", 0.7)


@dataclass
class Validation:
    # source -> weight, of records that no stage trains on; each stage takes those of its kind
    data: dict[str, Source] = field(default_factory=dict)
    every: int = within("[1, 2**31)", 500)  # steps; and after a stage's last one
    records: int = within("[1, 2**31)", 1000)  # ours: of a source, at most; always the same ones
    # by which a checkpoint is the best, where the stage has it (pretrain and sft: the loss): "loss", "recall@20",
    # "spearman"
    metric: str = "ndcg@10"
    keep_best: bool = False  # keep each stage's best checkpoint beside the newest


@dataclass
class Config:
    out_dir: str = "runs/demo"  # the run: checkpoints, shards, metrics
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    # who else shows the run, of those installed: "tensorboard", "wandb", "mlflow", "trackio" (follow.py)
    log_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    # a run whose newest weights to start from, a folder of transformers or a .gguf file; it brings [model] and
    # tokenizer. Empty: random weights
    init_from: str = ""
    # of init_from: "first:8", or a list of layers, counted from 0, in the order in which they are to stand. Empty: all
    init_layers: str | list[int] = ""
    token_vectors: str = "spelling"  # ours: how a new token table starts: tokens spelled alike are alike; or "random"
    # ours: a token weighs in the mean as much as it is rare in the data, to begin with; or "equal"
    token_weights: str = "rarity"
    seed: int = within("[0, 2**31)", 1)
    device: str = "auto"  # "cuda" where there is one, else "cpu"
    # ranks that share one copy of the model; neighbours, so that they are on one machine
    tensor_parallel: int = within("[1, 1024]", 1)
    # seconds: a rank that gives no sign of life for so long, or keeps the others waiting, ends the run
    timeout: int = within("[1, 1e7]", 600)
    # "block": the backward computes each block anew, a third more work for a fraction of the memory
    recompute: str = "none"
    # of matrix products: "bfloat16", "float32", or what the device multiplies faster, as is measured
    precision: str = "auto"
    plan_only: bool = False  # print the model's size and the memory a device needs, then stop
    save_every: int = within("[1, 2**31)", 1000)  # steps between checkpoints
    keep: int = within("[1, 1e6]", 2)  # checkpoints kept a stage; the newest is never the only one
    loader_threads: int = within("[1, 256]", 2)  # that read and pack batches ahead of the step, on each rank
    # leave out what is wrong in a file or damaged in a shard, say so and count it, instead of stopping
    skip_bad_records: bool = False
    # of a source's records, left out while reading; above it the run stops
    max_bad_share: float = within("[0, 1)", 0.01)
    max_skips: int = within("[1, 1e6]", 10)  # non-finite steps in a row before the run stops
    model: Model = field(default_factory=Model)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    lora: Lora = field(default_factory=Lora)
    pretrain: Pretrain = field(default_factory=Pretrain)
    sft: Sft = field(default_factory=Sft)
    weak: Weak = field(default_factory=Weak)
    supervised: Supervised = field(default_factory=Supervised)
    negatives: Negatives = field(default_factory=Negatives)
    validation: Validation = field(default_factory=Validation)


def chosen_layers(init_layers: str | list[int]) -> list[int] | None:
    """The layers that init_layers names ("first:8", or a list of numbers from 0 on), as a list; None: all. Raises
    ValueError for others."""
    if isinstance(init_layers, str) and init_layers:
        count = re.fullmatch(r"first:([1-9]\d*)", init_layers)
        if not count:
            raise ValueError(init_layers)
        return list(range(int(count[1])))
    if init_layers and min(init_layers) < 0:
        raise ValueError(init_layers)
    return init_layers or None
