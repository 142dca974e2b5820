"""Checkpoints written beside the training: what they hold, and what becomes of them when something fails."""

import json
import re
import shutil
import threading

import pytest
import torch
from ranked import on_ranks
from runs import TINY, losses, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conan_engine.errors import UserError
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Mesh
from conan_engine.parallel.sharded_adamw import ShardedAdamW
from conan_engine.run import checkpoint, pieces
from conan_engine.run.pieces import Pieces
from conan_engine.run.saving import Saver
from conan_engine.settings import load


class Words:
    """A tokenizer, as far as a checkpoint knows one."""

    hash, vocab_size = "0" * 32, 64


def _settings(folder, tensor=1):
    path = folder / "tiny.toml"
    if not path.exists():
        path.write_text(TINY.format(folder=folder))
    return load(path, [f"--out_dir={folder}/run", f"--tensor_parallel={tensor}"])


def _trained(mesh, settings, steps=2):
    """A model and its optimiser after some steps, and how to take one more. Close the optimiser: a process that ends
    while what a step began is on its way is aborted."""
    model = Transformer(settings.model, Words.vocab_size, "float32", mesh.tensor)
    model.init_weights(1)
    optimizer = ShardedAdamW(model, mesh, 0.0)

    def step():
        optimizer.send_next()
        tokens = torch.arange(20, dtype=torch.int32) * 7 % 64
        cu_seqlens = torch.tensor([0, 20], dtype=torch.int32)
        (model.next_token_loss(tokens, cu_seqlens, tokens.long().roll(-1)) / 20).backward()
        optimizer.reduce_gradients()
        optimizer.step(1e-2, 1.0)
        optimizer.zero_gradients()

    for _ in range(steps):
        step()
    return model, optimizer, step


def _held(optimizer):
    return {(key, name, start): values.clone() for key, name, start, values in optimizer.held()}


COUNTERS = {"updates": 2}


def _restored(mesh, settings):
    folder, state = checkpoint.newest(settings.out_dir, mesh=mesh)
    model = Transformer(settings.model, Words.vocab_size, "float32", mesh.tensor)
    checkpoint.load_weights(folder, state, model, Words)
    optimizer = ShardedAdamW(model, mesh, 0.0)
    optimizer.load_state(Pieces(sorted(folder.glob("optimizer-*"))), state["counters"]["updates"])
    return optimizer


def _writes_what_was(mesh, folder):
    settings = _settings(folder, mesh.tensor.world)
    _, optimizer, step = _trained(mesh, settings)
    saver = Saver(settings, Words, {}, mesh)
    released, write = threading.Event(), pieces.write

    def late(*arguments):
        released.wait()
        write(*arguments)

    pieces.write = late
    before = _held(optimizer)
    saver.start("weak", 2, optimizer, {}, COUNTERS)
    for _ in range(3):  # goes on meanwhile
        step()
        saver.poll()
    assert saver.work and not list((folder / "run/checkpoints").glob("weak-*"))
    assert any(not torch.equal(values, before[key]) for key, values in _held(optimizer).items())
    released.set()
    saver.finish()
    again = _held(_restored(mesh, settings))
    assert again.keys() == before.keys() and all(torch.equal(again[key], before[key]) for key in before)
    files = sorted(path.name for path in (folder / "run/checkpoints/weak-00000002").iterdir())
    assert files == sorted(
        [
            *(
                f"{sort}-{rank:05d}-of-{mesh.world:05d}.safetensors"
                for sort in ("model", "optimizer")
                for rank in range(mesh.world)
            ),
            "stage.safetensors",
            "state.json",
        ]
    )
    saver.close()
    optimizer.close()


def _bytes(folder):
    """Of the tensors in a checkpoint's files, by file."""
    found = {}
    for path in folder.glob("*-of-*"):
        with safe_open(path, "pt") as file:
            found[path.name] = sum(file.get_tensor(name).nbytes for name in file.keys())
    return found


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_it_holds_the_weights_of_its_step_each_once_while_training_goes_on(tmp_path, ranks, tensor):
    on_ranks(ranks, _writes_what_was, tmp_path, tensor=tensor)
    sizes = _bytes(tmp_path / "run/checkpoints/weak-00000002")
    parameters = sum(
        p.numel() for p in Transformer(_settings(tmp_path).model, Words.vocab_size, "float32").parameters()
    )
    assert sum(sizes.values()) == 12 * parameters  # the weight and two moments, float32
    assert max(sizes.values()) < 1.1 * 8 * parameters / ranks, "shared out evenly"


def _cannot_write(mesh, folder):
    settings = _settings(folder)
    _, optimizer, step = _trained(mesh, settings)
    saver = Saver(settings, Words, {}, mesh)
    saver.start("weak", 2, optimizer, {}, COUNTERS)
    saver.finish()
    write = pieces.write

    def full(*arguments):
        write(*arguments)
        raise OSError(28, "No space left on device")

    if mesh.rank == 1:
        pieces.write = full
    saver.start("weak", 3, optimizer, {}, COUNTERS)
    with pytest.raises(UserError) as error:
        for _ in range(1000):
            step()
            saver.poll()
    expected = (
        f"{folder}/run/checkpoints/weak-00000003: cannot write it ([Errno 28] No space left on device); "
        f"make room, or make the folder writable, "
    )
    assert str(error.value) == (
        expected + "then run the same command again: it continues from the checkpoint before" if mesh.rank == 0 else ""
    )
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["weak-00000002"]
    optimizer.close()


def test_one_rank_that_cannot_write_ends_all_in_one_line(tmp_path):
    on_ranks(2, _cannot_write, tmp_path)


def _passed_over(mesh, folder):
    settings = _settings(folder)
    _, optimizer, step = _trained(mesh, settings)
    saver = Saver(settings, Words, {}, mesh)
    for number in (2, 3, 4):
        saver.start("weak", number, optimizer, {}, COUNTERS)
    saver.finish()
    # as many as `keep`
    assert sorted(path.name for path in saver.folder.iterdir()) == ["weak-00000003", "weak-00000004"]
    with mesh.together():
        if mesh.rank == 0:
            (saver.folder / "weak-00000004/optimizer-00001-of-00002.safetensors").unlink()
    assert checkpoint.newest(settings.out_dir, mesh=mesh)[0].name == "weak-00000003"
    with mesh.together():
        if mesh.rank == 0:
            (saver.folder / "weak-00000003/model-00000-of-00002.safetensors").write_bytes(b"half")
    assert checkpoint.newest(settings.out_dir, mesh=mesh) is None
    optimizer.close()


def test_a_missing_or_damaged_piece_is_met_by_all_ranks(tmp_path):
    on_ranks(2, _passed_over, tmp_path)


def test_machines_that_do_not_share_the_folder_are_told(tmp_path, monkeypatch):
    settings = _settings(tmp_path)
    alone = Mesh("cpu")
    _, optimizer, _ = _trained(alone, settings)
    saver = Saver(settings, Words, {}, alone)
    monkeypatch.setattr(pieces, "write", lambda path, *rest: path.write_bytes(b"elsewhere"))
    monkeypatch.setattr(checkpoint, "sync", lambda path: path.name.startswith("model") and path.unlink())
    saver.start("weak", 2, optimizer, {}, COUNTERS)
    with pytest.raises(
        UserError,
        match="model-00000-of-00001.safetensors was written by another machine and is not here: out_dir must be a "
        "folder that all share",
    ):
        saver.finish()


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path):
    settings = _settings(tmp_path)
    left = tmp_path / "run/checkpoints/.weak-00000002.partial"
    left.mkdir(parents=True)
    (left / "model-00000-of-00009.safetensors").write_bytes(b"half")
    Saver(settings, Words, {}, Mesh("cpu"))
    assert not left.exists()


def _as_before_pieces(run):
    """Rewrite a run's checkpoints as they were before: one file of whole weights, one of whole moments."""
    for folder in run.glob("checkpoints/*"):
        state = json.loads((folder / "state.json").read_text())
        shapes = {name: p.shape for name, p in checkpoint.load_model(folder)[0].named_parameters()}
        for sort in ("model", "optimizer"):
            path = folder / f"{sort}-00000-of-00001.safetensors"
            tensors = load_file(path)
            path.unlink()
            whole = {
                name: tensor.view(shapes[re.sub(r"^exp_avg(_sq)?\.", "", name)]) for name, tensor in tensors.items()
            }
            save_file(whole, folder / f"{sort}.safetensors")
        state["digests"] = {
            f"{name}.safetensors": checkpoint.digest(folder / f"{name}.safetensors")
            for name in ("model", "optimizer", "stage")
        }
        (folder / "state.json").write_text(json.dumps(state))


def test_checkpoints_of_one_file_go_on_bit_for_bit_and_are_loaded(tiny, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/supervised-00000006")
    _as_before_pieces(run)
    code, out, err = train(tiny, run)
    assert code == 0 and "resuming after step 4 of supervised" in out, err
    assert losses(run) == losses(whole)
    old, *_ = checkpoint.load_model(run / "checkpoints/supervised-00000004")
    new, *_ = checkpoint.load_model(whole / "checkpoints/supervised-00000004")
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters()))
