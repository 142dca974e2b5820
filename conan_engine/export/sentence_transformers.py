"""A folder that sentence-transformers loads, and transformers too: no code of ours in it."""

import json

import torch
from safetensors.torch import save_file

from conan_engine.export import card, llama
from conan_engine.export.fast_tokenizer import convert

POOLING = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write(folder, run, encoder, dtype):
    """Into `folder`, which exists; run: where results.json may be; dtype: a key of DTYPES."""
    model, dtype = encoder.model, DTYPES[dtype]
    _json(folder / "config.json", llama.config(model, encoder.tokenizer, encoder.max_tokens, encoder.dims, dtype))
    tensors = {name: tensor.to(dtype) for name, tensor in llama.tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder, encoder)
    # by the names that sentence-transformers 5 and 6 both know
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(parts)]
    _json(folder / "modules.json", modules)
    pooling = {key: key == POOLING[model.config.pooling] for key in ("pooling_mode_cls_token", "pooling_mode_max_tokens", *POOLING.values())}
    for part, content in (("1_Pooling", {"word_embedding_dimension": model.config.width, **pooling}), ("2_Normalize", {})):
        (folder / part).mkdir()
        _json(folder / part / "config.json", content)
    _json(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_tokens, "do_lower_case": False})
    _json(folder / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"})
    (folder / "README.md").write_text(card.text(run, encoder), encoding="utf-8")


def write_tokenizer(folder, encoder):
    """tokenizer.json, and what transformers wants to know beside it. A text that spells an end token is a text like others."""
    fast, processor = convert(encoder.tokenizer), encoder.tokenizer.processor
    fast.save(str(folder / "tokenizer.json"))
    end, unknown = processor.id_to_piece(encoder.tokenizer.eos_id), processor.id_to_piece(processor.unk_id())
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
