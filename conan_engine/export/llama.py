"""Our weights under the names that transformers gives those of a Llama. Its block is ours (pre-RMSNorm, RoPE, SwiGLU, grouped-query
attention, no biases), and `is_causal: false` makes transformers (5.2 or newer) and llama.cpp run it bidirectionally."""

from conan_engine.model import NORM_EPS


def config(model, tokenizer, max_tokens, dims, dtype):
    """config.json of a LlamaModel, a dict; dtype: the weights' torch.dtype."""
    shape = model.config
    return {
        "architectures": ["LlamaModel"],
        "model_type": "llama",
        "is_causal": False,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width // shape.heads,
        "max_position_embeddings": max_tokens,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_theta": shape.rope_theta,  # where older versions look
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": False,
        "matryoshka_dimensions": dims,
        "dtype": str(dtype).removeprefix("torch."),
    }


def tensors(model):
    """{name: float32 tensor} of a LlamaModel's parameters. What enters the first block is the token's vector times embedding_scale:
    here the vectors are multiplied."""
    shape = model.config
    head = shape.width // shape.heads
    found = {"embed_tokens.weight": model.embedding * shape.embedding_scale, "norm.weight": model.norm}
    for i, block in enumerate(model.blocks):
        q, k, v = block.qkv.weight.split([shape.heads * head, shape.kv_heads * head, shape.kv_heads * head])
        gate, up = block.gate_up.weight.chunk(2)
        own = {
            "input_layernorm": block.attention_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention_out.weight,
            "post_attention_layernorm": block.ffn_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.ffn_out.weight,
        }
        found |= {f"layers.{i}.{name}.weight": tensor for name, tensor in own.items()}
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in found.items()}
