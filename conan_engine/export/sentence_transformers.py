"""Write a run as a folder that sentence-transformers and transformers load, without code of ours in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from conan_engine.data.json_tokenizer import JsonTokenizer
from conan_engine.export import card
from conan_engine.export.fast_tokenizer import convert
from conan_engine.model import llama

if TYPE_CHECKING:
    from conan_engine.evaluation.encoder import Encoder


POOLING = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write(folder: Path, run: str | Path, encoder: Encoder, dtype: str, instruction: str = "") -> None:
    """Write into `folder`, which exists.

    run: where results.json may be; dtype: a key of DTYPES; instruction: what comes before queries.
    """
    model, dtype = encoder.model, DTYPES[dtype]
    _json(folder / "config.json", _config(encoder, dtype))
    tensors = {name: tensor.to(dtype) for name, tensor in llama.tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder, encoder)
    # names that sentence-transformers 5 and 6 both know
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(parts)
    ]
    _json(folder / "modules.json", modules)
    pooling = {
        key: key == POOLING[model.config.pooling]
        for key in ("pooling_mode_cls_token", "pooling_mode_max_tokens", *POOLING.values())
    }
    for part, content in (
        ("1_Pooling", {"word_embedding_dimension": model.config.width, **pooling}),
        ("2_Normalize", {}),
    ):
        (folder / part).mkdir()
        _json(folder / part / "config.json", content)
    _json(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_tokens, "do_lower_case": False})
    prompts = {"query": f"{instruction}\n", "document": ""} if instruction else {}
    _json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    (folder / "README.md").write_text(card.text(run, encoder, instruction), encoding="utf-8")


def _config(encoder, dtype):
    """config.json of a Llama, or of a Qwen3 if the model has norms on queries and keys.

    is_causal = false makes transformers (5.2 or newer) and llama.cpp run it bidirectionally.
    """
    shape, tokenizer = encoder.model.config, encoder.tokenizer
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling.factor != 1:
        scaling = dict(vars(shape.rope_scaling))
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": scaling.pop("original_context"), **scaling}
    kind = "Qwen3" if shape.qk_norm else "Llama"
    return {
        "architectures": [f"{kind}Model"],
        "model_type": kind.lower(),
        "is_causal": False,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope,
        "rope_theta": shape.rope_theta,  # for older versions of transformers
        "vocab_size": len(encoder.model.embedding),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": False,
        "matryoshka_dimensions": encoder.dims,
        "dtype": str(dtype).removeprefix("torch."),
    }


def write_tokenizer(folder: Path, encoder: Encoder) -> None:
    """Write tokenizer.json and what transformers needs beside it. A text that spells an end token is ordinary text."""
    tokenizer = encoder.tokenizer
    if isinstance(tokenizer, JsonTokenizer):
        tokenizer.save(folder)
        end = unknown = tokenizer.end
    else:
        convert(tokenizer).save(str(folder / JsonTokenizer.FILE))
        end, unknown = (tokenizer.processor.id_to_piece(i) for i in (tokenizer.eos_id, tokenizer.processor.unk_id()))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": encoder.max_tokens,
        "eos_token": end,
        "pad_token": end,
        "unk_token": unknown,
        "padding_side": "right",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _json(folder / "tokenizer_config.json", about)


def _json(path, content):
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
