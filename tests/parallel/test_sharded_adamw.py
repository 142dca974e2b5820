"""AdamW over flat, sharded buckets is torch's AdamW, on one rank and on several; and what it sends when."""

import gc
import weakref

import pytest
import torch
from ranked import on_ranks

from conan_engine.parallel import mesh as collectives
from conan_engine.parallel import sharded_adamw
from conan_engine.parallel.mesh import Mesh
from conan_engine.parallel.sharded_adamw import ShardedAdamW
from conan_engine.run import pieces

STEPS, LR, DECAY = 5, 1e-2, 1e-2


def test_a_closed_optimizer_holds_nothing_while_the_next_one_is_made():
    model = torch.nn.Linear(4, 4)
    optimizer = ShardedAdamW(model, Mesh("cpu"), DECAY)
    held = [weakref.ref(bucket) for bucket in optimizer.buckets]
    moments = [weakref.ref(bucket.moments["exp_avg"]) for bucket in optimizer.buckets]
    optimizer.close()
    gc.collect()
    assert held and moments and not any(one() for one in held + moments)


def _model():
    torch.manual_seed(3)
    # 40 and 18 weights: filled up on three ranks
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def _data(step):
    return torch.randn(6, 7, generator=torch.Generator().manual_seed(step))


def _flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _expected():
    model = _model()
    adam = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=DECAY)
    for step in range(STEPS):
        adam.zero_grad()
        model(_data(step)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    return _flat(model)


def _saved(optimizer, folder):
    """What all ranks' optimisers hold, written to a folder of files and read."""
    mesh = optimizer.mesh
    held = [(f"{key}.{name}", start, values.clone()) for key, name, start, values in optimizer.held()]
    pieces.write(
        folder / f"{mesh.rank}",
        {name: values for name, _, values in held},
        {name: start for name, start, _ in held},
        mesh.tensor,
    )
    with mesh.together():
        pass
    return pieces.Pieces(sorted(folder.iterdir()))


def _trained(mesh, restart=None, chunks=2, dtype=torch.float32, folder=None):
    """The weights after STEPS steps, each of that many backwards; `restart`: a step at which model and optimiser are
    made anew from what they wrote into `folder`."""
    model = _model().to(mesh.device)
    optimizer = ShardedAdamW(model, mesh, DECAY, dtype)
    own = mesh.data.share(6)
    for step in range(STEPS):
        if step == restart:
            found = _saved(optimizer, folder)
            optimizer.close()
            model = _model().to(mesh.device)
            for name, p in model.named_parameters():
                found.read_into(p.detach().view(-1).zero_(), f"weight.{name}", p, mesh.tensor)
            optimizer = ShardedAdamW(model, mesh, DECAY, dtype)
            optimizer.load_state(found, steps=step)
        parts = _data(step)[own].to(mesh.device, dtype).chunk(chunks)
        for part in parts:
            if part is parts[-1]:
                optimizer.send_next()
            model(part).square().sum().backward()
        norm = optimizer.reduce_gradients()
        optimizer.step(LR, scale=min(1.0, 1.0 / (norm + 1e-6)))
        optimizer.zero_gradients()
    optimizer.close()
    return _flat(model)


@pytest.mark.parametrize("bucket", [1, 20, 1 << 25])
@pytest.mark.parametrize("restart", [None, 2])
def test_one_rank_is_torchs_adamw(monkeypatch, tmp_path, restart, bucket):
    monkeypatch.setattr(sharded_adamw, "BUCKET", bucket)
    torch.testing.assert_close(_trained(Mesh("cpu"), restart, folder=tmp_path), _expected(), rtol=1e-5, atol=1e-6)


def _check(mesh, path, folder):
    sharded_adamw.BUCKET = 20  # each layer's weights and biases by themselves
    weights = _trained(mesh, restart=3, chunks=1, folder=folder)
    assert torch.equal(mesh.gather(weights[None]), weights.expand(mesh.world, -1))  # all ranks hold the same
    assert torch.equal(_trained(mesh, chunks=1), weights)
    if mesh.rank == 0:
        torch.save(weights, path)


def test_several_ranks_are_torchs_adamw(tmp_path):
    (tmp_path / "pieces").mkdir()
    on_ranks(3, _check, str(tmp_path / "weights.pt"), tmp_path / "pieces")
    torch.testing.assert_close(torch.load(tmp_path / "weights.pt"), _expected(), rtol=1e-5, atol=1e-6)


def test_weights_in_bfloat16_have_a_float32_master(tmp_path):
    """What is computed with is rounded; what the steps add up in is not, and is what the model has in the end."""
    found, exact = _trained(Mesh("cpu"), restart=2, dtype=torch.bfloat16, folder=tmp_path), _expected()
    assert found.dtype == torch.float32 and 0 < (found - exact).norm() < 0.05 * exact.norm()
    assert torch.equal(found, _trained(Mesh("cpu"), dtype=torch.bfloat16))
    assert not torch.equal(found, found.bfloat16().float())

    model = _model()
    optimizer = ShardedAdamW(model, Mesh("cpu"), 0.0, torch.bfloat16)
    before = _flat(model)
    for _ in range(20):  # each far below a bfloat16 step
        model(_data(0).bfloat16()).square().sum().backward()
        optimizer.reduce_gradients()
        optimizer.step(1e-5, 1.0)
        optimizer.zero_gradients()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and all(p.grad is None for p in model.parameters())
    held = [
        x for b in optimizer.buckets for x in (b.weights, b.gradients, b.master, *b.moments.values()) if x.numel() > 1
    ]
    assert sum(x.nbytes for x in held) == (2 + 4 + 12) * len(before)  # on one rank; the 12 are shared out
    optimizer.close()
    moved = (_flat(model) - before.float()).abs()
    assert 1e-4 < moved.median() < 3e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_has_its_own_gradients_alone(dtype):
    """In bfloat16 the first gradient of a step overwrites the sum; one that does not come is zero."""
    used, unused = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2, bias=False)
    optimizer = ShardedAdamW(torch.nn.Sequential(used, unused), Mesh("cpu"), 0.0, dtype)
    (bucket,) = optimizer.buckets
    x = torch.randn(4, 3, dtype=dtype)
    for layers, backwards in (([used, unused], 1), ([used], 3), ([unused], 1), ([], 0)):
        optimizer.zero_gradients()
        for _ in range(backwards):
            sum(layer(x).sum() for layer in layers).backward()
        optimizer.reduce_gradients()
        for layer in (used, unused):
            expected = (backwards if layer in layers else 0) * x.float().sum(0).expand(2, -1)
            found = bucket.gradient_of[layer.weight].view(2, 3)
            torch.testing.assert_close(found, expected.to(dtype).float(), rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch sees none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_gpu_a_step_is_that_of_a_cpu(dtype):
    found = _trained(Mesh("cuda"), dtype=dtype).cpu()
    expected = _trained(Mesh("cpu"), dtype=dtype)
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(found, expected, **near)


def _blend(mesh, dtype):
    sharded_adamw.BUCKET = 20
    model, earlier = _model(), torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    for p in earlier.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(4))
    expected, kept = 0.3 * _flat(model) + 0.7 * _flat(earlier), _flat(earlier)
    optimizer = ShardedAdamW(model, mesh, DECAY, dtype)
    optimizer.blend(earlier, 0.3)
    model(_data(0).to(dtype))  # waits for the weights that come from other ranks
    torch.testing.assert_close(_flat(model), expected.to(dtype))
    optimizer.close()
    torch.testing.assert_close(_flat(model), expected)
    assert torch.equal(_flat(earlier), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_blends_its_share_with_an_earlier_model(dtype):
    on_ranks(3, _blend, dtype)


def _watch(mesh, bytes_a_parameter, dtype):
    """One step of two backwards, with a note of each collective and of each layer's backward."""
    seen = []

    def noting(name, collective):
        def noted(out, given, **options):
            seen.append(
                (
                    name,
                    given.numel() * given.element_size()
                    if name == "reduce-scatter"
                    else out.numel() * out.element_size(),
                )
            )
            return collective(out, given, **options)

        return noted

    collectives._reduce_scatter = noting("reduce-scatter", collectives._reduce_scatter)
    collectives._all_gather = noting("all-gather", collectives._all_gather)
    sharded_adamw.BUCKET = 1
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(3)))
    for number, layer in enumerate(model):
        layer.register_forward_pre_hook(lambda *_, number=number: seen.append(("forward", number)))
        layer.weight.register_hook(lambda _, number=number: seen.append(("backward", number)))
    optimizer = ShardedAdamW(model, mesh, DECAY, dtype)
    x = torch.randn(4, 8, dtype=dtype)
    model(x).sum().backward()
    optimizer.send_next()
    model(x).sum().backward()
    optimizer.reduce_gradients()
    optimizer.step(LR, 1.0)
    optimizer.zero_gradients()
    # on their way while the next step begins
    assert [bucket.pending is not None for bucket in optimizer.buckets] == [True] * 3
    model[0](x)
    # waited for its own alone
    assert [bucket.pending is not None for bucket in optimizer.buckets] == [False, True, True]
    optimizer.close()
    forward = [("forward", 0), ("forward", 1), ("forward", 2)]
    backward = [("backward", 2), ("backward", 1), ("backward", 0)]
    size = 64 * 4
    sent = [event for back in backward for event in (back, ("reduce-scatter", size))]
    gathered = [("all-gather", 64 * bytes_a_parameter)] * 3
    assert seen[: 3 + 3 + 3 + 6 + 3] == forward + backward + forward + sent + gathered


@pytest.mark.parametrize(("dtype", "bytes_a_parameter"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_step_sends_each_bucket_once_as_soon_as_it_is_complete(dtype, bytes_a_parameter):
    on_ranks(2, _watch, bytes_a_parameter, dtype)
