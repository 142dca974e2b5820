"""The losses against values worked out by hand, and over ranks against one."""

import math

import numpy as np
import pytest
import torch
from ranked import on_ranks

from conan_engine.config import Weak
from conan_engine.model import losses
from conan_engine.parallel.mesh import Group
from conan_kernels import Known, Margin

ALONE = Group("cpu")
EPS = torch.finfo(torch.float32).eps
ROUNDING = 16 * EPS  # of cosines, a few exponentials and a logarithm near 1, whoever computes them
GROUPS = torch.tensor([1, 2])


def unit(*degrees):
    """Unit vectors in the plane, by angle: their cosines are those of the angles between."""
    angle = torch.tensor(degrees).mul(math.pi / 180)
    return torch.stack((angle.cos(), angle.sin()), dim=1)


def test_info_nce_by_hand():
    queries, documents = unit(0.0, 90.0), unit(60.0, 90.0)
    # cosines: query 0 to documents 0.5, 0; query 1 to documents sqrt(3)/2, 1. T = 0.5 doubles them.
    first = -math.log(math.exp(1.0) / (math.exp(1.0) + math.exp(0.0)))
    second = -math.log(math.exp(2.0) / (math.exp(math.sqrt(3)) + math.exp(2.0)))
    loss, accuracy = losses.info_nce(queries * 3, documents * 0.2, GROUPS, GROUPS, 0.5, ALONE)  # lengths do not matter
    assert loss.item() == pytest.approx((first + second) / 2, rel=ROUNDING)
    assert accuracy.item() == 1.0


def test_info_nce_counts_hard_negatives_and_not_the_own_group():
    queries, documents = unit(0.0, 90.0), unit(60.0, 90.0, 0.0, 180.0)
    groups = torch.tensor([1, 2, 1, -1])  # the third document is of query 0's own class
    # query 0: positive 0.5 against documents 1 (0) and 3 (-1); query 1: positive 1 against 0 (sqrt(3)/2), 2 (0) and 3
    # (0)
    first = math.log(math.exp(0.5) + math.exp(0.0) + math.exp(-1.0)) - 0.5
    second = math.log(math.exp(1.0) + math.exp(math.sqrt(3) / 2) + 2 * math.exp(0.0)) - 1.0
    loss, _ = losses.info_nce(queries, documents, GROUPS, groups, 1.0, ALONE)
    assert loss.item() == pytest.approx((first + second) / 2, rel=ROUNDING)


def test_info_nce_of_own_by_hand():
    queries, documents = unit(0.0, 90.0), unit(60.0, 90.0)
    hard = torch.stack((unit(90.0, 0.0), unit(180.0, 90.0)), dim=1)  # query 0: 0, -1; query 1: 0, 1
    first = math.log(math.exp(0.5) + math.exp(0.0) + math.exp(-1.0)) - 0.5
    second = math.log(2 * math.exp(1.0) + math.exp(0.0)) - 1.0
    loss, accuracy = losses.info_nce_of_own(queries, documents, hard, 1.0, ALONE)
    assert loss.item() == pytest.approx((first + second) / 2, rel=ROUNDING)
    assert accuracy.item() == 0.5  # query 1's second negative is as near as its positive


@pytest.mark.parametrize(
    ("margin", "strategy", "left"),
    [
        (0.2, "absolute", True),
        (0.4, "absolute", False),
        (0.5, "relative", True),
        (0.8, "relative", False),
        (2.0, "absolute", False),
    ],
)
def test_a_document_nearer_than_the_positive_by_a_margin_is_no_negative(margin, strategy, left):
    settings = Weak(margin=margin, margin_strategy=strategy)
    # query 0: 0.5, 0, sqrt(3)/2 = 0.5 + 0.37; query 1: sqrt(3)/2, 1, 0.5
    queries, documents = unit(0.0, 90.0), unit(60.0, 90.0, 30.0)
    others = [0.0] if left else [0.0, math.sqrt(3) / 2]
    first = math.log(math.exp(0.5) + sum(map(math.exp, others))) - 0.5
    second = math.log(math.exp(1.0) + math.exp(math.sqrt(3) / 2) + math.exp(0.5)) - 1.0
    loss, _ = losses.info_nce(
        queries, documents, GROUPS, torch.tensor([1, 2, 3]), 1.0, ALONE, margin=losses.margin_of(settings)
    )
    assert loss.item() == pytest.approx((first + second) / 2, rel=ROUNDING)
    hard = torch.stack((documents[2:].expand(2, -1), queries.flip(0)), dim=1)  # query 0: sqrt(3)/2, 0; query 1: 0.5, 0
    loss, _ = losses.info_nce_of_own(queries, documents[:2], hard, 1.0, ALONE, margin=losses.margin_of(settings))
    second = math.log(math.exp(1.0) + math.exp(0.5) + math.exp(0.0)) - 1.0
    assert loss.item() == pytest.approx((first + second) / 2, rel=ROUNDING)


def both_sides(queries, documents, right, symmetric, same_side, temperature):
    """In fp64: the mean cross entropy of each query over its positive, documents[i], and what is not right for it
    (right [n, m], bool; the queries stand for their positives); and of each positive over its query and the queries for
    which it is not right, and the documents that are not right for its query."""
    n, (q, d) = len(queries), (torch.nn.functional.normalize(x.double(), dim=1) for x in (queries, documents))
    own = torch.eye(n, len(d), dtype=torch.bool)
    rows = (q @ d.T / temperature).masked_fill(right & ~own, -torch.inf)
    columns = (d[:n] @ q.T / temperature).masked_fill(right[:, :n].T & ~own[:, :n], -torch.inf)
    if same_side:
        rows = torch.cat((rows, (q @ q.T / temperature).masked_fill(right[:, :n], -torch.inf)), dim=1)
        # column d_i counts row d_j where d_i is not right for query j; rows beyond the queries' know nothing but their
        # own group
        others = torch.cat((right[:, :n], torch.zeros(len(d) - n, n, dtype=torch.bool))).T
        columns = torch.cat((columns, (d[:n] @ d.T / temperature).masked_fill(others, -torch.inf)), dim=1)
    found = torch.nn.functional.cross_entropy(rows, torch.arange(n))
    return (found + torch.nn.functional.cross_entropy(columns, torch.arange(n))) / 2 if symmetric else found


@pytest.mark.parametrize("sides", [(False, False), (True, False), (False, True), (True, True)])
def test_both_ways_and_both_sides_are_the_textbooks(sides):
    queries, documents = (torch.randn(n, 8).requires_grad_() for n in (12, 17))
    groups = torch.randint(1, 7, (12,))
    document_group = torch.cat((groups, torch.tensor([-1, -1, -1, -1, -1])))
    first = torch.arange(12) % 4
    known = Known(first, first + 1, torch.tensor([3, 5, 1, 2]))  # one more right group for each query
    right = ((groups[:, None] == document_group) | (known.ids[first][:, None] == document_group)) & (
        document_group >= 0
    )
    loss, _ = losses.info_nce(queries, documents, groups, document_group, 0.1, ALONE, None, known, None, *sides)
    expected = both_sides(queries, documents, right, *sides, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, wanted in zip(
        torch.autograd.grad(loss, (queries, documents)), torch.autograd.grad(expected, (queries, documents))
    ):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-6)


def test_matryoshka_is_the_mean_over_the_dims():
    queries, documents = unit(30.0, 100.0), unit(20.0, 75.0)
    whole, _ = losses.info_nce(queries, documents, GROUPS, GROUPS, 0.1, ALONE)
    # the first number alone has cosine 1 or -1: query 0 is positive, query 1 negative, both documents positive
    short = (math.log(2) + math.log(2)) / 2
    loss, _ = losses.info_nce(queries, documents, GROUPS, GROUPS, 0.1, ALONE, dims=[1, 2])
    assert loss.item() == pytest.approx((short + whole.item()) / 2, rel=ROUNDING)


def test_cosent_by_hand():
    first, second = unit(0.0, 0.0, 0.0), unit(0.0, 60.0, 90.0)  # cosines 1, 0.5, 0
    score = torch.tensor([0.0, 1.0, 0.5])
    # ranked 1 above 2 above 0: exp of (lower cosine - higher cosine) / T over the three ordered pairs, T = 0.5
    by_hand = math.log(1 + math.exp((0 - 0.5) / 0.5) + math.exp((1 - 0.5) / 0.5) + math.exp((1 - 0) / 0.5))
    assert losses.cosent(first, second, score, 0.5, ALONE).item() == pytest.approx(by_hand, rel=ROUNDING)


def test_distilling_by_hand():
    nothing = float("nan")
    # 0.5, 0, -1; 1, 0, sqrt(2)/2
    queries, own = unit(0.0, 90.0), torch.stack((unit(60.0, 90.0), unit(90.0, 0.0), unit(180.0, 45.0)), dim=1)
    targets = torch.tensor([[2.0, 1.0, nothing], [3.0, nothing, nothing]])  # of query 1 there is nothing to tell apart
    # by T = 0.5 query 0 has 1 and 0, by a scale of 2 the teacher 1 and 0.5
    p, q = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1.0))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert losses.distil(queries * 3, own, targets, "kl", 0.5, 2.0, ALONE).item() == pytest.approx(
        kl / 2, rel=20 * ROUNDING
    )
    # a lead of 0.5, which is to be 1 * 0.5 / 2
    assert losses.distil(queries, own * 0.2, targets, "margin_mse", 0.5, 2.0, ALONE).item() == pytest.approx(
        0.25**2 / 2, rel=20 * ROUNDING
    )
    wider = torch.cat((unit(0.0, 90.0), torch.ones(2, 3)), dim=1)  # of whose numbers the teacher has two
    assert losses.toward(wider, torch.tensor([[2.0, 0.0], [1.0, 1.0]]), ALONE).item() == pytest.approx(
        (1 - math.sqrt(0.5)) / 2, abs=ROUNDING
    )


def test_cosent_of_equal_scores_is_nothing():
    assert losses.cosent(unit(0.0, 40.0), unit(10.0, 90.0), torch.tensor([0.5, 0.5]), 0.05, ALONE).item() == 0.0


TEMPERATURE = 0.1


FOUND = ("loss", "accuracy", "queries", "documents", "negatives")


def _both(group, seed, parts=((4, 3),)):
    """Loss, accuracy and gradients of a global batch of 4 queries with their documents, and 3 negatives; parts: how
    many of each every rank has."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(n, 8, generator=generator) for n in (4, 4, 3)]
    queries_of, negatives_of = map(list, zip(*parts))
    own, more = (
        slice(sum(counts[: group.rank]), sum(counts[: group.rank + 1])) for counts in (queries_of, negatives_of)
    )
    queries, documents, negatives = (x[part].requires_grad_() for x, part in zip(drawn, (own, own, more)))
    groups, score = torch.tensor([1, 2, 2, 3])[own], torch.tensor([0.1, 0.9, 0.4, 0.4])[own]
    right = Known(torch.tensor([0, 2, 0, 0])[own], torch.tensor([2, 2, 1, 0])[own], torch.tensor([3, 1]))
    everything, document_group = torch.cat((documents, negatives)), torch.cat((groups, torch.tensor([5, 1, 6])[more]))
    loss, accuracy = losses.info_nce(
        queries, everything, groups, document_group, TEMPERATURE, group, dims=[3, 8], known=right
    )
    loss = (
        loss
        + losses.info_nce(
            queries, everything, groups, document_group, TEMPERATURE, group, known=right, margin=Margin(0.1)
        )[0]
    )
    for sides in ((True, False), (False, True), (True, True)):
        loss = (
            loss
            + losses.info_nce(
                queries, everything, groups, document_group, TEMPERATURE, group, [3, 8], right, None, *sides
            )[0]
        )
    hard = torch.stack((documents, queries), dim=1)  # its own positive, and the query itself
    loss = loss + losses.info_nce_of_own(queries, documents, hard, TEMPERATURE, group, dims=[3, 8])[0]
    loss = loss + losses.cosent(queries, documents, score, TEMPERATURE, group, dims=[3, 8])
    targets = torch.tensor([[0.9, 0.1], [0.2, float("nan")], [-0.3, 0.4], [float("nan"), 0.1]])[own]
    for kind in ("kl", "margin_mse"):
        loss = loss + losses.distil(queries, hard, targets, kind, TEMPERATURE, 0.3, group, dims=[3, 8])
    loss = loss + losses.toward(queries, torch.arange(20.0).cos().view(4, 5)[own], group)
    loss.backward()
    gradients = [
        group.gather(x.grad, counts).numpy()
        for x, counts in ((queries, queries_of), (documents, queries_of), (negatives, negatives_of))
    ]
    return group.sum(loss.detach()).item(), group.sum(accuracy).item(), *gradients


def _save(group, seed, parts, path):
    found = _both(group, seed, parts)
    if group.rank == 0:
        np.savez(path, **dict(zip(FOUND, found)))


@pytest.mark.parametrize(
    "parts", [((2, 2), (2, 1)), ((3, 0), (0, 0), (1, 3))], ids=["of like size", "one of them empty"]
)
def test_parts_of_a_batch_have_the_loss_and_the_gradients_of_the_whole(tmp_path, parts):
    """Nobody waits for ever for a rank that has nothing, and a query of a small part weighs no more than others."""
    seed = torch.randint(2**31, ()).item()
    on_ranks(len(parts), _save, seed, parts, str(tmp_path / "out.npz"))
    found = np.load(tmp_path / "out.npz")
    for name, expected in zip(FOUND, _both(ALONE, seed)):
        # a cosine's rounding is divided by T before it becomes a probability, in one way or in the other
        np.testing.assert_allclose(
            found[name], expected, rtol=0, atol=8 * EPS / TEMPERATURE * max(1, np.abs(expected).max()), err_msg=name
        )
