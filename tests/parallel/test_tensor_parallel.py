"""A model that several ranks share is the model: its vectors, its losses, its gradients."""

import pytest
import torch
from ranked import on_ranks

from conan_engine.config import Model
from conan_engine.model.lm_head import linear_cross_entropy
from conan_engine.model.transformer import Transformer
from conan_engine.parallel.mesh import Group
from conan_engine.parallel.tensor_parallel import Split, TensorParallel, own

SHAPE = {
    "layers": 2,
    "width": 48,
    "ffn": 96,
    "heads": 12,
    "kv_heads": 4,
    "context": 64,
    "rope_theta": 1e4,
    "embedding_scale": 3.0,
}
VOCAB = 100
ALPHAS = {"float32": (0.0, 0.5, 1.0), "bfloat16": (0.5,)}
# 32 tokens; fewer than ranks; 4; 0
LENGTHS = {"some": [5, 1, 0, 17, 2, 7], "few": [1], "one each": [2, 1, 1], "none": [0, 0]}


def _batch(case, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = LENGTHS[case]
    tokens = torch.randint(VOCAB, (sum(lengths),), generator=generator)
    targets = torch.randint(VOCAB, (sum(lengths),), generator=generator)
    targets[torch.rand(len(targets), generator=generator) < 0.3] = -100
    return (
        tokens,
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        targets,
        torch.randn(len(lengths), 48, generator=generator),
    )


def _computed(model, case, seed, alpha):
    """Vectors, the sum of the next tokens' losses, and the gradient that both together have for every parameter."""
    tokens, cu_seqlens, targets, weight = _batch(case, seed)
    vectors = model.embed(tokens, cu_seqlens, alpha)
    loss = model.next_token_loss(tokens, cu_seqlens, targets, alpha)
    ((vectors * weight).sum() + loss).backward()
    found = {"vectors": vectors.detach(), "loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def _shared(mesh, precision, pooling, seed, path):
    group = mesh.tensor
    model = Transformer(Model(**SHAPE, pooling=pooling), VOCAB, precision, group).init_weights(seed)
    assert sum(p.numel() for p in model.parameters() if hasattr(p, "split_by")) * group.world == sum(
        p.numel() for p in _alone(precision, pooling, seed).parameters() if p.dim() == 2
    )
    found = {}
    for case in LENGTHS:
        for alpha in ALPHAS[precision]:
            for name, x in _computed(model, case, seed, alpha).items():
                p = dict(model.named_parameters()).get(name)
                if p is None:
                    assert torch.equal(group.gather(x[None]), x.expand(group.world, *x.shape)), "the same on all ranks"
                elif hasattr(p, "split_by"):
                    x = p.split_by.join(group.gather(x[None]))
                else:
                    x = group.sum(x)
                found[f"{case} {alpha} {name}"] = x
    if group.rank == 0:
        torch.save(found, path)


def _alone(precision, pooling, seed):
    return Transformer(Model(**SHAPE, pooling=pooling), VOCAB, precision).init_weights(seed)


@pytest.mark.parametrize(
    ("world", "precision", "pooling"),
    [(2, "float32", "mean"), pytest.param(4, "float32", "last", marks=pytest.mark.slow), (4, "bfloat16", "mean")],
)
def test_ranks_that_share_a_model_have_its_vectors_losses_and_gradients(tmp_path, world, precision, pooling):
    seed = torch.randint(2**31, ()).item()
    on_ranks(world, _shared, precision, pooling, seed, str(tmp_path / "shared.pt"), tensor=world)
    found = torch.load(tmp_path / "shared.pt")
    model, exact = _alone(precision, pooling, seed), _alone("float32", pooling, seed).double()
    for case in LENGTHS:
        for alpha in ALPHAS[precision]:
            exactly = _computed(exact, case, seed, alpha)
            for name, plain in _computed(model, case, seed, alpha).items():
                x, right = found[f"{case} {alpha} {name}"], exactly[name]
                size = right.norm()
                # another order of sums; in bfloat16 also a rounding of each rank's summand
                allowed = max(2 * (plain - right).norm(), (1e-5 if precision == "float32" else 2e-2) * size)
                assert (x - right).norm() <= allowed, (case, alpha, name, (x - right).norm(), size)


def test_a_parameter_is_cut_section_by_section_and_joined_again():
    ranks = [Group(rank=rank, world=2) for rank in range(2)]
    whole = torch.arange(12.0)[:, None] + torch.arange(4.0) / 10
    qkv = Split(0, (8, 2, 2))
    assert qkv.cut(whole, ranks[1])[:, 0].tolist() == [4, 5, 6, 7, 9, 11]
    columns = Split(1, (4,))
    assert columns.cut(whole, ranks[0]).shape == (12, 2)
    for split in (qkv, columns):
        assert torch.equal(split.join([split.cut(whole, rank) for rank in ranks]), whole)


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 8])
def test_every_token_is_some_ranks(total):
    slices = [TensorParallel(Group(rank=rank, world=3)).mine(total) for rank in range(3)]
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(total))


def test_every_id_is_in_one_ranks_part_of_the_vocabulary():
    ids = torch.arange(6)
    for rank in range(3):
        place, here = own(ids, 2, Group(rank=rank, world=3))
        assert (
            here.tolist() == [i // 2 == rank for i in range(6)]
            and place[here].tolist() == [0, 1]
            and not place[~here].any()
        )


def _head(mesh, seed, path):
    hidden, weight, targets, chunk = _head_case(seed)
    import conan_engine.model.lm_head

    conan_engine.model.lm_head.CHUNK_LOGITS = {"cpu": chunk}
    hidden.requires_grad_()
    part = Split(0, (len(weight),)).cut(weight, mesh.tensor).requires_grad_()
    sizes = []
    for name in ("sum", "max"):
        collective = getattr(mesh.tensor, name)
        setattr(mesh.tensor, name, lambda x, collective=collective: (sizes.append(x.numel()), collective(x))[1])
    loss, count = linear_cross_entropy(hidden, part, targets, group=mesh.tensor)
    assert count == (targets != -100).sum() and sum(sizes) == 3 * count, "three numbers a token"
    del mesh.tensor.sum, mesh.tensor.max
    (2 * loss).backward()
    found = (
        loss.detach(),
        mesh.tensor.sum(hidden.grad),
        Split(0, (len(weight),)).join(mesh.tensor.gather(part.grad[None])),
    )
    if mesh.rank == 0:
        torch.save(found, path)


def _head_case(seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(300, (50,), generator=generator)
    targets[::7] = -100
    # logits so large that their exponentials overflow
    return 30 * torch.randn(50, 24, generator=generator), torch.randn(300, 24, generator=generator), targets, 100 * 7


def test_a_head_cut_by_vocabulary_is_as_exact_as_the_whole(tmp_path):
    seed = torch.randint(2**31, ()).item()
    on_ranks(3, _head, seed, str(tmp_path / "head.pt"), tensor=3)
    hidden, weight, targets, _ = (
        x.double().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in _head_case(seed)
    )
    exact = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    right = exact.detach(), *torch.autograd.grad(2 * exact, (hidden, weight))
    eps, largest = torch.finfo(torch.float32).eps, (hidden @ weight.T).abs().max()
    for x, expected in zip(torch.load(tmp_path / "head.pt"), right):
        # an exponent errs by eps times the largest logit and what its 24 products add up to
        assert (x - expected).norm() <= 8 * eps * largest * expected.norm()
