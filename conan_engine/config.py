"""Every setting and its default, once. Defaults are the paper's (arXiv 2509.12892) where it gives one; "ours" marks
our own decisions. A TOML file overrides them, and `--section.key=value` overrides the file."""

import dataclasses
import difflib
import inspect
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from conan_engine.model import pretrained
from conan_engine.data.sources.forms import COLUMNS, LISTS, kind_of
from conan_engine.errors import UserError

STAGES = ("pretrain", "sft", "weak", "supervised")
TABLES = ("data", "sts", "texts")  # of sources, in a stage
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
METRICS = ("loss", "ndcg@10", "recall@20", "spearman")  # of validation


def within(interval, default):
    """A number's default, and the interval that it has to be in, such as "[0, 1)"."""
    return field(default=default, metadata={"range": interval})


@dataclass
class RopeScaling:
    """Slower turns for a longer context, as Llama 3 has them."""

    factor: float = within("(0, 1e6]", 1.0)  # by which the slowest turns are slowed; 1 = none
    low_freq_factor: float = within("(0, 1e6]", 1.0)  # turns of less than this many rounds in the original context are slowed by the factor, ...
    high_freq_factor: float = within("(0, 1e6]", 4.0)  # ... of more than this many not at all
    original_context: int = within("[1, 2**30]", 8192)


@dataclass
class Model:
    layers: int = within("[1, 1000]", 8)  # wide and shallow on purpose: the embedding width of a 7B model at 1.5B parameters
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
    tied: bool = True  # the LM head is the token table; false: a matrix of its own, which the contrastive stages do without
    embedding_scale: float = within("(0, 1e9]", 1.0)  # ours: token vectors times this enter the first block; the LM head takes them as they are
    pooling: str = "mean"  # "mean" over the sequence's own tokens, or "last" token (ours)

    @property
    def head(self):
        """Numbers a head, D."""
        return self.head_dim or self.width // self.heads


@dataclass
class Tokenizer:
    path: str = ""  # an existing .model file or tokenizer.json; empty: that of init_from, or train one from the stages' data
    vocab_size: int = within("[1, 2**24]", 150_000)
    processes: int = within("[0, 1024]", 0)  # that make token shards, on rank 0's machine; 0 = one a CPU core
    train_bytes: int = within("[1, 1e15]", 2_000_000_000)  # ours: at most this much text, evenly sampled (the paper: about 400k texts)


@dataclass
class Source:
    """What a stage's table of data says of one source: a number, its weight, or a table of these."""

    weight: float = 1.0
    columns: dict[str, str | list[str]] = field(default_factory=dict)  # our key -> the file's, where it is not ours: query = "title"
    in_batch_negatives: bool = True  # false: its queries are told apart from their own hard negatives only (supervised)
    hard_negatives: int = -1  # in use a query; -1: negatives.count (supervised)
    distil: bool = True  # false: what a teacher says of its queries does not count, as of a language that the teacher does not know (supervised)

    def count(self, negatives):
        """Hard negatives in use a query; negatives: the config's Negatives."""
        return negatives.count if self.hard_negatives == -1 else self.hard_negatives


@dataclass
class Stage:
    """What all four stages share."""

    data: dict[str, Source] = field(default_factory=dict)  # source -> weight, or a table; steps are shared out in proportion ...
    size_power: float = within("[0, 2]", 0.0)  # ours: ... to weight * records ** size_power: 0 by weight alone, 1 by size, between is a temperature
    steps: int = within("[0, 2**31)", 0)
    batch: int = within("[1, 2**31)", 64)  # rows of max_tokens tokens (LM) or queries (contrastive) a step, over all ranks
    chunk: int = within("[0, 2**31)", 0)  # rows or sequences computed at a time on one rank; 0 = all at once. Same result, less memory
    max_tokens: int = within("[1, 2**30]", 512)  # a longer text is cut (contrastive) or split (pretrain)
    lr: float = within("[0, 1]", 1e-4)
    warmup: float = within("[0, 1]", 0.05)  # share of the steps
    final_lr: float = within("[0, 1]", 0.1)  # ours: linear decay to this share of lr
    weight_decay: float = within("[0, 10]", 1e-3)
    clip: float = within("(0, 1e9]", 1.0)  # ours: gradient norm
    blend: float = within("(0, 1]", 1.0)  # ours: what the stage changed is kept to this share at its end, the rest of the weights is as it began (WiSE-FT, arXiv 2109.01903)


@dataclass
class Pretrain(Stage):
    batch: int = 256
    max_tokens: int = 32768
    masked: float = within("[0, 1)", 0.0)  # ours: above 0, this share of the tokens is hidden and predicted, bidirectional (masked next token: LLM2Vec, arXiv 2404.05961)


@dataclass
class Sft(Stage):
    lr: float = 2e-5
    warmup: float = 0.02
    max_tokens: int = 32768


@dataclass
class Weak(Stage):
    batch_tokens: int = within("[0, 2**31)", 0)  # above 0: as many queries a step as so many tokens hold, all ranks together, instead of `batch`
    temperature: float = within("[1e-3, 100]", 0.02)  # ours: the paper writes none
    alpha: str = "linear"  # how the soft mask opens: "linear" (best in the paper), "accelerating", "decelerating"; or not at all: "open", "closed"
    mask: str = "column"  # which future weights open first: "column", "row", "uniform" (recipe: soft mask)
    dims: list[int] = field(default_factory=list)  # ours: Matryoshka from this stage on; none: the whole vector alone, as in the paper
    margin: float = within("[-2, 2]", 2.0)  # ours: a document whose cosine is above the positive's by more than this is no negative (Qwen3-Embedding, GISTEmbed); 2: each is one
    margin_strategy: str = "absolute"  # that is a cosine, or "relative", a share of the positive's
    symmetric: bool = False  # ours: a document also finds its query, the mean of both ways
    same_side: bool = False  # ours: other queries are negatives of a query, too, and with symmetric other documents of a document (GTE, arXiv 2308.03281)
    teacher: str = ""  # who scores pairs: "module:function", "sentence-transformers:FOLDER", "cross-encoder:FOLDER"; empty: the data's own "score" column
    min_score: float = within("[-1e9, 1e9]", 0.4)  # pairs that the teacher scores below this are dropped
    distil: str = ""  # ours: "cosine", a teacher's vectors are targets of `texts`: of each of the model's vectors, as many numbers as the teacher's have
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
    distil: str = ""  # ours: a teacher's scores of a query's positive and hard negatives are targets: "kl", by their softmax; "margin_mse", by the positive's lead (arXiv 2010.02666)
    distil_weight: float = within("[0, 1e6]", 1.0)  # L = L_InfoNCE + beta * L_CoSENT + distil_weight * L_distil
    distil_temperature: float = within("[1e-3, 1e3]", 0.02)  # the teacher's score over this is what the model's cosine over `temperature` is to be: the same for cosines, 1 for logits
    teacher: str = ""  # who gives them, as weak.teacher; empty: the records' own pos_scores and neg_scores
    balance: str = "together"  # ours: both in each step, as in the paper, or "alternating", CoSENT alone in every other one


@dataclass
class Lora:
    rank: int = within("[0, 2**16]", 0)  # of the adapters that are trained in place of the weights of init_from; 0 = the weights themselves
    alpha: float = within("(0, 1e6]", 32.0)  # ours: what the adapters add is multiplied by alpha / rank
    targets: list[str] = field(default_factory=lambda: ["qkv", "attention_out", "gate_up", "ffn_out"])  # the matrices of a block that have one


@dataclass
class Negatives:
    count: int = within("[0, 2**15)", 7)  # hard negatives in use a query
    pool: int = within("[0, 2**15)", 32)  # ours: candidates mined a query, best first
    index: str = "Flat"  # ours: "Flat", exact; or a faiss index factory string ("IVF4096,SQfp16"); or "random": no search, any documents
    search: str = ""  # ours: how the index is searched, in faiss' words ("nprobe=32")
    dim: int = within("[0, 2**20]", 0)  # ours: the first numbers of the vectors that are compared; 0 = all
    max_ratio: float = within("[0, 10]", 0.95)  # ours: a candidate is a false negative if its cosine is above the positive's less 1 - this share of it
    bounds: str = "cosine"  # what low and bound are: cosines, or "quantile" (ours), the share of the negatives mined first whose cosine is lower
    low: float = within("[-2, 2]", 0.4)  # dynamic replacement: replace if S_0 < low, or ...
    factor: float = within("[0, 1e3]", 1.2)  # ... if factor * S_i < S_0 and S_i < bound
    bound: float = within("[-2, 2]", 0.7)


@dataclass
class Validation:
    data: dict[str, Source] = field(default_factory=dict)  # source -> weight, of records that no stage trains on; each stage takes those of its kind
    every: int = within("[1, 2**31)", 500)  # steps; and after a stage's last one
    records: int = within("[1, 2**31)", 1000)  # ours: of a source, at most; always the same ones
    metric: str = "ndcg@10"  # by which a checkpoint is the best, where the stage has it (pretrain and sft: the loss): "loss", "recall@20", "spearman"
    keep_best: bool = False  # keep each stage's best checkpoint beside the newest


@dataclass
class Config:
    out_dir: str = "runs/demo"  # the run: checkpoints, shards, metrics
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    log_to: list[str] = field(default_factory=lambda: ["tensorboard"])  # who else shows the run, of those installed: "tensorboard", "wandb", "mlflow", "trackio" (follow.py)
    init_from: str = ""  # a run whose newest weights to start from, a folder of transformers or a .gguf file; it brings [model] and tokenizer. Empty: random weights
    init_layers: str | list[int] = ""  # of init_from: "first:8", or a list of layers, counted from 0, in the order in which they are to stand. Empty: all
    token_vectors: str = "spelling"  # ours: how a new token table starts: tokens spelled alike are alike; or "random"
    token_weights: str = "rarity"  # ours: a token weighs in the mean as much as it is rare in the data, to begin with; or "equal"
    seed: int = within("[0, 2**31)", 1)
    device: str = "auto"  # "cuda" where there is one, else "cpu"
    tensor_parallel: int = within("[1, 1024]", 1)  # ranks that share one copy of the model; neighbours, so that they are on one machine
    timeout: int = within("[1, 1e7]", 600)  # seconds: a rank that gives no sign of life for so long, or keeps the others waiting, ends the run
    recompute: str = "none"  # "block": the backward computes each block anew, a third more work for a fraction of the memory
    precision: str = "auto"  # of matrix products: "bfloat16", "float32", or what the device multiplies faster, as is measured
    plan_only: bool = False  # print the model's size and the memory a device needs, then stop
    save_every: int = within("[1, 2**31)", 1000)  # steps between checkpoints
    keep: int = within("[1, 1e6]", 2)  # checkpoints kept a stage; the newest is never the only one
    loader_threads: int = within("[1, 256]", 2)  # that read and pack batches ahead of the step, on each rank
    skip_bad_records: bool = False  # leave out what is wrong in a file or damaged in a shard, say so and count it, instead of stopping
    max_bad_share: float = within("[0, 1)", 0.01)  # of a source's records, left out while reading; above it the run stops
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


def load(path, overrides=()):
    """Read `path` (TOML) over the defaults, then each `--section.key=value` of `overrides`; [model] is that of init_from.

    Returns a Config. Raises UserError for a missing or broken file, an unknown key (naming the nearest one), a value of
    the wrong type or out of range.
    """
    config = Config()
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot read this config: {error}") from None
    where, given = str(path), set(_named(tree))
    _assign(config, tree, "", where)
    for text in overrides:
        one = _of_source(text)
        keys, tree = one or _of_setting(text)
        for section in reversed(keys):
            tree = {section: tree}
        _assign(config, tree, "", f"argument {text!r}", one is not None)
        given.update(_named(tree))
    _check_layers(config, where)
    if config.init_from:
        pretrained.adopt(config, given, where)
    _check(config, where)
    return config


def _named(tree, prefix=""):
    """The dotted keys of a tree, those of its sections included."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{key}.")


def _of_setting(argument):
    """--section.key=value -> ([section, key], value)."""
    key, equals, value = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not equals:
        raise UserError(f"argument {argument!r}: expected --section.key=value")
    parsed = _toml(value)
    return key.split("."), value if parsed is None else parsed  # a bare word is a string


def _of_source(argument):
    """--weak.data.PATH=WEIGHT or ={ a table } -> (["weak", "data", PATH], value), whatever dots and equals signs the path has; None for
    other settings. The path ends at the first equals sign behind which a weight or a table stands."""
    for section in (f"{part}.{key}" for part in (*STAGES, "validation") for key in TABLES):
        prefix = f"--{section}."
        if argument.startswith(prefix):
            parts = argument.removeprefix(prefix).split("=")
            for end in range(1, len(parts)):
                value = _toml("=".join(parts[end:]))
                if isinstance(value, int | float | dict):
                    return [*section.split("."), "=".join(parts[:end])], value
            raise UserError(f"argument {argument!r}: expected {prefix}SOURCE=WEIGHT, such as {prefix}my/file.jsonl=1")
    return None


def _toml(text):
    """A value as TOML has it, or None."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None


def from_dict(tree, where):
    """The Config that `dataclasses.asdict` of a saved run gave. Raises UserError as `load` does."""
    config = Config()
    _assign(config, tree, "", where)
    _check(config, where)
    return config


def _assign(node, tree, prefix, where, one_source=False):
    """one_source: a table of sources in the tree names one, and the others stay."""
    hints = typing.get_type_hints(type(node))
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(name, _all_keys(Config()), n=1, cutoff=0)
            raise UserError(f"{where}: unknown key {name!r}; the nearest is {near[0]!r}")
        hint, current = hints[key], getattr(node, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {name} is a section: set one of its keys, such as {name}.{next(iter(vars(current)))}")
            _assign(current, value, f"{name}.", where, one_source)
        elif hint == dict[str, Source]:
            if not isinstance(value, dict):
                raise UserError(f"{where}: {name} is {value!r}; expected a table of source = weight")
            sources = {source: _source(about, f"{where}: {name}[{source!r}]") for source, about in value.items()}
            merged = {**(current if one_source else {}), **sources}
            setattr(node, key, {source: about for source, about in merged.items() if about.weight})
        else:
            if hint is float and type(value) is int:
                value = float(value)
            forms = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
            if not any(_has_type(value, form) for form in forms):
                raise UserError(f"{where}: {name} is {value!r}; expected {' or '.join(map(_type_name, forms))}")
            setattr(node, key, value)


def _has_type(value, form):
    """form: a type, or list[a type]."""
    if isinstance(form, types.GenericAlias):
        return isinstance(value, list) and all(type(v) is form.__args__[0] for v in value)
    return type(value) is form


def _type_name(form):
    return f"a list of {form.__args__[0].__name__}" if isinstance(form, types.GenericAlias) else form.__name__


def _source(about, where):
    """A Source from a weight or a table; keys of the table that are none of Source's name columns."""
    about = dict(about) if isinstance(about, dict) else {"weight": about}
    columns = dict(about.pop("columns", {}))  # as a saved run has them
    columns |= {key: about.pop(key) for key in list(about) if key in COLUMNS}
    weight = about.pop("weight", 1.0)
    if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
        raise UserError(f"{where}: the weight is {weight!r}; expected a table of source = weight, weights above 0, or 0 to leave a source out")
    source = Source(float(weight), columns)
    for key, value in about.items():
        if key not in ("in_batch_negatives", "hard_negatives", "distil"):
            near = difflib.get_close_matches(key, [*vars(source), *COLUMNS], n=1, cutoff=0)
            raise UserError(f"{where}: unknown key {key!r}; the nearest is {near[0]!r}")
        expected = type(getattr(source, key))
        if type(value) is not expected:
            raise UserError(f"{where}: {key} is {value!r}; expected {expected.__name__}")
        setattr(source, key, value)
    for key, column in columns.items():
        names = column if isinstance(column, list) and key in LISTS else [column]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{where}: {key} is {column!r}; expected the name of a column of the file" + ", or a list of names" * (key in LISTS))
    if columns and kind_of(columns) is None:
        raise UserError(f"{where}: the columns named, {', '.join(columns)}, make no record; name query and pos, sentence1, sentence2 and score, text and label, instruction and output, messages, or text")
    return source


def _all_keys(node, prefix=""):
    for key, value in vars(node).items():
        yield f"{prefix}{key}"
        if dataclasses.is_dataclass(value):
            yield from _all_keys(value, f"{prefix}{key}.")


def settings_with_comments(node=None, prefix=""):
    """(dotted key, default as one types it, its range and the comment beside it in this file) of every setting."""
    node = node or Config()
    lines = "".join(inspect.getsource(kind) for kind in type(node).__mro__[-2::-1])  # a base class first: the last word counts
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", lines, re.MULTILINE))
    for key, value in vars(node).items():
        if dataclasses.is_dataclass(value):
            yield from settings_with_comments(value, f"{prefix}{key}.")
        else:
            said = "; ".join(filter(None, (range_of(type(node), key), comments.get(key))))
            yield f"{prefix}{key}", str(value).lower() if isinstance(value, bool) else value, said


def range_of(kind, key):
    """The interval of a number of one of these classes, where it was first declared; None of another setting."""
    declared = (base.__dict__["__dataclass_fields__"].get(key) for base in kind.__mro__ if "__dataclass_fields__" in base.__dict__)
    return next((of.metadata["range"] for of in declared if of and "range" in of.metadata), None)


def ranges(node, prefix=""):
    """(dotted key, value, interval) of each number that has one."""
    for key, value in vars(node).items():
        if dataclasses.is_dataclass(value):
            yield from ranges(value, f"{prefix}{key}.")
        elif interval := range_of(type(node), key):
            yield f"{prefix}{key}", value, interval


def is_within(value, interval):
    low, high = map(_number, interval[1:-1].split(", "))
    return (low < value or (interval[0] == "[" and low == value)) and (value < high or (interval[-1] == "]" and value == high))


def _number(text):
    base, _, exponent = text.partition("**")
    return float(base) ** float(exponent or 1)


def _check_layers(config, where):
    try:
        layers = pretrained.chosen(config.init_layers)
    except ValueError:
        raise UserError(f'{where}: init_layers is {config.init_layers!r}; expected "first:8" (the first 8), or a list of layers counted from 0, such as [0, 2, 4]') from None
    if layers and not config.init_from:
        raise UserError(f"{where}: init_layers is {config.init_layers!r}; there is no init_from whose layers these could be")


def _check(config, where):
    """The rules that a type does not say."""

    def require(holds, key, value, expected):
        if not holds:
            raise UserError(f"{where}: {key} is {value!r}; expected {expected}")

    def one_of(key, value, *allowed):
        require(value in allowed, key, value, " or ".join(map(repr, allowed)))

    for key, value, interval in ranges(config):
        require(is_within(value, interval), key, value, f"a {'whole ' * isinstance(value, int)}number in {interval}")
    require(bool(config.out_dir.strip()), "out_dir", config.out_dir, "the path of a folder")
    model = config.model
    if model.head_dim:
        require(model.head_dim % 2 == 0, "model.head_dim", model.head_dim, "an even number above 0 (RoPE turns pairs)")
    else:
        require(model.width % model.heads == 0, "model.heads", model.heads, f"a divisor of model.width = {model.width}")
        require(model.head % 2 == 0, "model.heads", model.heads, "an even head size (RoPE turns pairs)")
    require(model.vocab_size % config.tensor_parallel == 0, "model.vocab_size", model.vocab_size, f"a multiple of tensor_parallel = {config.tensor_parallel}")
    scaling = model.rope_scaling
    require(scaling.high_freq_factor > scaling.low_freq_factor, "model.rope_scaling.high_freq_factor", scaling.high_freq_factor, "more than low_freq_factor")
    for key in ("heads", "kv_heads", "ffn"):
        require(getattr(model, key) % config.tensor_parallel == 0, f"model.{key}", getattr(model, key), f"a multiple of tensor_parallel = {config.tensor_parallel}")
    if not config.tokenizer.path:
        vocab_size = config.tokenizer.vocab_size
        require(vocab_size % config.tensor_parallel == 0, "tokenizer.vocab_size", vocab_size, f"a multiple of tensor_parallel = {config.tensor_parallel}")
    require(model.heads % model.kv_heads == 0, "model.kv_heads", model.kv_heads, f"a divisor of model.heads = {model.heads}")
    one_of("model.pooling", model.pooling, "mean", "last")
    lora, matrices = config.lora, Lora().targets
    require(lora.targets and set(lora.targets) <= set(matrices), "lora.targets", lora.targets, f"some of {', '.join(matrices)}")
    require(not lora.rank or config.init_from, "lora.rank", lora.rank, "0 without init_from: there are no weights to adapt")
    require(set(config.log_to) <= set(LOGGERS), "log_to", config.log_to, f"some of {', '.join(LOGGERS)}")
    one_of("device", config.device, "auto", "cpu", "cuda")
    one_of("token_vectors", config.token_vectors, "spelling", "random")
    one_of("token_weights", config.token_weights, "rarity", "equal")
    one_of("recompute", config.recompute, "none", "block")
    one_of("precision", config.precision, "auto", "bfloat16", "float32")
    one_of("weak.alpha", config.weak.alpha, "linear", "accelerating", "decelerating", "open", "closed")
    one_of("weak.mask", config.weak.mask, "column", "row", "uniform")
    in_order = [name for name in STAGES if name in config.stages]
    require(config.stages == in_order != [], "stages", config.stages, f"some of {', '.join(STAGES)}, in this order")
    for name in config.stages:
        stage = getattr(config, name)
        require(stage.steps > 0, f"{name}.steps", stage.steps, "at least 1")
        require(stage.max_tokens <= model.context, f"{name}.max_tokens", stage.max_tokens, f"1 to model.context = {model.context}")
        require(bool(stage.data), f"{name}.data", stage.data, "at least one source = weight")
        for key in TABLES:
            for source, about in getattr(stage, key, {}).items():
                _check_negatives(require, f"{name}.{key}[{source!r}]", about, config.negatives if (name, key) == ("supervised", "data") else None)
    for source, about in config.validation.data.items():
        _check_negatives(require, f"validation.data[{source!r}]", about, None)
        for name, key in ((name, key) for name in config.stages for key in TABLES):
            require(source not in getattr(getattr(config, name), key, {}), "validation.data", source, f"records held out: {name}.{key} trains on these")
    one_of("validation.metric", config.validation.metric, *METRICS)
    for name in ("weak", "supervised"):
        one_of(f"{name}.margin_strategy", getattr(config, name).margin_strategy, "absolute", "relative")
        dims = getattr(config, name).dims
        require(dims == sorted(set(dims)) and min(dims, default=1) > 0 and (dims or name == "weak"), f"{name}.dims", dims, "increasing numbers")
        if name in config.stages and dims:
            require(dims[-1] == model.width, f"{name}.dims", dims, f"the last to be model.width = {model.width}")
    one_of("weak.distil", config.weak.distil, "", "cosine")
    one_of("supervised.distil", config.supervised.distil, "", "kl", "margin_mse")
    weak, supervised = config.weak, config.supervised
    require(bool(weak.distil) == bool(weak.texts), "weak.texts", weak.texts, f"{'at least one source = weight' if weak.distil else 'none'}, since weak.distil is {weak.distil!r}")
    require(not weak.distil or weak.distil_teacher or weak.teacher, "weak.distil_teacher", weak.distil_teacher, f"a teacher with vectors, since weak.distil is {weak.distil!r}")
    require(weak.distil or not weak.distil_teacher, "weak.distil_teacher", weak.distil_teacher, "none, since weak.distil asks for no vectors")
    require(supervised.distil or not supervised.teacher, "supervised.teacher", supervised.teacher, "none, since supervised.distil asks for no scores")
    if supervised.distil and "supervised" in config.stages:
        counts = [about.count(config.negatives) for about in supervised.data.values() if about.distil]
        require(any(counts), "supervised.distil", supervised.distil, "nothing: no source has hard negatives that a teacher could score")
    if "supervised" in config.stages:
        require(config.negatives.pool >= config.negatives.count, "negatives.pool", config.negatives.pool, f"at least negatives.count = {config.negatives.count}")
        require(config.negatives.dim <= model.width, "negatives.dim", config.negatives.dim, f"from 1 to model.width = {model.width}, or 0 for all")
        require(not config.negatives.search or config.negatives.index not in ("Flat", "random"), "negatives.search", config.negatives.search, f"empty: negatives.index = {config.negatives.index!r} has nothing to set")
        one_of("supervised.balance", config.supervised.balance, "together", "alternating")
        one_of("negatives.bounds", config.negatives.bounds, "cosine", "quantile")
        if config.negatives.bounds == "quantile":
            for key in ("low", "bound"):
                require(0 <= getattr(config.negatives, key) <= 1, f"negatives.{key}", getattr(config.negatives, key), "a share from 0 to 1, since negatives.bounds is 'quantile'")


def _check_negatives(require, key, about, negatives):
    """negatives: the settings that count where a source's queries have hard negatives; else None."""
    own, hard = about.in_batch_negatives, about.hard_negatives
    if negatives is None:
        require(own, f"{key}.in_batch_negatives", own, "true: only the supervised stage's data has other negatives")
        require(hard == -1, f"{key}.hard_negatives", hard, "none here: only the supervised stage's data has them")
        return
    require(hard >= -1, f"{key}.hard_negatives", hard, "0 or more, or -1 for negatives.count")
    count = about.count(negatives)
    require(own or count, f"{key}.in_batch_negatives", own, "true, or hard_negatives above 0: a query needs something to be told apart from")
    require(count <= negatives.pool, f"{key}.hard_negatives", count, f"at most negatives.pool = {negatives.pool}")
