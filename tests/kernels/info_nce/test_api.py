"""Both forms of `conan_kernels.info_nce`, chunked on the CPU and Triton, against the textbook form in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from info_nce_cases import assert_as_exact_as_textbook, batch, clear_margin, results_and_gradients
from interpreted import bf16_as_a_gpu_has_it

import conan_kernels
from conan_kernels import InfoNCE, Known, Margin, products
from conan_kernels.info_nce import api, chunked, launch
from conan_kernels.info_nce.launch import fused_info_nce
from conan_kernels.info_nce.reference import info_nce_reference

DIMS = (3, 7, 8, 20, 30, 40, 44)
GROUPS = {"query_group": torch.zeros(9).long(), "document_group": torch.zeros(12).long()}


def on_cuda(*positional, **named):
    positional, named = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, (positional, named))
    return InfoNCE(*(x.cpu() for x in conan_kernels.info_nce(*positional, **named)))


@pytest.fixture(params=["chunked", "triton"])
def info_nce(request, monkeypatch):
    """The public function, by the form named: Triton on a GPU where there is one, else in Triton's interpreter."""
    if request.param == "triton" and torch.cuda.is_available():
        return on_cuda
    if request.param == "triton":
        bf16_as_a_gpu_has_it(monkeypatch)
        monkeypatch.setattr(api, "chunked_info_nce", fused_info_nce)
    return conan_kernels.info_nce


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_chunked_equals_textbook(data):
    N, M, E = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70)), data.draw(st.integers(4, 48))
    dims = sorted(data.draw(st.sets(st.integers(4, E), min_size=1, max_size=7)))
    arguments = batch(
        N,
        M,
        E,
        K=data.draw(st.sampled_from([0, 1, 7])),
        groups=data.draw(st.booleans()),
        known=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**32)),
        temperature=data.draw(st.sampled_from([0.005, 0.02, 1.0])),
    )
    weights = data.draw(st.none() | st.lists(st.floats(0.1, 2), min_size=len(dims), max_size=len(dims)))
    assert_as_exact_as_textbook(conan_kernels.info_nce, arguments, dims=dims, weights=weights)


@pytest.mark.parametrize(
    ("N", "M", "E", "K", "dims"),
    [
        (1, 1, 4, 0, (4,)),
        (37, 91, 48, 7, DIMS),
        (150, 300, 64, 0, (64,)),
        (130, 65, 192, 1, (64, 192)),
        (129, 257, 16, 0, (8, 16)),
    ],
)
def test_equals_textbook(info_nce, N, M, E, K, dims):
    for temperature in (0.005, 0.1):
        assert_as_exact_as_textbook(info_nce, batch(N, M, E, K, K > 0, temperature=temperature), dims=dims)


@pytest.mark.parametrize(("groups", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_known_positives_are_no_negatives(info_nce, groups, dtype):
    arguments = batch(70, 80, 48, K=3, groups=groups, known=True, dtype=dtype)
    assert_as_exact_as_textbook(info_nce, arguments, dims=(7, 44))
    with_all = info_nce(**{name: value for name, value in arguments.items() if name != "known"}, dims=(7, 44))
    assert info_nce(**arguments, dims=(7, 44)).loss < with_all.loss


def test_a_query_with_eight_positives_has_nothing_to_tell_apart(info_nce):
    arguments = batch(8, 8, 16) | {
        "target": torch.arange(8),
        "query_group": torch.arange(8),
        "document_group": torch.arange(8),
    }
    known = Known(torch.zeros(8).long(), torch.full((8,), 8), torch.arange(8))
    found = info_nce(**arguments, known=known)
    assert found.loss == 0 and found.accuracy == 1
    none = Known(known.first, known.first, known.ids)  # empty ranges
    torch.testing.assert_close(info_nce(**arguments, known=none).loss, info_nce(**arguments).loss)


@pytest.mark.parametrize(
    ("N", "M", "E", "K", "dims", "dtype"),
    [
        (1, 1, 4, 0, (4,), torch.float32),
        (37, 91, 48, 7, DIMS, torch.float32),
        (150, 300, 64, 0, (64,), torch.float32),
        (130, 65, 48, 1, (7, 44), torch.bfloat16),
        (20, 3, 16, 2, (16,), torch.float16),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_both_ways_equals_textbook(info_nce, N, M, E, K, dims, dtype, known):
    arguments = batch(N, M, E, K, groups=known, known=known, temperature=0.005 if known else 0.1, dtype=dtype)
    assert_as_exact_as_textbook(info_nce, arguments, dims=dims, symmetric=True)


def test_both_ways_with_a_margin_equals_textbook(info_nce):
    arguments = batch(37, 91, 48, groups=True)
    assert_as_exact_as_textbook(info_nce, arguments, dims=DIMS, symmetric=True, margin=clear_margin(arguments, DIMS))


def test_log_sums_of_documents_are_the_textbooks(info_nce):
    arguments = batch(37, 91, 48, groups=True, known=True)
    given = [arguments[name].clone().requires_grad_() for name in ("queries", "documents", "temperature")]
    groups = arguments["query_group"], arguments["document_group"], arguments["known"]
    if torch.cuda.is_available():
        pytest.skip("the form is chosen by the device")
    found = conan_kernels.log_sum_exp_of_documents(given[0], given[1], arguments["target"], given[2], (7, 48), *groups)
    q, d, T = (x.detach().double().requires_grad_() for x in given)
    left_out = torch.zeros(37, 91, dtype=torch.bool)
    for i in range(37):
        left_out[i] = torch.isin(
            groups[1], torch.cat((groups[0][i : i + 1], groups[2].ids[groups[2].first[i] : groups[2].last[i]]))
        ) & (groups[1] >= 0)
    left_out[torch.arange(37), arguments["target"]] = True
    cosines = [
        torch.nn.functional.normalize(q[:, :dim], dim=1) @ torch.nn.functional.normalize(d[:, :dim], dim=1).T
        for dim in (7, 48)
    ]
    wanted = torch.stack([(cosine / T).masked_fill(left_out, -1e20).logsumexp(0) for cosine in cosines])
    some = ~left_out.all(0)
    torch.testing.assert_close(found[:, some], wanted[:, some].float(), rtol=1e-4, atol=1e-4)
    upstream = torch.randn(2, 91) * some
    for one, other in zip(
        torch.autograd.grad(found, given, upstream), torch.autograd.grad(wanted, (q, d, T), upstream.double())
    ):
        torch.testing.assert_close(one, other.float(), rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_one_way_alone_is_another_loss(info_nce):
    """Two equal queries, of which one document is near and one is not: by hand, in both directions."""
    east, north = torch.eye(2)
    arguments = dict(
        queries=torch.stack([east, east]), documents=torch.stack([east, north]), target=torch.arange(2), temperature=1.0
    )
    one_way = math.log(math.e + 1) - 0.5  # the mean of log(e + 1) - 1 and log(e + 1) - 0
    torch.testing.assert_close(info_nce(**arguments).loss.item(), one_way, rtol=1e-5, atol=0)
    found = info_nce(**arguments, symmetric=True).loss.item()
    torch.testing.assert_close(found, (one_way + math.log(2)) / 2, rtol=1e-5, atol=0)


def wrong_temperature(info_nce, arguments, **options):
    return info_nce(**(arguments | {"temperature": arguments["temperature"] * (1 + 1e-4)}), **options)


def a_document_left_out(info_nce, arguments, **options):
    nobodys = min(set(range(len(arguments["documents"]))) - set(arguments["target"].tolist()))
    groups = {
        "query_group": torch.zeros_like(arguments["target"]),
        "document_group": torch.full((len(arguments["documents"]),), -1),
    }
    groups["document_group"][nobodys] = 0
    return info_nce(**arguments, **groups, **options)


@pytest.mark.parametrize("wrong", [wrong_temperature, a_document_left_out])
def test_a_planted_error_is_found(info_nce, wrong):
    with pytest.raises(AssertionError, match="error .* allowed"):
        assert_as_exact_as_textbook(
            lambda dims, **arguments: wrong(info_nce, arguments, dims=dims), batch(37, 91, 48), dims=DIMS
        )


def test_a_single_column_gives_signs(info_nce):
    arguments = batch(20, 30, 1)
    found = results_and_gradients(info_nce, arguments)
    sign = arguments["queries"].sign() * arguments["documents"].sign().T  # [N, M]
    expected = torch.nn.functional.cross_entropy(sign / 0.05, arguments["target"])
    torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=1e-5)
    # a cosine of single numbers cannot change but by rounding, which is relative to the number that the gradient is by
    assert (found["dqueries"] * arguments["queries"]).abs().max() < 16 * torch.finfo(torch.float32).eps / 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [0, 7])
def test_half_precision_equals_textbook(info_nce, dtype, K):
    assert_as_exact_as_textbook(info_nce, batch(37, 91, 48, K, groups=True, dtype=dtype), dims=DIMS)


@pytest.mark.parametrize("fraction", [False, True])
def test_margin_leaves_out_what_the_textbook_leaves_out(info_nce, fraction):
    arguments = batch(37, 91, 48, K=0, groups=True)
    margin = clear_margin(arguments, DIMS, fraction)
    assert_as_exact_as_textbook(info_nce, arguments, dims=DIMS, margin=margin)
    unfiltered = info_nce(**arguments, dims=DIMS).loss_per_dim
    # not all: a large dim may have none to leave out
    assert (info_nce(**arguments, dims=DIMS, margin=margin).loss_per_dim < unfiltered).any()


def test_margin_leaves_out_hard_negatives(info_nce):
    arguments = batch(9, 20, 16, K=2)
    arguments["hard"] = torch.stack((arguments["documents"][arguments["target"]] * 2, arguments["hard"][:, 0]), dim=1)
    arguments["queries"] = arguments["documents"][arguments["target"]] + torch.randn(9, 16)
    result = info_nce(**arguments, margin=-0.01)  # the first hard negative is the positive itself, scaled
    without = info_nce(**(arguments | {"hard": arguments["hard"][:, 1:]}), margin=-0.01)
    torch.testing.assert_close(result.loss, without.loss)
    torch.testing.assert_close(result.hard[:, 0], result.positive)


@pytest.mark.parametrize("rows", [1, 100, 1000])
def test_chunks_do_not_change_the_result(monkeypatch, rows):
    arguments = batch(530, 90, 24, K=2, groups=True, known=True)
    whole = results_and_gradients(conan_kernels.info_nce, arguments, dims=(8, 24))
    monkeypatch.setattr(chunked, "chunk_rows", lambda *shape: rows)
    for name, value in results_and_gradients(conan_kernels.info_nce, arguments, dims=(8, 24)).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("info_nce", ["triton"], indirect=True)
def test_panels_do_not_change_the_result(info_nce, monkeypatch):
    arguments = batch(260, 270, 16, K=2, groups=True, known=True, dtype=torch.float16)
    whole = results_and_gradients(info_nce, arguments, dims=(8, 16))
    monkeypatch.setattr(launch, "PANEL", 256)
    for name, value in results_and_gradients(info_nce, arguments, dims=(8, 16)).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3 if value.dtype == torch.float16 else 1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the library's product is the way of all tests")
def test_one_dim_by_the_librarys_product(monkeypatch):
    """What a CPU's library lacks stands in for it: a product that adds to fp32."""
    calls = []

    def add_product_(total, a, b, first):
        calls.append(first)
        total.copy_(a.float() @ b.float() + (0 if first else total))

    monkeypatch.setattr(products, "adds_in_float32", lambda device: True)
    monkeypatch.setattr(products, "add_product_", add_product_)
    monkeypatch.setattr(launch, "PANEL", 256)
    monkeypatch.setattr(api, "chunked_info_nce", fused_info_nce)
    bf16_as_a_gpu_has_it(monkeypatch)
    arguments = batch(260, 270, 24, K=2, groups=True, dtype=torch.bfloat16)
    assert_as_exact_as_textbook(conan_kernels.info_nce, arguments, dims=(16,))
    assert calls == [True, True, False, True, True, False, False, False]  # of each panel both sides


def test_same_inputs_give_the_same_bits(info_nce):
    arguments = batch(40, 50, 16, K=2)
    first = results_and_gradients(info_nce, arguments, dims=(8, 16))
    for _ in range(3):
        for name, value in results_and_gradients(info_nce, arguments, dims=(8, 16)).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("T", [1.0, 0.02, 0.005])
def test_identical_vectors_neither_overflow_nor_go_negative(info_nce, T):
    one = torch.randn(1, 64) * 1e4
    queries, documents = one.repeat(12, 1), torch.cat((one.repeat(12, 1), -one.repeat(12, 1)))
    loss = info_nce(queries.requires_grad_(), documents, torch.arange(12), T).loss
    loss.backward()
    expected = math.log(12 + 12 * math.exp(-2 / T))
    assert abs(loss.item() - expected) < 1e-4
    assert queries.grad.isfinite().all()
    alone = info_nce(one, torch.cat((one, -one)), torch.tensor([0]), T).loss
    assert 0 <= alone.item() <= math.exp(-2 / T) + 1e-6


def test_zero_vectors_have_similarity_zero_and_no_gradient(info_nce):
    arguments = batch(8, 11, 16, K=2)
    for name in ("queries", "documents"):
        arguments[name][3] = 0
    arguments["queries"][4, :5] = 0
    arguments["hard"][2, 1] = 0
    arguments["target"][5] = 3
    found = results_and_gradients(info_nce, arguments, dims=(5, 16))
    for name, value in found.items():
        assert value.isfinite().all(), name
    assert found["positive"][5] == 0 and found["hard"][2, 1] == 0
    assert (
        (found["dqueries"][3] == 0).all() and (found["ddocuments"][3] == 0).all() and (found["dhard"][2, 1] == 0).all()
    )
    assert_as_exact_as_textbook(info_nce, arguments, dims=(5, 16))


def test_same_group_is_no_negative_unless_the_id_is_below_zero(info_nce):
    arguments = batch(6, 6, 16) | {"target": torch.arange(6)}
    alone = info_nce(**arguments, query_group=torch.zeros(6).long(), document_group=torch.zeros(6).long())
    assert alone.loss == 0 and alone.accuracy == 1
    ungrouped = info_nce(**arguments, query_group=torch.full((6,), -1), document_group=torch.full((6,), -1))
    torch.testing.assert_close(ungrouped.loss, info_nce(**arguments).loss)
    assert ungrouped.loss > 0


def test_accuracy_counts_strict_winners(info_nce):
    documents = torch.eye(4)
    queries = documents[[0, 1, 2, 3]] + 0.1
    queries[3] = documents[0] + documents[1]
    assert info_nce(queries, documents, torch.arange(4), 0.1).accuracy == 0.75
    hard = documents[[0, 2, 3, 0]][:, None]  # query 0's hard negative is as good as its positive: no win
    assert info_nce(queries, documents, torch.arange(4), 0.1, hard=hard).accuracy == 0.5


def test_no_gradient_is_computed_where_none_is_asked(info_nce):
    arguments = batch(9, 12, 16)
    with torch.no_grad():
        arguments["queries"].requires_grad_()
        assert not info_nce(**arguments).loss.requires_grad
    result = info_nce(**arguments)
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in result[1:])


def test_noncontiguous_inputs(info_nce):
    arguments = batch(9, 12, 16)
    strided = arguments | {name: arguments[name].T.contiguous().T for name in ("queries", "documents")}
    assert_as_exact_as_textbook(info_nce, strided, dims=(5, 16))  # other strides may be summed in another order


def test_autocast_does_not_round_the_similarities(info_nce):
    arguments = batch(9, 12, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(**arguments)
    torch.testing.assert_close(inside.loss, info_nce(**arguments).loss, rtol=0, atol=0)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("K", "dtype"), [(0, torch.float32), (2, torch.bfloat16)])
def test_opcheck(monkeypatch, gradients, K, dtype):
    a = batch(9, 12, 16, K, groups=K > 0, known=K > 0, dtype=dtype)
    for name in ("queries", "documents"):
        a[name].requires_grad_(gradients)
    hard = a.get("hard", torch.empty(9, 0, 16, dtype=dtype))
    arguments = (
        a["queries"],
        a["documents"],
        a["target"],
        a["temperature"],
        hard,
        a.get("query_group"),
        a.get("document_group"),
        *a.get("known", (None,) * 3),
    )
    arguments = (*arguments, [4, 16], [0.5, 0.5], math.inf, 0.0)
    for both_ways in (False, True):
        torch.library.opcheck(chunked._op, (*arguments, gradients and not both_ways, both_ways, None, None, None, None))
    bf16_as_a_gpu_has_it(monkeypatch)
    arguments = *arguments[:5], *launch.group_numbers(*arguments[5:10]), *arguments[10:]
    if torch.cuda.is_available():
        arguments = [
            x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in arguments
        ]
    for both_ways in (False, True):
        torch.library.opcheck(launch._forward, (*arguments, both_ways))


def test_compiles_without_graph_breaks(info_nce):
    arguments = batch(9, 12, 16, K=2, groups=True, known=True)

    def form(**arguments):
        return info_nce(**arguments, dims=(5, 16), margin=-0.3)

    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results_and_gradients(compiled, arguments), results_and_gradients(form, arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"documents": torch.randn(12, 17)},
            r"queries \[N, E\] and documents \[M, E\] expected, got \[9, 16\] and \[12, 17\]",
        ),
        ({"documents": torch.randn(0, 16)}, "at least one query, document and column expected"),
        (
            {"documents": torch.randn(12, 16).bfloat16()},
            "the same for all; queries are torch.float32, documents torch.bfloat16",
        ),
        ({"queries": torch.randn(9, 16).double()}, "fp32, bf16 or fp16 expected"),
        ({"hard": torch.randn(9, 16)}, r"hard \[N, K, E\] = \[9, K, 16\] expected, got \[9, 16\]"),
        ({"target": torch.zeros(9).int()}, r"target: int64 \[9\] on cpu expected, got torch.int32 \[9\]"),
        ({"target": torch.full((9,), 12)}, r"target in 0..11 expected, got 12..12"),
        ({"target": torch.full((9,), -1)}, r"target in 0..11 expected, got -1..-1"),
        ({"query_group": torch.zeros(9).long()}, "query_group and document_group expected together"),
        ({"known": Known(*(torch.zeros(9).long(),) * 3)}, "known: query_group and document_group expected with it"),
        (
            {**GROUPS, "known": Known(torch.zeros(8).long(), *(torch.zeros(9).long(),) * 2)},
            r"known.first: int64 \[9\] on cpu expected, got torch.int64 \[8\]",
        ),
        (
            {**GROUPS, "known": Known(*(torch.zeros(9).long(),) * 2, torch.zeros(2, 3).long())},
            r"known.ids: int64 \[6\] on cpu expected, got torch.int64 \[2, 3\]",
        ),
        (
            {**GROUPS, "known": Known(torch.zeros(9).long(), torch.full((9,), 4), torch.zeros(3).long())},
            r"known: ranges within 0..3 expected, got 0..4",
        ),
        (
            {**GROUPS, "known": Known(torch.ones(9).long(), torch.zeros(9).long(), torch.zeros(3).long())},
            "or one that ends before it begins",
        ),
        ({"dims": (8, 8)}, r"dims ascending in 1..16 expected, got \[8, 8\]"),
        ({"dims": (8, 17)}, r"dims ascending in 1..16 expected, got \[8, 17\]"),
        ({"dims": (8, 16), "weights": (1.0,)}, "a weight for each of 2 dims expected, got 1"),
        ({"temperature": 0.0}, "temperature above 0 expected, got 0.0"),
        ({"temperature": torch.tensor(-1.0)}, "temperature above 0 expected, got -1.0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        conan_kernels.info_nce(**(batch(9, 12, 16) | change))


def test_reference_is_cross_entropy_of_cosines():
    a = batch(9, 12, 16)
    cosine = torch.nn.functional.cosine_similarity(a["queries"][:, None], a["documents"][None], dim=-1)
    expected = torch.nn.functional.cross_entropy(cosine / a["temperature"], a["target"])
    torch.testing.assert_close(info_nce_reference(**a).loss, expected)
    assert Margin(0.1).fraction == 0


def test_memory_never_holds_the_matrix():
    N = M = 3000
    arguments = batch(N, M, 32, K=1, known=True)
    with LargestTensor() as largest:
        results_and_gradients(conan_kernels.info_nce, arguments, dims=(8, 16, 32))
    assert largest.elements <= 4 * M * 32  # no tensor beyond a constant number of the inputs' size
    with LargestTensor() as largest:
        results_and_gradients(info_nce_reference, arguments)
    assert largest.elements >= N * M  # the counter would have seen it


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(3584,), (256, 512, 1024, 1536, 2048, 3072, 3584)])
def test_peak_memory_on_the_gpu_is_below_one_and_a_half_times_inputs_and_gradients(dims):
    N, E = 65536, 3584
    queries, documents = (torch.randn(N, E, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    conan_kernels.info_nce(queries, documents, torch.arange(N, device="cuda"), 0.02, dims=dims).loss.backward()
    assert torch.cuda.max_memory_allocated() < 1.5 * 4 * N * E * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_equals_textbook(dtype):
    dims = (256, 512, 1024, 1536, 2048, 3072, 3584)
    arguments = batch(5000, 9001, 3584, K=3, groups=True, known=True, temperature=0.02, dtype=dtype, device="cuda")
    assert_as_exact_as_textbook(conan_kernels.info_nce, arguments, dims=dims)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result
