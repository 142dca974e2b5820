"""A GGUF file as a start: hidden states and losses are those of transformers, what we cannot do is named, some of its
layers may be taken."""

import re

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import write_model

from conan_engine.config import Model, RopeScaling
from conan_engine.data import gguf_file
from conan_engine.errors import UserError
from conan_engine.model import gguf_model, llama
from conan_engine.model.rope import frequencies
from conan_engine.model.transformer import Transformer

SHAPE = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA = (transformers.LlamaForCausalLM, transformers.LlamaConfig)
QWEN3 = (transformers.Qwen3ForCausalLM, transformers.Qwen3Config)
KINDS = {
    "llama": (*LLAMA, {}),
    "llama, tied": (*LLAMA, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama, heads of a size of their own": (*LLAMA, {"head_dim": 32}),
    "qwen3": (*QWEN3, {"head_dim": 64}),
    "qwen3, tied": (*QWEN3, {"head_dim": 128, "tie_word_embeddings": True, "rope_theta": 1e6}),
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


def make(kind):
    model, config, options = KINDS[kind]
    theirs = model(config(**{**SHAPE, **options}))
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(torch.rand_like(p) + 0.5 if p.dim() == 1 else 3)
    return theirs.eval()


def ours_of(path, layers=None):
    found, dims = gguf_model.shape(path)
    assert dims is None
    found["rope_scaling"] = RopeScaling(**found["rope_scaling"])
    found["layers"] = len(layers) if layers else found["layers"]
    model = Transformer(Model(**found), 0, "float32")
    llama.load_weights(path, model, layers)
    return model


def assert_same(ours, theirs):
    lengths = [40, 1, 17]
    ids = [torch.randint(512, (n,)) for n in lengths]
    with torch.no_grad():
        found = ours(torch.cat(ids).int(), torch.tensor([0, *lengths]).cumsum(0).int()).split(lengths)
        for row, own in zip(ids, found):
            torch.testing.assert_close(own, theirs.model(row[None]).last_hidden_state[0], rtol=1e-4, atol=5e-5)
        whole = theirs(ids[0][None], labels=ids[0][None]).loss
        loss = (
            ours.next_token_loss(
                ids[0].int(), torch.tensor([0, 40]).int(), torch.cat((ids[0][1:], torch.tensor([-100])))
            )
            / 39
        )
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "quantised"),
    [*((kind, "F32") for kind in KINDS), *(("llama", quantised) for quantised in TYPES[1:]), ("qwen3, tied", "Q4_K")],
)
def test_hidden_states_and_losses_are_those_of_transformers(tmp_path, kind, quantised):
    theirs = make(kind)
    write_model(tmp_path / "m.gguf", theirs, quantised)
    if quantised != "F32":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = ours_of(tmp_path / "m.gguf")
    assert (ours.lm_head is None) == kind.endswith("tied")
    assert_same(ours, theirs.eval())


@pytest.mark.parametrize(
    ("factor", "low", "high", "original", "theta", "head"),
    [(8.0, 1.0, 4.0, 8192, 5e5, 128), (32.0, 1.0, 4.0, 8192, 5e5, 64), (3.5, 2.0, 5.0, 32, 1e4, 64)],
)
def test_llama_3s_rope_scaling_comes_back_from_its_factors(tmp_path, factor, low, high, original, theta, head):
    own = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, head_dim=head, rope_parameters=own)).eval()
    plain = Model(head_dim=head, rope_theta=theta)
    scaled = Model(head_dim=head, rope_theta=theta, rope_scaling=RopeScaling(factor, low, high, original))
    slower = (frequencies(plain) / frequencies(scaled)).numpy()
    torch.testing.assert_close(frequencies(scaled), theirs.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    write_model(tmp_path / "m.gguf", theirs, slower=slower)
    if low == 1:
        assert gguf_model.shape(tmp_path / "m.gguf")[0]["rope_scaling"] == {
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_context": original,
        }
    assert_same(ours_of(tmp_path / "m.gguf"), theirs)


def test_other_factors_are_named(tmp_path):
    write_model(tmp_path / "m.gguf", make("llama"), slower=np.linspace(1, 8, 32, dtype=np.float32))
    with pytest.raises(UserError, match="rope_freqs.weight is no RoPE scaling of Llama 3's kind"):
        gguf_model.shape(tmp_path / "m.gguf")


@pytest.mark.parametrize("layers", [[0, 1], [2], [2, 0, 2, 1]])
def test_some_of_the_layers(tmp_path, layers):
    theirs = make("qwen3, tied")
    write_model(tmp_path / "m.gguf", theirs)
    ours = ours_of(tmp_path / "m.gguf", layers)
    theirs.model.layers = torch.nn.ModuleList(theirs.model.layers[i] for i in layers)
    theirs.config.num_hidden_layers = len(layers)
    for i, layer in enumerate(theirs.model.layers):
        layer.self_attn.layer_idx = i
    theirs.config.layer_types, theirs.config.use_cache = ["full_attention"] * len(layers), False
    assert_same(ours, theirs)


def test_pooling_and_window_are_the_files(tmp_path):
    def change(writer):
        writer.add_pooling_type(gguf.PoolingType.LAST)
        writer.add_sliding_window(48)

    write_model(tmp_path / "m.gguf", make("llama"), change=change)
    found, _ = gguf_model.shape(tmp_path / "m.gguf")
    assert (found["pooling"], found["context"]) == ("last", 48)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda writer: writer.add_expert_count(8),
            "llama.expert_count is 8: a mixture of experts, which this engine does not support",
        ),
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "llama.rope.scaling.type is 'yarn': RoPE scaling of another kind",
        ),
        (lambda writer: writer.add_logit_scale(0.5), "llama.logit_scale is 0.5: scaled logits"),
        (
            lambda writer: writer.add_pooling_type(gguf.PoolingType.RANK),
            "llama.pooling_type is 4; this engine has 1 (mean) and 3 (last)",
        ),
        (
            lambda writer: writer.add_value_length(16),
            "llama.attention.value_length is 16; expected the size of a head, 64",
        ),
        (lambda writer: writer.add_uint16("split.count", 3), "is one of 3 parts; join them"),
    ],
)
def test_what_we_cannot_do_is_named(tmp_path, change, said):
    write_model(tmp_path / "m.gguf", make("llama"), change=change)
    with pytest.raises(UserError, match=f"{tmp_path}/m.gguf: ") as error:
        gguf_model.shape(tmp_path / "m.gguf")
    assert said in str(error.value)


def test_another_architecture_is_named(tmp_path):
    from gguf_files import close, placeholders

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    placeholders(300)(writer)
    close(writer)
    with pytest.raises(
        UserError, match=r"m.gguf: general.architecture is 'gemma3'; init_from takes llama, llama-embed, qwen3"
    ):
        gguf_model.shape(tmp_path / "m.gguf")


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = write_model(tmp_path / "m.gguf", make("llama"))
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1000], "other": b"PK" + content[2:], "empty": b""}[damage])
    with pytest.raises(UserError, match=re.escape(f"{path}: cannot read it as a GGUF file")):
        gguf_file.read(path)


def test_a_tensor_that_has_no_place_or_is_missing_is_named(tmp_path):
    def extra(writer):
        writer.add_tensor("blk.0.attn_q.bias", np.zeros(256, np.float32))

    write_model(tmp_path / "bias.gguf", make("llama"), change=extra)
    with pytest.raises(
        UserError, match="bias.gguf: holds layers.0.self_attn.q_proj.bias, which this engine's model has no place for"
    ):
        ours_of(tmp_path / "bias.gguf")
    write_model(tmp_path / "more.gguf", make("llama"), change=lambda writer: writer.add_block_count(4))
    with pytest.raises(
        UserError, match="more.gguf: holds no layers.3.input_layernorm.weight, which its metadata promises"
    ):
        ours_of(tmp_path / "more.gguf")


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    path = write_model(tmp_path / "m.gguf", make("llama"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="needs the package gguf .*; pip install gguf"):
        gguf_file.read(path)
