"""The file for llama.cpp: what stands in it; and, where llama.cpp is (`make check-gguf` builds it), what that
computes."""

import gguf
import numpy as np
import pytest
import torch
from encoders import OTHER, TEXTS, sharp

from conan_engine.config import RopeScaling
from conan_engine.errors import UserError
from conan_engine.export.gguf import write
from conan_engine.model import llama
from conan_engine.model.gguf_model import NAMES


@pytest.mark.parametrize(("dtype", "near"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8), ("q8_0", 2**-7)])
def test_it_holds_the_weights(untrained_run, tmp_path, dtype, near):
    encoder = sharp(untrained_run)
    write(tmp_path, untrained_run, encoder, dtype)
    (path,) = tmp_path.iterdir()
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }
    expected = llama.tensors(encoder.model)
    assert len(tensors) == len(expected)
    for name, tensor in expected.items():
        layer, _, part = name.removeprefix("layers.").partition(".") if name.startswith("layers.") else ("", "", name)
        found = torch.from_numpy(
            tensors[f"blk.{layer}." * (layer != "") + NAMES[part.removesuffix(".weight")] + ".weight"].copy()
        )
        if "q_proj" in name or "k_proj" in name:  # RoPE's pairs are neighbours there
            found = found.view(-1, 8, 2, 64).transpose(1, 2).reshape(found.shape)
        # a block of q8_0 shares a scale
        largest = tensor.abs().amax(-1, keepdim=True) if dtype == "q8_0" else tensor.abs()
        assert (
            ((found - tensor).abs() <= near * largest + 1e-7).all() if tensor.dim() == 2 else torch.equal(found, tensor)
        )


def test_what_llama_cpp_cannot_turn_is_named(untrained_run, tmp_path):
    with pytest.raises(UserError, match="model.rope_scaling and model.qk_norm"):
        write(tmp_path, untrained_run, sharp(untrained_run, **OTHER), "float32")


SCRIPTS = TEXTS[1:12]
MANY = TEXTS + [f"{SCRIPTS[i % 11]} {i} {SCRIPTS[i * 7 % 11][: i % 17]}" for i in range(200 - len(TEXTS))]


# of weights drawn to be hard on it; those of the demo keep 0.999
@pytest.mark.parametrize(
    ("dtype", "least"), [("float32", 0.9999), ("float16", 0.9999), ("bfloat16", 0.999), ("q8_0", 0.99)]
)
@pytest.mark.parametrize(
    ("pooling", "other"),
    [
        ("mean", {}),
        ("last", {}),
        ("mean", OTHER | {"rope_scaling": RopeScaling()}),
        ("mean", OTHER | {"qk_norm": False}),
    ],
)
def test_llama_cpp_has_our_tokens_and_vectors(untrained_run, tmp_path, dtype, least, pooling, other):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp; `make check-gguf` builds it")
    encoder = sharp(untrained_run, pooling, context=512, **other)
    write(tmp_path, untrained_run, encoder, dtype)
    (path,) = tmp_path.iterdir()
    theirs = llama_cpp.Llama(str(path), embedding=True, n_ctx=512, n_batch=512, n_ubatch=512, verbose=False)
    for text, row, ids in zip(MANY, encoder.encode(MANY), encoder.tokenizer.encode_batch(MANY)):
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ids
        found = np.array(theirs.embed(text))
        assert found @ row / np.linalg.norm(found) > least
