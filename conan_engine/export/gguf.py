"""One file for llama.cpp (`llama-embedding`, `llama-server --embedding`): its Llama, bidirectional, with pooling and tokenizer."""

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, PoolingType, TokenType, quants

from conan_engine import checkpoint
from conan_engine.export import llama
from conan_engine.model import NORM_EPS

DTYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32, "f32"),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, "bf16"),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, "f16"),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, "q8_0"),
}
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BLOCK = 32  # numbers that share a scale in q8_0: rows of another length stay float16


def write(folder, run, encoder, dtype):
    """Into `folder`, which exists; dtype: a key of DTYPES. Norms are float32 always, as llama.cpp wants them."""
    kind, file_type, ending = DTYPES[dtype]
    shape, tokenizer = encoder.model.config, encoder.tokenizer
    name = checkpoint.newest(run)[0].parent.parent.resolve().name
    writer = GGUFWriter(folder / f"{name}-{ending}.gguf", "llama")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_block_count(shape.layers)
    writer.add_context_length(encoder.max_tokens)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_vocab_size(tokenizer.vocab_size)
    writer.add_causal_attention(False)
    writer.add_pooling_type({"mean": PoolingType.MEAN, "last": PoolingType.LAST}[shape.pooling])
    _add_tokenizer(writer, tokenizer)
    for full, tensor in llama.tensors(encoder.model).items():
        array = tensor.numpy()
        if "q_proj" in full or "k_proj" in full:
            array = _neighbours(array, shape.width // shape.heads)
        *layer, part = full.removesuffix(".weight").split(".", 2) if full.startswith("layers.") else (full.removesuffix(".weight"),)
        own = GGMLQuantizationType.F32 if array.ndim == 1 else GGMLQuantizationType.F16 if kind == GGMLQuantizationType.Q8_0 and array.shape[1] % BLOCK else kind
        prefix = f"blk.{layer[1]}." if layer else ""
        writer.add_tensor(f"{prefix}{NAMES[part]}.weight", quants.quantize(array, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _neighbours(weight, head):
    """Rows of a projection so that RoPE's pairs, (d, d + D/2) of each head, are neighbours: llama.cpp turns (2d, 2d + 1)."""
    return np.ascontiguousarray(weight.reshape(-1, 2, head // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape))


def _add_tokenizer(writer, tokenizer):
    """llama.cpp's "llama" tokenizer is sentencepiece's BPE. It does not know our escapes: a text's own U+2581, U+001A or NUL gets
    other tokens."""
    processor, ids = tokenizer.processor, range(tokenizer.vocab_size)
    kinds = ((processor.is_unknown, TokenType.UNKNOWN), (processor.is_control, TokenType.CONTROL), (processor.is_unused, TokenType.UNUSED), (processor.is_byte, TokenType.BYTE))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([processor.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types([next((kind for is_kind, kind in kinds if is_kind(i)), TokenType.NORMAL) for i in ids])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(processor.unk_id())
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
