"""Every setting with its default, in one place.

A default is the paper's (arXiv 2509.12892) where the paper gives one; "ours" marks our own choice. A TOML file
overrides the defaults, and `--section.key=value` on the command line overrides the file. The comment of a setting is
what --help and docs/settings.md show.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

STAGES = ("pretrain", "sft", "weak", "supervised")
TABLES = ("data", "sts", "texts")  # the keys of a stage that hold a table of sources
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
METRICS = ("loss", "ndcg@10", "recall@20", "spearman")  # that validation can report


def within(interval: str, default: float) -> Any:
    """Declare a number: its default, and the interval that its value must lie in, such as "[0, 1)"."""
    return field(default=default, metadata={"range": interval})


@dataclass
class RopeScaling:
    """Slower rotary positions for a longer context, as in Llama 3."""

    factor: float = within("(0, 1e6]", 1.0)  # how much the slowest rotations are slowed down; 1 = no scaling
    # rotations with fewer turns than this over the original context are slowed down by the full factor
    low_freq_factor: float = within("(0, 1e6]", 1.0)
    high_freq_factor: float = within("(0, 1e6]", 4.0)  # rotations with more turns than this keep their speed
    original_context: int = within("[1, 2**30]", 8192)  # tokens of context that the model was trained with first


@dataclass
class Model:
    """The shape of the transformer."""

    # transformer blocks; few and wide on purpose: the embedding width of a 7B model at 1.5B parameters
    layers: int = within("[1, 1000]", 8)
    width: int = within("[1, 2**20]", 3584)  # numbers of a token's vector, and of an embedding
    ffn: int = within("[1, 2**22]", 8192)  # width of the feed-forward layer
    heads: int = within("[1, 2**16]", 32)  # query heads
    kv_heads: int = within("[1, 2**16]", 8)  # key and value heads; several query heads share one (GQA)
    context: int = within("[1, 2**30]", 32768)  # longest sequence, in tokens
    head_dim: int = within("[0, 2**16]", 0)  # numbers of a head; 0 = width / heads
    norm_eps: float = within("(0, 1]", 1e-6)  # added to the mean square in each RMSNorm
    qk_norm: bool = False  # an RMSNorm on each head's queries and keys, as in Qwen3
    rope_theta: float = within("[1, 1e15]", 1e6)  # base of the rotary positions; ours: the usual one for 32k tokens
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    vocab_size: int = within("[0, 2**24]", 0)  # rows of the token table; 0 = as many as the tokenizer has tokens
    # the LM head shares the token table; false: it has its own matrix, which the contrastive stages leave out
    tied: bool = True
    # ours: multiplies the token vectors where they enter the first block; the LM head uses them unscaled
    embedding_scale: float = within("(0, 1e9]", 1.0)
    pooling: str = "mean"  # how a sequence becomes one vector: "mean" of its tokens, or its "last" token (ours)

    @property
    def head(self) -> int:
        """Numbers of a head, D."""
        return self.head_dim or self.width // self.heads


@dataclass
class Tokenizer:
    """The tokenizer, and the processes that turn text into token shards."""

    # an existing .model file or tokenizer.json; empty: the tokenizer of init_from, or a new one trained on the data
    path: str = ""
    vocab_size: int = within("[1, 2**24]", 150_000)  # tokens of a newly trained tokenizer
    processes: int = within("[0, 1024]", 0)  # processes that write token shards on rank 0's machine; 0 = one per core
    # ours: a new tokenizer is trained on at most this many bytes of text, sampled evenly (the paper: about 400k texts)
    train_bytes: int = within("[1, 1e15]", 2_000_000_000)


@dataclass
class Source:
    """What a stage's table of data says about one source: a number, which is its weight, or a table of these keys."""

    weight: float = 1.0  # share of the steps, relative to the other sources
    # which column holds what, where the file uses other names: query = "title"
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    # false: a query of this source is compared with its own hard negatives only, not with the batch (supervised)
    in_batch_negatives: bool = True
    hard_negatives: int = -1  # hard negatives in use per query; -1 = negatives.count (supervised)
    distil: bool = True  # false: ignore the teacher for this source, for example in a language it does not know

    def count(self, negatives: Negatives) -> int:
        """Hard negatives in use per query; negatives: the config's Negatives."""
        return negatives.count if self.hard_negatives == -1 else self.hard_negatives


@dataclass
class Stage:
    """What all four stages share; STAGE stands for pretrain, sft, weak or supervised."""

    # the sources: file, folder, pattern or name = weight, or a table of settings of the source
    data: dict[str, Source] = field(default_factory=dict)
    # ours: a source's share of the steps is weight * records ** size_power: 0 = by weight alone, 1 = by size
    size_power: float = within("[0, 2]", 0.0)
    steps: int = within("[0, 2**31)", 0)  # optimizer steps
    # per step, over all ranks: rows of max_tokens tokens (pretrain, sft), or queries (weak, supervised)
    batch: int = within("[1, 2**31)", 64)
    # rows or sequences that a rank computes at a time; 0 = all at once. The same result in less memory
    chunk: int = within("[0, 2**31)", 0)
    # tokens that a rank computes at a time, in place of chunk: texts of similar length together, a longer text alone;
    # 0 = no limit
    chunk_tokens: int = within("[0, 2**31)", 0)
    max_tokens: int = within("[1, 2**30]", 512)  # a longer text is split (pretrain, sft) or cut (weak, supervised)
    lr: float = within("[0, 1]", 1e-4)  # peak learning rate
    warmup: float = within("[0, 1]", 0.05)  # share of the steps in which the learning rate rises to lr
    final_lr: float = within("[0, 1]", 0.1)  # ours: the learning rate then falls linearly to this share of lr
    weight_decay: float = within("[0, 10]", 1e-3)  # of AdamW
    clip: float = within("(0, 1e9]", 1.0)  # ours: the gradient's norm is clipped to this
    # ours: at the stage's end, the weights move this share of the way from its start to its end (WiSE-FT, arXiv
    # 2109.01903)
    blend: float = within("(0, 1]", 1.0)


@dataclass
class Pretrain(Stage):
    """Stage 1: next-token prediction on plain text, causal."""

    batch: int = 256
    max_tokens: int = 32768
    # ours: above 0, this share of the tokens is hidden and predicted with bidirectional attention (masked next token,
    # LLM2Vec, arXiv 2404.05961)
    masked: float = within("[0, 1)", 0.0)


@dataclass
class Sft(Stage):
    """Stage 2: next-token prediction of the answers to instructions, causal."""

    lr: float = 2e-5
    warmup: float = 0.02
    max_tokens: int = 32768


@dataclass
class Weak(Stage):
    """Stage 3: InfoNCE with in-batch negatives on many pairs, while the soft mask opens."""

    # above 0: as many queries a step as fit into this many tokens, over all ranks, instead of `batch`
    batch_tokens: int = within("[0, 2**31)", 0)
    temperature: float = within("[1e-3, 100]", 0.02)  # of InfoNCE; ours: the paper gives none
    # how the soft mask opens over the stage: "linear" (best in the paper), "accelerating" or "decelerating"; "open" or
    # "closed" all the time
    alpha: str = "linear"
    mask: str = "column"  # which future weights open first: "column", "row" or "uniform" (docs/recipe.md)
    # ours: Matryoshka dims that are trained from this stage on; empty: the whole vector alone, as in the paper
    dims: list[int] = field(default_factory=list)
    # ours: a document whose cosine is this much above the positive's counts as a false negative and is left out
    # (Qwen3-Embedding, GISTEmbed); 2 = none is
    margin: float = within("[-2, 2]", 2.0)
    margin_strategy: str = "absolute"  # the margin is a cosine ("absolute") or a share of the positive's ("relative")
    symmetric: bool = False  # ours: each document also looks for its query; the loss is the mean of both directions
    # ours: the other queries are negatives of a query too; with symmetric, the other documents of a document (GTE,
    # arXiv 2308.03281)
    same_side: bool = False
    # who scores the pairs: "module:function", "sentence-transformers:FOLDER" or "cross-encoder:FOLDER"; empty: the
    # data's own "score" column
    teacher: str = ""
    min_score: float = within("[-1e9, 1e9]", 0.4)  # pairs with a lower score are left out
    # ours: "cosine": the model's vectors of `texts` learn to point where a teacher's vectors point
    distil: str = ""
    distil_teacher: str = ""  # whose vectors: "sentence-transformers:FOLDER" or "module:object"; empty: teacher
    distil_weight: float = within("[0, 1e6]", 1.0)  # L = L_InfoNCE + distil_weight * (1 - cosine)
    texts: dict[str, Source] = field(default_factory=dict)  # sources of texts without pairs, for distil
    texts_batch: int = within("[1, 2**31)", 64)  # of these texts, per step, over all ranks


@dataclass
class Supervised(Stage):
    """Stage 4: InfoNCE with hard negatives and CoSENT on scored pairs, over all Matryoshka dims, bidirectional."""

    batch: int = 4
    temperature: float = within("[1e-3, 100]", 0.02)  # of InfoNCE; ours
    # Matryoshka dims: the loss is the mean over the first so many numbers of a vector
    dims: list[int] = field(default_factory=lambda: [256, 512, 1024, 1536, 2048, 3072, 3584])
    margin: float = within("[-2, 2]", 2.0)  # as weak.margin; applies to hard negatives too
    margin_strategy: str = "absolute"  # as weak.margin_strategy
    symmetric: bool = False  # as weak.symmetric
    same_side: bool = False  # as weak.same_side
    sts: dict[str, Source] = field(default_factory=dict)  # sources of scored sentence pairs, for CoSENT
    sts_batch: int = within("[1, 2**31)", 32)  # of these pairs, per step, over all ranks
    sts_temperature: float = within("[1e-3, 100]", 0.05)  # of CoSENT: its usual scale of 20
    beta: float = within("[0, 1e3]", 0.8)  # L = L_InfoNCE + beta * L_CoSENT (Conan-embedding-v1)
    # ours: learn a teacher's scores of a query's positive and hard negatives: "kl" (their softmax) or "margin_mse"
    # (the positive's lead, arXiv 2010.02666)
    distil: str = ""
    distil_weight: float = within("[0, 1e6]", 1.0)  # L = L_InfoNCE + beta * L_CoSENT + distil_weight * L_distil
    # cosine / temperature learns score / distil_temperature: the same value for a teacher that gives cosines, 1 for
    # logits
    distil_temperature: float = within("[1e-3, 1e3]", 0.02)
    teacher: str = ""  # who gives these scores, as weak.teacher; empty: the records' pos_scores and neg_scores
    # "together": both losses in each step, as in the paper; "alternating" (ours): CoSENT alone in every other step
    balance: str = "together"


@dataclass
class Lora:
    """Adapters (LoRA) that are trained in place of the weights of init_from."""

    rank: int = within("[0, 2**16]", 0)  # of the adapters; 0 = train the weights themselves
    alpha: float = within("(0, 1e6]", 32.0)  # ours: what the adapters add is multiplied by alpha / rank
    # the matrices of a block that get an adapter
    targets: list[str] = field(default_factory=lambda: ["qkv", "attention_out", "gate_up", "ffn_out"])


@dataclass
class Negatives:
    """Hard negatives of the supervised stage: how they are mined, and when they are replaced."""

    count: int = within("[0, 2**15)", 7)  # hard negatives in use per query
    pool: int = within("[0, 2**15)", 32)  # ours: candidates mined per query, best first
    # ours: "Flat" (exact search), a faiss index factory string ("IVF4096,SQfp16"), or "random" (any documents)
    index: str = "Flat"
    search: str = ""  # ours: search parameters of the index, as faiss writes them ("nprobe=32")
    dim: int = within("[0, 2**20]", 0)  # ours: compare the first so many numbers of a vector; 0 = all
    # ours: a candidate is a false negative if its cosine is above the positive's less 1 - this share of it
    max_ratio: float = within("[0, 10]", 0.95)
    # what low and bound are: cosines, or "quantile" (ours): the share of the first mined negatives with a lower cosine
    bounds: str = "cosine"
    low: float = within("[-2, 2]", 0.4)  # a negative is replaced if its first score S_0 < low, or ...
    factor: float = within("[0, 1e3]", 1.2)  # ... if factor * S_i < S_0 and S_i < bound, S_i its present score
    bound: float = within("[-2, 2]", 0.7)  # see factor


@dataclass
class Validation:
    """Held-out records that are scored while the run trains."""

    # sources of records that no stage trains on; each stage takes those of its kind
    data: dict[str, Source] = field(default_factory=dict)
    every: int = within("[1, 2**31)", 500)  # steps between validations; the last step of a stage has one too
    records: int = within("[1, 2**31)", 1000)  # ours: at most so many per source, the same ones each time
    # which number chooses the best checkpoint: "ndcg@10", "recall@20", "spearman" or "loss"; a stage that has no such
    # number (pretrain, sft) takes the loss
    metric: str = "ndcg@10"
    keep_best: bool = False  # keep each stage's best checkpoint beside the newest


@dataclass
class Plan:
    """What --plan_only=true plans for; nothing of it changes a run."""

    device: str = ""  # a GPU, such as "h200", whose time and memory are predicted; empty: this machine's
    gpus: int = within("[0, 2**20]", 0)  # how many; 0 = as many as there are ranks
    machine: int = within("[1, 2**16]", 8)  # GPUs of a machine
    # GB/s each way of a GPU: to the others of its machine, and to other machines; empty: the device's own, and 50
    links: list[float] = field(default_factory=list)
    # mean tokens of a text in each of `stages`; empty: of the token shards in out_dir, or else max_tokens
    tokens: list[int] = field(default_factory=list)


@dataclass
class Config:
    """The run as a whole."""

    out_dir: str = "runs/demo"  # the run's folder: checkpoints, token shards, metrics
    stages: list[str] = field(default_factory=lambda: list(STAGES))  # the stages to train, in this order
    # who else shows the run: "tensorboard", "wandb", "mlflow", "trackio"; those that are installed (docs/watching.md)
    log_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    # where the weights come from: a run, a folder saved by transformers, or a .gguf file, with its [model] and its
    # tokenizer; empty: random weights
    init_from: str = ""
    # which layers of init_from: "first:8", or a list of layer numbers from 0 on, in their new order; empty: all
    init_layers: str | list[int] = ""
    # ours: even out the directions of init_from's last hidden states, for weak and supervised: divide each by this
    # power of its mean square. 0 = leave them, 0.5 = all alike
    init_whiten: float = within("[0, 1]", 0.0)
    token_vectors: str = "spelling"  # ours: a new token table starts with similar spellings alike; or "random"
    token_weights: str = "rarity"  # ours: rare tokens start with a larger weight in the mean; or "equal"
    seed: int = within("[0, 2**31)", 1)  # of all random numbers
    device: str = "auto"  # "cuda" or "cpu"; "auto" = CUDA where there is a GPU
    tensor_parallel: int = within("[1, 1024]", 1)  # ranks that share one copy of the model; neighbours on one machine
    # seconds without a sign of life from a rank, or in a collective, after which the run ends
    timeout: int = within("[1, 1e7]", 600)
    # "block": compute each block again in the backward pass; a third more work for much less memory
    recompute: str = "none"
    # of matrix products: "bfloat16", "float32", or "auto": whichever the device multiplies faster, measured at the
    # start
    precision: str = "auto"
    plan_only: bool = False  # print the memory that a device needs and, for a GPU, the time of each stage; then stop
    save_every: int = within("[1, 2**31)", 1000)  # steps between checkpoints
    keep: int = within("[1, 1e6]", 2)  # checkpoints to keep per stage
    loader_threads: int = within("[1, 256]", 2)  # threads per rank that read and pack batches ahead of the step
    # leave out bad records of a file and damaged records of a shard, and report their count, instead of stopping
    skip_bad_records: bool = False
    max_bad_share: float = within("[0, 1)", 0.01)  # stop if more than this share of a source's records is bad
    max_skips: int = within("[1, 1e6]", 10)  # stop after so many steps in a row whose gradient is not finite
    model: Model = field(default_factory=Model)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    lora: Lora = field(default_factory=Lora)
    pretrain: Pretrain = field(default_factory=Pretrain)
    sft: Sft = field(default_factory=Sft)
    weak: Weak = field(default_factory=Weak)
    supervised: Supervised = field(default_factory=Supervised)
    negatives: Negatives = field(default_factory=Negatives)
    validation: Validation = field(default_factory=Validation)
    plan: Plan = field(default_factory=Plan)


def chosen_layers(init_layers: str | list[int]) -> list[int] | None:
    """The layers that init_layers names ("first:8", or a list of numbers from 0 on) as a list; None means all.

    Raises ValueError for anything else.
    """
    if isinstance(init_layers, str) and init_layers:
        count = re.fullmatch(r"first:([1-9]\d*)", init_layers)
        if not count:
            raise ValueError(init_layers)
        return list(range(int(count[1])))
    if init_layers and min(init_layers) < 0:
        raise ValueError(init_layers)
    return init_layers or None
