"""Adapters: what they add, on how many ranks ever; what is saved of them; and whose weights they belong to."""

import json
import shutil

import pytest
import torch
from runs import losses, one_line, train
from safetensors import safe_open

from conan_engine.config import Lora, Model
from conan_engine.model import lora
from conan_engine.model.transformer import Transformer
from conan_engine.run import checkpoint

SHAPE = Model(layers=2, width=32, ffn=48, heads=4, kv_heads=2, context=64)
RANK = 3


def _adapted(targets):
    model = Transformer(SHAPE, 50).init_weights(0)
    lora.adapt(model, Lora(rank=RANK, alpha=6.0, targets=targets), seed=1)
    return model


def _embedded(model):
    generator = torch.Generator().manual_seed(3)
    return model.embed(torch.randint(50, (30,), generator=generator).int(), torch.tensor([0, 11, 30]).int(), alpha=0.5)


@pytest.mark.parametrize("targets", [["qkv", "attention_out", "gate_up", "ffn_out"], ["qkv"], ["ffn_out", "gate_up"]])
def test_adapters_begin_at_nothing_and_merge_into_what_they_do(targets):
    plain = _embedded(Transformer(SHAPE, 50).init_weights(0))
    model = _adapted(targets)
    torch.testing.assert_close(_embedded(model), plain)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(
        f"blocks.{i}.{target}.{part}" for i in range(2) for target in targets for part in ("down", "up")
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".up"):
                p.normal_()
    changed = _embedded(model)
    assert (changed - plain).abs().max() > 0.1
    lora.merge(model)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in Transformer(SHAPE, 50).named_parameters()
    ]
    torch.testing.assert_close(_embedded(model), changed, rtol=1e-4, atol=1e-4)


STEPS = ["--lora.rank=3", "--weak.steps=4", "--supervised.steps=4", "--stages=['weak','supervised']", "--save_every=2"]


@pytest.fixture(scope="module")
def adapted_run(tiny, whole, tmp_path_factory):
    run = tmp_path_factory.mktemp("lora") / "run"
    code, out, err = train(tiny, run, f"--init_from={whole}", *STEPS)
    assert code == 0, err
    return run


def test_a_checkpoint_holds_the_adapters_alone(adapted_run, whole):
    for sort, times in (("model", 1), ("optimizer", 2)):
        with safe_open(
            adapted_run / f"checkpoints/supervised-00000004/{sort}-00000-of-00001.safetensors", "pt"
        ) as file:
            names = list(file.keys())
            assert len(names) == 8 * times and all(name.endswith((".down", ".up")) for name in names)
    new, old = (dict(checkpoint.load_model(run)[0].named_parameters()) for run in (adapted_run, whole))
    assert new.keys() == old.keys()
    for name, p in new.items():
        change = p - old[name]
        if "_norm" in name or name in ("norm", "embedding"):
            assert not change.any()
        else:
            singular = torch.linalg.svdvals(change)
            assert singular[0] > 1e-4 and (singular[RANK:] < 1e-2 * singular[0]).all()


@pytest.mark.slow
def test_two_by_two_ranks_have_the_losses_of_one(tiny, adapted_run, whole, tmp_path):
    code, out, err = train(
        tiny, tmp_path / "run", f"--init_from={whole}", *STEPS, "--tensor_parallel=2", "--recompute=block", ranks=4
    )
    assert code == 0, err
    assert [x[2] for x in losses(tmp_path / "run")] == pytest.approx([x[2] for x in losses(adapted_run)], rel=1e-5)


def test_it_goes_on_bit_for_bit_and_with_its_own_adapters_only(tiny, adapted_run, whole, tmp_path):
    run = shutil.copytree(adapted_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/supervised-00000004")
    one_line(
        train(tiny, run, f"--init_from={whole}", *STEPS, "--lora.rank=4"), "lora.rank was 3 and is 4 now", "set it back"
    )
    code, out, err = train(tiny, run, f"--init_from={whole}", *STEPS)
    assert code == 0 and "resuming after step 2 of supervised" in out, err
    assert losses(run) == losses(adapted_run)


@pytest.mark.slow
def test_a_run_starts_from_weights_and_adapters_together(tiny, adapted_run, tmp_path):
    code, out, err = train(
        tiny, tmp_path / "run", f"--init_from={adapted_run}", "--stages=['weak']", "--weak.steps=1", "--weak.lr=0"
    )
    assert code == 0, err
    new, old = (dict(checkpoint.load_model(run)[0].named_parameters()) for run in (tmp_path / "run", adapted_run))
    assert all(torch.equal(p, old[name]) for name, p in new.items())


@pytest.mark.slow
def test_weights_that_are_not_what_they_were_are_named(tiny, adapted_run, whole, tmp_path):
    base = shutil.copytree(whole, tmp_path / "base")
    code, out, err = train(tiny, tmp_path / "run", f"--init_from={base}", *STEPS)
    assert code == 0, err
    state = next(base.glob("checkpoints/supervised-*/state.json"))
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 5}))
    for _ in range(2):
        with pytest.raises(checkpoint.UserError, match="holds adapters of .*, which is missing or has changed"):
            checkpoint.load_model(tmp_path / "run")
        shutil.rmtree(base, ignore_errors=True)


def test_adapters_of_nothing_are_named(tiny, tmp_path):
    one_line(train(tiny, tmp_path / "run", "--lora.rank=3"), "lora.rank is 3; expected 0 without init_from")
    one_line(
        train(tiny, tmp_path / "run", "--lora.targets=['q_proj']"),
        "lora.targets is ['q_proj']; expected some of qkv, attention_out, gate_up, ffn_out",
    )
