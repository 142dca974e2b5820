"""Write a run as one GGUF file for llama.cpp: a bidirectional Llama with pooling and tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, PoolingType, TokenType, quants

from conan_engine.config import RopeScaling
from conan_engine.data import gguf_tokenizer
from conan_engine.data.json_tokenizer import JsonTokenizer
from conan_engine.errors import UserError
from conan_engine.model import llama
from conan_engine.model.gguf_model import NAMES, neighbours
from conan_engine.model.rope import frequencies
from conan_engine.run import checkpoint

if TYPE_CHECKING:
    from conan_engine.evaluation.encoder import Encoder


DTYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32, "f32"),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, "bf16"),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, "f16"),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, "q8_0"),
}
BLOCK = 32  # numbers that share a scale in q8_0; rows of another length stay float16


def write(folder: Path, run: str, encoder: Encoder, dtype: str) -> None:
    """Write into `folder`, which exists. dtype: a key of DTYPES. Norms are always float32, as llama.cpp requires."""
    kind, file_type, ending = DTYPES[dtype]
    shape, tokenizer = encoder.model.config, encoder.tokenizer
    if shape.qk_norm and shape.rope_scaling.factor != 1:
        raise UserError(
            f"{run}: has both model.rope_scaling and model.qk_norm; llama.cpp's Qwen3 knows no scaling of this "
            "kind: use another --format"
        )
    name = checkpoint.newest(run)[0].parent.parent.resolve().name
    writer = GGUFWriter(folder / f"{name}-{ending}.gguf", "qwen3" if shape.qk_norm else "llama-embed")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.head)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_vocab_size(len(encoder.model.embedding))
    writer.add_causal_attention(False)
    writer.add_pooling_type({"mean": PoolingType.MEAN, "last": PoolingType.LAST}[shape.pooling])
    if isinstance(tokenizer, JsonTokenizer):
        gguf_tokenizer.write(writer, tokenizer, len(encoder.model.embedding), run)
    else:
        _add_tokenizer(writer, tokenizer, len(encoder.model.embedding))
    if shape.rope_scaling.factor != 1:  # how much slower each pair rotates
        slower = frequencies(dataclasses.replace(shape, rope_scaling=RopeScaling())) / frequencies(shape)
        writer.add_tensor("rope_freqs.weight", slower.numpy(), raw_dtype=GGMLQuantizationType.F32)
    for full, tensor in llama.tensors(encoder.model).items():
        array = tensor.numpy()
        # llama.cpp's Qwen3 rotates the same pairs as ours
        if ("q_proj" in full or "k_proj" in full) and not shape.qk_norm:
            array = neighbours(array, shape.head)
        *layer, part = (
            full.removesuffix(".weight").split(".", 2)
            if full.startswith("layers.")
            else (full.removesuffix(".weight"),)
        )
        own = (
            GGMLQuantizationType.F32
            if array.ndim == 1
            else GGMLQuantizationType.F16
            if kind == GGMLQuantizationType.Q8_0 and array.shape[1] % BLOCK
            else kind
        )
        prefix = f"blk.{layer[1]}." if layer else ""
        writer.add_tensor(f"{prefix}{NAMES[part]}.weight", quants.quantize(array, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer, tokenizer, rows):
    """llama.cpp's "llama" tokenizer is sentencepiece's BPE. It does not know our escapes: a text's own U+2581,
    U+001A and NUL get other tokens.
    """
    processor, ids = tokenizer.processor, range(tokenizer.vocab_size)
    kinds = (
        (processor.is_unknown, TokenType.UNKNOWN),
        (processor.is_control, TokenType.CONTROL),
        (processor.is_unused, TokenType.UNUSED),
        (processor.is_byte, TokenType.BYTE),
    )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    unused = range(rows - len(ids))  # the token table may have more rows than tokens
    writer.add_token_list(
        [*(processor.id_to_piece(i).encode() for i in ids), *(f"[unused {i}]".encode() for i in unused)]
    )
    writer.add_token_scores([*(processor.get_score(i) for i in ids), *(-1e4 for _ in unused)])
    writer.add_token_types(
        [
            *(next((kind for is_kind, kind in kinds if is_kind(i)), TokenType.NORMAL) for i in ids),
            *(TokenType.UNUSED for _ in unused),
        ]
    )
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(processor.unk_id())
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
