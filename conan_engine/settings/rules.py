"""Check the values of settings: the interval of each number, and rules between settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conan_engine.config import LOGGERS, METRICS, STAGES, TABLES, Lora, chosen_layers
from conan_engine.errors import UserError
from conan_engine.settings.listing import ranges

if TYPE_CHECKING:
    from conan_engine.config import Config


def check_layers(config: Config, where: str) -> None:
    try:
        layers = chosen_layers(config.init_layers)
    except ValueError:
        raise UserError(
            f'{where}: init_layers is {config.init_layers!r}; expected "first:8" (the first 8), or a list of '
            "layers counted from 0, such as [0, 2, 4]"
        ) from None
    if layers and not config.init_from:
        raise UserError(f"{where}: init_layers is {config.init_layers!r}; it needs init_from, whose layers these are")


def check(config: Config, where: str) -> None:
    """Check everything that the types of the settings do not say. Raises UserError. where: named in errors."""

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
    require(
        model.vocab_size % config.tensor_parallel == 0,
        "model.vocab_size",
        model.vocab_size,
        f"a multiple of tensor_parallel = {config.tensor_parallel}",
    )
    scaling = model.rope_scaling
    require(
        scaling.high_freq_factor > scaling.low_freq_factor,
        "model.rope_scaling.high_freq_factor",
        scaling.high_freq_factor,
        "more than low_freq_factor",
    )
    for key in ("heads", "kv_heads", "ffn"):
        require(
            getattr(model, key) % config.tensor_parallel == 0,
            f"model.{key}",
            getattr(model, key),
            f"a multiple of tensor_parallel = {config.tensor_parallel}",
        )
    if not config.tokenizer.path:
        vocab_size = config.tokenizer.vocab_size
        require(
            vocab_size % config.tensor_parallel == 0,
            "tokenizer.vocab_size",
            vocab_size,
            f"a multiple of tensor_parallel = {config.tensor_parallel}",
        )
    require(
        model.heads % model.kv_heads == 0, "model.kv_heads", model.kv_heads, f"a divisor of model.heads = {model.heads}"
    )
    one_of("model.pooling", model.pooling, "mean", "last")
    lora, matrices = config.lora, Lora().targets
    require(
        lora.targets and set(lora.targets) <= set(matrices),
        "lora.targets",
        lora.targets,
        f"some of {', '.join(matrices)}",
    )
    require(
        not lora.rank or config.init_from, "lora.rank", lora.rank, "0 without init_from: there are no weights to adapt"
    )
    if config.init_whiten:
        for holds, because in (
            (config.init_from, "init_from is empty"),
            (not lora.rank, "lora.rank is above 0"),
            (set(config.stages) <= {"weak", "supervised"}, f"stages holds {config.stages[:1]}"),
            (model.pooling == "mean", "model.pooling is not 'mean'"),
        ):
            require(holds, "init_whiten", config.init_whiten, f"0, since {because}")
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
        require(
            stage.max_tokens <= model.context,
            f"{name}.max_tokens",
            stage.max_tokens,
            f"1 to model.context = {model.context}",
        )
        require(
            not (stage.chunk and stage.chunk_tokens),
            f"{name}.chunk_tokens",
            stage.chunk_tokens,
            f"0, since {name}.chunk is {stage.chunk}; one of the two must be 0",
        )
        require(bool(stage.data), f"{name}.data", stage.data, "at least one source = weight")
        for key in TABLES:
            for source, about in getattr(stage, key, {}).items():
                _check_negatives(
                    require,
                    f"{name}.{key}[{source!r}]",
                    about,
                    config.negatives if (name, key) == ("supervised", "data") else None,
                )
    for source, about in config.validation.data.items():
        _check_negatives(require, f"validation.data[{source!r}]", about, None)
        for name, key in ((name, key) for name in config.stages for key in TABLES):
            require(
                source not in getattr(getattr(config, name), key, {}),
                "validation.data",
                source,
                f"records held out: {name}.{key} trains on these",
            )
    one_of("validation.metric", config.validation.metric, *METRICS)
    for name in ("weak", "supervised"):
        one_of(f"{name}.margin_strategy", getattr(config, name).margin_strategy, "absolute", "relative")
        dims = getattr(config, name).dims
        require(
            dims == sorted(set(dims)) and min(dims, default=1) > 0 and (dims or name == "weak"),
            f"{name}.dims",
            dims,
            "increasing numbers",
        )
        if name in config.stages and dims:
            require(dims[-1] == model.width, f"{name}.dims", dims, f"the last to be model.width = {model.width}")
    _check_plan(require, config)
    one_of("weak.distil", config.weak.distil, "", "cosine")
    one_of("supervised.distil", config.supervised.distil, "", "kl", "margin_mse")
    weak, supervised = config.weak, config.supervised
    require(
        bool(weak.distil) == bool(weak.texts),
        "weak.texts",
        weak.texts,
        f"{'at least one source = weight' if weak.distil else 'none'}, since weak.distil is {weak.distil!r}",
    )
    require(
        not weak.distil or weak.distil_teacher or weak.teacher,
        "weak.distil_teacher",
        weak.distil_teacher,
        f"a teacher with vectors, since weak.distil is {weak.distil!r}",
    )
    require(
        weak.distil or not weak.distil_teacher,
        "weak.distil_teacher",
        weak.distil_teacher,
        "none, since weak.distil asks for no vectors",
    )
    require(
        supervised.distil or not supervised.teacher,
        "supervised.teacher",
        supervised.teacher,
        "none, since supervised.distil asks for no scores",
    )
    if supervised.distil and "supervised" in config.stages:
        counts = [about.count(config.negatives) for about in supervised.data.values() if about.distil]
        require(
            any(counts),
            "supervised.distil",
            supervised.distil,
            "nothing: no source has hard negatives that a teacher could score",
        )
    if "supervised" in config.stages:
        require(
            config.negatives.pool >= config.negatives.count,
            "negatives.pool",
            config.negatives.pool,
            f"at least negatives.count = {config.negatives.count}",
        )
        require(
            config.negatives.dim <= model.width,
            "negatives.dim",
            config.negatives.dim,
            f"from 1 to model.width = {model.width}, or 0 for all",
        )
        require(
            not config.negatives.search or config.negatives.index not in ("Flat", "random"),
            "negatives.search",
            config.negatives.search,
            f"empty: negatives.index = {config.negatives.index!r} has nothing to set",
        )
        one_of("supervised.balance", config.supervised.balance, "together", "alternating")
        one_of("negatives.bounds", config.negatives.bounds, "cosine", "quantile")
        if config.negatives.bounds == "quantile":
            for key in ("low", "bound"):
                require(
                    0 <= getattr(config.negatives, key) <= 1,
                    f"negatives.{key}",
                    getattr(config.negatives, key),
                    "a share from 0 to 1, since negatives.bounds is 'quantile'",
                )


def _check_plan(require, config):
    plan, most = config.plan, [getattr(config, name).max_tokens for name in config.stages]
    require(
        not plan.links or (len(plan.links) == 2 and min(plan.links) > 0),
        "plan.links",
        plan.links,
        "two numbers above 0: GB/s of a GPU within its machine, and to other machines",
    )
    require(
        not plan.tokens or (len(plan.tokens) == len(most) and all(1 <= n <= m for n, m in zip(plan.tokens, most))),
        "plan.tokens",
        plan.tokens,
        f"a number for each of {', '.join(config.stages)}, of at most {', '.join(map(str, most))}",
    )


def _check_negatives(require, key, about, negatives):
    """Check the hard negatives of a source. negatives: the settings that apply to it, or None if it has none."""
    own, hard = about.in_batch_negatives, about.hard_negatives
    if negatives is None:
        require(own, f"{key}.in_batch_negatives", own, "true: only the supervised stage's data has other negatives")
        require(hard == -1, f"{key}.hard_negatives", hard, "none here: only the supervised stage's data has them")
        return
    require(hard >= -1, f"{key}.hard_negatives", hard, "0 or more, or -1 for negatives.count")
    count = about.count(negatives)
    require(
        own or count,
        f"{key}.in_batch_negatives",
        own,
        "true, or hard_negatives above 0: a query needs something to be told apart from",
    )
    require(count <= negatives.pool, f"{key}.hard_negatives", count, f"at most negatives.pool = {negatives.pool}")


def is_within(value: float, interval: str) -> bool:
    low, high = map(_number, interval[1:-1].split(", "))
    return (low < value or (interval[0] == "[" and low == value)) and (
        value < high or (interval[-1] == "]" and value == high)
    )


def _number(text):
    base, _, exponent = text.partition("**")
    return float(base) ** float(exponent or 1)
