"""What a run's model would be without parts of it, or without its blend."""

import dataclasses

import pytest
import stages
import torch

from conan_engine.evaluation.encoder import Encoder
from conan_engine.parallel.mesh import Mesh
from conan_engine.run import checkpoint
from conan_engine.settings import from_dict


@pytest.mark.parametrize("first", [False, True])
def test_what_a_blend_took_away_comes_back(whole, first):
    """As if `whole` had kept a quarter of what its weak stage changed."""
    settings = from_dict(checkpoint.newest(whole)[1]["config"], "here")
    settings = dataclasses.replace(
        settings,
        weak=dataclasses.replace(settings.weak, blend=0.25),
        stages=["weak", "supervised"] if first else settings.stages,
    )
    mesh = Mesh("cpu")
    encoder = Encoder.load(whole)
    stages.unblend(encoder, whole, settings, mesh)
    began = (
        stages.at_start(settings, mesh).model if first else checkpoint.load_model(whole / "checkpoints/sft-00000006")[0]
    )
    weak, last = (checkpoint.load_model(whole / f"checkpoints/{stage}-00000006")[0] for stage in ("weak", "supervised"))
    for found, old, new, ended in zip(*(model.parameters() for model in (encoder.model, began, weak, last))):
        torch.testing.assert_close(found, ended + 3 * (new - old), rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, ended)


def test_a_silent_part_adds_nothing(whole):
    model = checkpoint.load_model(whole)[0]
    tokens, cu_seqlens = torch.arange(3, 20, dtype=torch.int32), torch.tensor([0, 7, 17], dtype=torch.int32)
    with torch.no_grad():
        before = model.embed(tokens, cu_seqlens, 1.0, "column")
        stages.silence(model, stages.SILENT["no blocks"])
        table = model.embedding[tokens.long()]
        silent = model.embed(tokens, cu_seqlens, 1.0, "column")
    assert not torch.allclose(before, silent)
    means = torch.stack(
        [
            torch.nn.functional.rms_norm(part, (part.shape[1],), model.norm, model.config.norm_eps).mean(0)
            for part in table.split([7, 10])
        ]
    )
    torch.testing.assert_close(silent, means, rtol=1e-4, atol=1e-5)
