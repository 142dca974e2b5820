"""What a model to start from says about itself: its shape, its pooling, and what this engine cannot do.

It is a folder of transformers (Llama, Mistral or Qwen3, with or without an LM head, or what conan_engine.export wrote),
a GGUF file (Llama or Qwen3), or another run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conan_engine.config import chosen_layers
from conan_engine.data import gguf_file
from conan_engine.data.tokenizer import Tokenizer
from conan_engine.errors import UserError
from conan_engine.model import gguf_model

if TYPE_CHECKING:
    from conan_engine.config import Config


ARCHITECTURES = {
    f"{family}{kind}": family for family in ("Llama", "Mistral", "Qwen3") for kind in ("ForCausalLM", "Model")
}
CANNOT = {  # key of config.json: what it means, unless it has one of these values
    "attention_bias": ("biases in attention", (None, False)),
    "mlp_bias": ("biases in the FFN", (None, False)),
    "use_sliding_window": ("a sliding window", (None, False)),
    "hidden_act": ("another activation than SiLU", (None, "silu", "swish")),
    "num_local_experts": ("a mixture of experts", (None, 0)),
    "num_experts": ("a mixture of experts", (None, 0)),
    "quantization_config": ("quantised weights", (None,)),
    "partial_rotary_factor": ("RoPE of a part of each head", (None, 1, 1.0)),
}


def adopt(config: Config, given: set[str], where: str) -> None:
    """Copy the [model] and the tokenizer of init_from into `config`.

    given: the dotted keys that the user set. Of these, pooling, embedding_scale and a shorter context stay. Raises
    UserError for any other that differs, and for init_layers that the model does not have.
    """
    # a run that started from it keeps the shape in its own config
    start = config.init_from if Path(config.init_from).exists() else config.out_dir
    found, dims = (
        gguf_model.shape(start)
        if gguf_file.is_gguf(start)
        else of_transformers(start)
        if is_transformers(start)
        else _of_run(start)
    )
    if not found and start != config.init_from:
        raise UserError(
            f"{where}: init_from is {config.init_from!r}, which does not exist; name a run, a folder of "
            "transformers or a .gguf file"
        )
    if found and start == config.init_from and (layers := chosen_layers(config.init_layers)):
        if max(layers) >= found["layers"]:
            raise UserError(
                f"{where}: init_layers is {config.init_layers!r}; the model in {start} has {found['layers']} "
                f"layers, 0 to {found['layers'] - 1}"
            )
        found["layers"] = len(layers)
    for key, value in found.items():
        own = getattr(config.model, key)
        if f"model.{key}" not in given:
            setattr(config.model, key, type(own)(**value) if key == "rope_scaling" else value)
        elif key == "context" and own > value:
            window = ", its sliding window" if _json(Path(start, "config.json")).get("sliding_window") == value else ""
            raise UserError(
                f"{where}: model.context is {own}; the model in {config.init_from} has {value}{window}; set it "
                "to at most that"
            )
        elif own != value and key not in ("pooling", "embedding_scale", "context"):
            raise UserError(
                f"{where}: model.{key} is {own!r}; the model in {config.init_from} has {value!r}; leave it out"
            )
    if found and "supervised.dims" not in given:
        width = config.model.width
        config.supervised.dims = dims or [*(dim for dim in config.supervised.dims if dim < width), width]
    if found and not config.tokenizer.path and start == config.init_from:
        home = Path(start).parent.parent if Path(start, "state.json").exists() else start
        config.tokenizer.path = start if gguf_file.is_gguf(start) else str(Tokenizer.of(home) or "")


def source(name: str, layers: list[int] | None) -> str:
    """The name, in the model to start from, of the parameter that becomes `name`. layers: as config.chosen_layers gives
    them.
    """
    if layers is None or not name.startswith("blocks."):
        return name
    _, i, part = name.split(".", 2)
    return f"blocks.{layers[int(i)]}.{part}"


def is_transformers(folder: str | Path) -> bool:
    """Whether a folder holds a model of transformers."""
    return "model_type" in _json(Path(folder, "config.json"))


def _of_run(run):
    """The shape of a run or a checkpoint, as of_transformers gives it; ({}, None) if it does not say."""
    states = [Path(run, "state.json"), *Path(run).glob("checkpoints/*/state.json")]
    about = _json(Path(run, "config.json")) or next(
        (state["config"] for state in map(_json, states) if "config" in state), {}
    )
    return about.get("model", {}), about.get("supervised", {}).get("dims")


def of_transformers(folder: str | Path) -> tuple[dict[str, Any], list[int] | None]:
    """The shape of a transformers folder: (the keys of config.Model, Matryoshka dims or None).

    Raises UserError for what this engine cannot do.
    """
    path = Path(folder, "config.json")
    about = _json(path)
    kind = next(iter(about.get("architectures") or ["none"]))
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: architectures is {kind}; init_from takes {', '.join(ARCHITECTURES)}")
    for key, (what, allowed) in CANNOT.items():
        if about.get(key) not in allowed:
            raise UserError(
                f"{path}: {key} is {about[key]!r}: {what}, which this engine does not support; use another model"
            )
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(about.get(key), int):
            raise UserError(f"{path}: {key} is {about.get(key)!r}; expected a whole number")
    width, heads = about["hidden_size"], about["num_attention_heads"]
    head = about.get("head_dim") or width // heads
    found = {
        "layers": about["num_hidden_layers"],
        "width": width,
        "ffn": about["intermediate_size"],
        "heads": heads,
        "kv_heads": about.get("num_key_value_heads") or heads,
        "context": about.get("max_position_embeddings", 2048),
        "head_dim": head if head * heads != width else 0,
        "norm_eps": about.get("rms_norm_eps", 1e-6),
        "qk_norm": ARCHITECTURES[kind] == "Qwen3",
        "vocab_size": about["vocab_size"],
        "tied": kind.endswith("Model") or about.get("tie_word_embeddings", False),
        "embedding_scale": 1.0,
        **_rope(path, about),
    }
    if about.get("sliding_window") and kind.startswith("Mistral"):
        found["context"] = min(found["context"], about["sliding_window"])  # up to this length, a window has no effect
    pooling = _json(Path(folder, "1_Pooling/config.json"))
    if pooling:
        found["pooling"] = (
            "last" if pooling.get("pooling_mode_lasttoken") or pooling.get("pooling_mode") == "lasttoken" else "mean"
        )
    return found, about.get("matryoshka_dimensions")


def _rope(path, about):
    """rope_theta and rope_scaling. transformers 5 has both in rope_parameters; before, rope_scaling was a table of
    its own.
    """
    table = about.get("rope_parameters") or about.get("rope_scaling") or {}
    kind = table.get("rope_type", table.get("type", "default"))
    theta = float(table.get("rope_theta") or about.get("rope_theta") or 10_000.0)
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": {}}
    if kind != "llama3":
        raise UserError(f"{path}: its RoPE scaling is {kind!r}; this engine has that of Llama 3, 'llama3', or none")
    scaling = {key: float(table[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    return {
        "rope_theta": theta,
        "rope_scaling": scaling | {"original_context": table["original_max_position_embeddings"]},
    }


def _json(path):
    """A JSON file; {} if there is none."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read it ({error})") from None
    return found if isinstance(found, dict) else {}
