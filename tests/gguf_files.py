"""GGUF files as llama.cpp's converter writes them of a model of transformers, for tests to start from."""

import json

import gguf
import numpy as np
import sentencepiece
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_model(path, theirs, quantised="F32", tokenizer=None, change=lambda writer: None, slower=None):
    """theirs: a LlamaForCausalLM or Qwen3ForCausalLM; quantised: what its matrices become; tokenizer(writer): adds one;
    change(writer): adds other keys; slower: float32 [D / 2], factors by which RoPE's pairs turn slower."""
    config = theirs.config
    arch = "qwen3" if config.model_type == "qwen3" else "llama"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if arch == "qwen3" or head * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head)
        writer.add_value_length(head)
    if arch == "llama":
        writer.add_rope_dimension_count(head)
    (tokenizer or placeholders(config.vocab_size))(writer)
    change(writer)
    kind = gguf.GGMLQuantizationType[quantised]
    for name, p in theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = p.detach().float().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, head // 2, -1).swapaxes(1, 2).reshape(array.shape)
        *_, layer, part = (
            ("", "", *name.removeprefix("model.layers.").removesuffix(".weight").partition(".")[::2])
            if ".layers." in name
            else ("", "", "", "")
        )
        full = WHOLE.get(name) or f"blk.{layer}.{PARTS[part]}.weight"
        own = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else kind
        writer.add_tensor(full, _quantised(np.ascontiguousarray(array), own), raw_dtype=own)
    if slower is not None:
        writer.add_tensor("rope_freqs.weight", slower, raw_dtype=gguf.GGMLQuantizationType.F32)
    close(writer)
    return path


def _quantised(array, kind):
    """The kinds that the package can only undo are given blocks at random, of small numbers."""
    try:
        return gguf.quants.quantize(array, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.random.default_rng(array.size).integers(0, 256, (array.size // block, size), np.uint8)
        # of a scale, and the bytes at which one begins
        size, scales = {"Q4_K": (1e-4, (0, 2)), "Q6_K": (1e-5, (208,))}[kind.name]
        for at in scales:
            blocks[:, at : at + 2] = (
                np.float16(size * (1 + np.random.default_rng(at).random(len(blocks)))).view(np.uint8).reshape(-1, 2)
            )
        return blocks.reshape(len(array), -1)


def random_gguf(path, **shape):
    """A small random Llama with a byte-level tokenizer; shape: of its transformers.LlamaConfig."""
    sizes = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [f"question {i} answer {i} another wrong bad good label" for i in range(300)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    config = transformers.LlamaConfig(
        **{**sizes, "vocab_size": library.get_vocab_size(), "tie_word_embeddings": True, **shape}
    )
    return write_model(path, transformers.LlamaForCausalLM(config), "Q8_0", of_library(library, "gpt-2", "<|end|>"))


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def placeholders(count):
    """A tokenizer of bytes, and of names that no text has."""

    def add(writer):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        tokens = ["<|end|>", *bytes_to_unicode().values()]
        tokens += [f"[{i}]" for i in range(len(tokens), count)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3, *[1] * (count - 1)])
        writer.add_token_merges([])
        writer.add_eos_token_id(0)

    return add


def of_library(library, pre, end, begin=None, **flags):
    """A tokenizer of the `tokenizers` library, byte-level; flags: add_bos, add_eos."""
    about = json.loads(library.to_str())

    def add(writer):
        special = {token["id"]: token for token in about["added_tokens"]}
        vocabulary = library.get_vocab(with_added_tokens=True)
        writer.add_tokenizer_model("gpt2")
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
        writer.add_token_types(
            [(3 if special[i]["special"] else 4) if i in special else 1 for i in range(len(vocabulary))]
        )
        writer.add_token_merges([" ".join(pair) for pair in about["model"]["merges"]])
        _ends(writer, vocabulary.get(end), vocabulary.get(begin), flags)

    return add


def of_pieces(model, prefix, **flags):
    """A sentencepiece BPE model, from its bytes; prefix: whether a text gets a space before it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())
    kinds = ((processor.is_unknown, 2), (processor.is_control, 3), (processor.is_unused, 5), (processor.is_byte, 6))

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([processor.id_to_piece(i).encode() for i in ids])
        writer.add_token_scores([processor.get_score(i) for i in ids])
        writer.add_token_types([next((kind for holds, kind in kinds if holds(i)), 1) for i in ids])
        writer.add_add_space_prefix(prefix)
        _ends(writer, processor.eos_id(), processor.bos_id(), flags)

    return add


def _ends(writer, end, begin, flags):
    if end is not None:
        writer.add_eos_token_id(end)
    if begin is not None:
        writer.add_bos_token_id(begin)
    for key, value in flags.items():
        getattr(writer, f"add_{key}_token")(value)
