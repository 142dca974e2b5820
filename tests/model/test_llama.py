"""Parameters under the names of a Llama and back: on tensor ranks too, from one file or several."""

import json

import pytest
import torch
from ranked import on_ranks
from safetensors.torch import save_file

from conan_engine.config import Model
from conan_engine.model import llama
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh

SHAPE = Model(layers=2, width=32, ffn=48, heads=4, kv_heads=2, head_dim=16, qk_norm=True, context=64)


def _saved(folder, files):
    """A model, as a folder of so many files; its vectors."""
    model = Transformer(SHAPE, 60, "float32").init_weights(torch.randint(2**31, ()).item())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + torch.rand_like(p))
    tensors = llama.tensors(model)
    names = [f"model-{i}.safetensors" for i in range(files)] if files > 1 else ["model.safetensors"]
    parts = [dict(list(tensors.items())[i::files]) for i in range(files)]
    for name, part in zip(names, parts):
        save_file({f"model.{key}": tensor for key, tensor in part.items()}, folder / name)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {f"model.{key}": name for name, part in zip(names, parts) for key in part}})
        )
    return _vectors(model).detach()


def _vectors(model):
    return model.embed(torch.arange(30).int(), torch.tensor([0, 11, 30]).int())


def _check(mesh, folder):
    model = Transformer(SHAPE, 60, "float32", mesh.tensor)
    llama.load_weights(folder, model)
    torch.testing.assert_close(_vectors(model), torch.load(folder / "expected"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ranks", "files"), [(1, 1), (1, 3), (2, 3)])
def test_each_rank_takes_its_part(tmp_path, ranks, files):
    torch.save(_saved(tmp_path, files), tmp_path / "expected")
    if ranks == 1:
        _check(Mesh("cpu"), tmp_path)
    else:
        on_ranks(ranks, _check, tmp_path, tensor=ranks)
