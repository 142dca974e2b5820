"""`conan_kernels.soft_mask_attention` among PyTorch's own: opcheck, torch.compile, checkpoints, autocast, strides,
errors."""

import sys

import pytest
import torch
from interpreted import bf16_as_a_gpu_has_it
from soft_mask_cases import DEVICE, batch, results_and_gradients
from torch.utils.checkpoint import checkpoint

from conan_kernels import soft_mask_attention, soft_mask_plan
from conan_kernels.attention import gradients, launch, tiles
from conan_kernels.attention.reference import soft_mask_attention_reference

# log2 0 of a closed future; and in dk_dv the columns past a sequence's end, which are computed and not stored
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch):
    bf16_as_a_gpu_has_it(monkeypatch)


def number(alpha, dtype=torch.float32):
    return torch.tensor(alpha, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("dtype", "mask"), [(torch.float32, "column"), (torch.bfloat16, "row"), (torch.float16, "uniform")]
)
def test_opcheck(dtype, mask):
    a = batch([5, 0, 3], 2, 1, 16, dtype)
    leaves = [a[name].requires_grad_() for name in ("q", "k", "v")]
    of_plan = a["cu_seqlens"], number(0.3), 8, 16, dtype, mask, 0.25
    of_shapes = "test_schema", "test_faketensor"  # slots without work hold whatever lay in memory
    torch.library.opcheck(torch.ops.conan.soft_mask_plan.default, of_plan, test_utils=of_shapes)
    batch_of = a["cu_seqlens"], number(0.3), torch.ops.conan.soft_mask_plan(*of_plan)
    torch.library.opcheck(torch.ops.conan.soft_mask_attention.default, (*leaves, *batch_of, mask, 0.25))
    out, lse = torch.ops.conan.soft_mask_attention(*leaves, *batch_of, mask, 0.25)
    vectors = a["dout"], *(x.detach() for x in leaves)
    arguments = *vectors, *batch_of, out.detach(), lse.detach(), mask, 0.25
    torch.library.opcheck(torch.ops.conan.soft_mask_attention_backward.default, arguments)


def test_one_graph_under_compile_for_every_alpha_and_its_results():
    arguments = batch([20, 3], 2, 1, 16)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(soft_mask_attention, fullgraph=True, backend=backend)
    for alpha in (0.0, 0.25, 1.0):
        found, expected = (
            results_and_gradients(form, arguments, number(alpha)) for form in (compiled, soft_mask_attention)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(graphs) == 1


def test_forward_and_backward_are_one_graph_each_under_compile():
    arguments = batch([20, 3], 2, 1, 16)
    compiled = torch.compile(soft_mask_attention, fullgraph=True, backend="aot_eager")
    for alpha in (0.5, number(0.5)):
        found, expected = (results_and_gradients(form, arguments, alpha) for form in (compiled, soft_mask_attention))
        torch.testing.assert_close(found, expected)


def test_a_changed_alpha_or_batch_gives_the_kernels_nothing_to_compile_anew(monkeypatch):
    """What a kernel is compiled for is the types of its arguments, its constants, and whether 1 or 16 divides an
    integer, but for those it names: all that must stay, while alpha and the lengths change."""
    compiled_for = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                named = dict(zip(self.kernel.arg_names, arguments)) | constants
                free = {"plan_blocks": {"B", "T", "slots"}}.get(self.kernel.__name__, {"T"})
                shown = {
                    name: (x.dtype if isinstance(x, torch.Tensor) else x)
                    for name, x in named.items()
                    if name not in free
                }
                compiled_for.append((self.kernel.__name__, shown))
                self.kernel[grid](*arguments, **constants)

            return launch

    for name in ("plan_blocks", "forward_block", "dq_block", "dk_dv_block"):
        monkeypatch.setattr(launch, name, Recorded(getattr(launch, name)))
    runs = []
    for alpha, lengths in ((0, [20]), (0.3, [3, 16, 0]), (1, [1]), (number(0.7), [7, 7])):
        compiled_for.clear()
        results_and_gradients(soft_mask_attention, batch(lengths, 2, 1, 16), alpha)
        runs.append(list(compiled_for))
    assert len(runs[0]) == 4 and all(run == runs[0] for run in runs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    arguments = batch([20, 3], 2, 1, 16)
    expected = results_and_gradients(soft_mask_attention, arguments, number(0.5), "row")
    leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v")]
    checkpoint(
        soft_mask_attention, *leaves, arguments["cu_seqlens"], number(0.5), "row", use_reentrant=reentrant
    ).backward(arguments["dout"])
    for name, leaf in zip(("dq", "dk", "dv"), leaves):
        assert torch.equal(leaf.grad, expected[name])


def test_autocast_sets_the_dtype_and_gradients_come_in_the_inputs_own():
    arguments = batch([20, 3], 2, 1, 16)
    expected = results_and_gradients(soft_mask_attention, arguments, 0.5, dtype=torch.bfloat16)
    arguments["dout"] = arguments["dout"].bfloat16()
    leaves = [arguments[name].detach().requires_grad_() for name in ("q", "k", "v")]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = soft_mask_attention(*leaves, arguments["cu_seqlens"], 0.5)
    assert torch.equal(out, expected["out"])
    for name, gradient in zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, arguments["dout"])):
        assert gradient.dtype == torch.float32 and torch.equal(gradient, expected[name].float())


def test_strided_inputs_give_the_bits_of_contiguous_ones():
    arguments = batch([20, 3], 4, 2, 16)
    expected = results_and_gradients(soft_mask_attention, arguments, 0.5)
    T = 23
    fused = torch.randn(T, 8, 16, device=DEVICE)  # q, k and v of one projection
    by_head = {name: arguments[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("q", "k", "v", "dout")}
    by_column = {name: arguments[name].mT.contiguous().mT for name in ("q", "k", "v", "dout")}
    side_by_side = dict(zip(("q", "k", "v"), fused.split([4, 2, 2], dim=1)))
    for name, x in side_by_side.items():
        x.copy_(arguments[name])
    side_by_side["dout"] = arguments["dout"][:1].expand(T, -1, -1)  # as `out.sum().backward()` would: stride 0
    assert not any(x.is_contiguous() for strided in (by_head, by_column, side_by_side) for x in strided.values())
    for strided in (by_head, by_column):
        torch.testing.assert_close(
            results_and_gradients(soft_mask_attention, arguments | strided, 0.5), expected, rtol=0, atol=0
        )
    found = results_and_gradients(soft_mask_attention, arguments | side_by_side, 0.5)
    again = results_and_gradients(soft_mask_attention, arguments | {"dout": side_by_side["dout"].contiguous()}, 0.5)
    torch.testing.assert_close(found, again, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_plan_changes_no_bit(dtype):
    arguments = batch([20, 0, 300], 2, 1, 16, dtype)
    plan = soft_mask_plan(arguments["q"], arguments["cu_seqlens"], 0.5, "row")
    found = results_and_gradients(soft_mask_attention, arguments, 0.5, "row", plan=plan)
    again = results_and_gradients(soft_mask_attention, arguments, 0.5, "row")
    assert plan and all(torch.equal(found[name], x) for name, x in again.items())
    with pytest.raises(ValueError, match="plan must be of the 7 tokens of q, not of 320"):
        results_and_gradients(soft_mask_attention, batch([7], 2, 1, 16, dtype), 0.5, plan=plan)


def test_alpha_and_the_log_sum_exp_carry_no_gradient():
    arguments = batch([20, 3], 2, 1, 16)
    alpha = number(0.5).requires_grad_()
    q = arguments["q"].requires_grad_()
    out, lse = soft_mask_attention(q, arguments["k"], arguments["v"], arguments["cu_seqlens"], alpha, return_lse=True)
    assert out.requires_grad and not lse.requires_grad
    out.sum().backward()
    assert q.grad.abs().max() > 0 and alpha.grad is None


def test_without_the_interpreter_a_cpu_takes_the_reference_form(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launch, "forward", None)
    monkeypatch.setattr(launch, "backward", None)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = batch([20, 0, 3], 4, 2, 16, dtype, "cpu")
        expected = results_and_gradients(soft_mask_attention_reference, arguments, 0.5)
        for form in (soft_mask_attention, torch.compile(soft_mask_attention, fullgraph=True, backend="aot_eager")):
            torch.testing.assert_close(results_and_gradients(form, arguments, 0.5), expected, rtol=0, atol=0)


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    T, H, D = 700, 1, 16
    a = batch([T], H, 1, D, torch.bfloat16)
    with LargestTensor() as largest:
        plan = launch.plan(a["cu_seqlens"], number(0.5), T, D, torch.bfloat16, "column", 0.25)
        out, lse = launch.forward(a["q"], a["k"], a["v"], plan, "column", 0.25)
        launch.backward(a["dout"], a["q"], a["k"], a["v"], plan, out, lse, "column", 0.25)
    assert T * H * D <= largest.elements <= 2 * T * H * D


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def bounds(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.randn(9, 64)},
            r"q must be \[T, H, D\], k and v \[T, G, D\]; their shapes are \(9, 64\), \(9, 2, 16\), \(9, 2, 16\)",
        ),
        ({"v": torch.randn(9, 2, 32)}, r"their shapes are \(9, 4, 16\), \(9, 2, 16\), \(9, 2, 32\)"),
        ({"q": torch.randn(8, 4, 16)}, r"their shapes are \(8, 4, 16\), \(9, 2, 16\)"),
        ({"q": torch.randn(9, 3, 16)}, "query heads must be a multiple of that of KV heads; they are 3 and 2"),
        ({"k": torch.randn(9, 0, 16), "v": torch.randn(9, 0, 16)}, "a multiple of that of KV heads; they are 4 and 0"),
        ({name: torch.randn(9, 2, 24) for name in "qkv"}, "head dim must be a multiple of 16 from 16 to 128, not 24"),
        ({name: torch.randn(9, 2, 144) for name in "qkv"}, "not 144"),
        (
            {"k": torch.randn(9, 2, 16).half()},
            "one dtype, bfloat16, float16 or float32, not torch.float32, torch.float16, torch.float32",
        ),
        ({name: torch.randn(9, 2, 16).double() for name in "qkv"}, "not torch.float64"),
        ({"cu_seqlens": bounds(0, 9, dtype=torch.int64)}, r"cu_seqlens must be int32 \[B\+1\], not torch.int64 \[2\]"),
        ({"cu_seqlens": bounds(0, 9)[None]}, r"not torch.int32 \[1, 2\]"),
        ({"cu_seqlens": bounds()}, r"not torch.int32 \[0\]"),
        ({"cu_seqlens": bounds(0)}, "cu_seqlens holds no sequence, but there are 9 tokens"),
        (
            {"cu_seqlens": bounds(0, 5, 4, 9)},
            r"cu_seqlens must rise from 0 to the number of tokens, 9; it is \[0, 5, 4, 9\]",
        ),
        ({"cu_seqlens": bounds(1, 9)}, r"it is \[1, 9\]"),
        ({"cu_seqlens": bounds(0, 8)}, r"it is \[0, 8\]"),
        ({"cu_seqlens": bounds(*[0] * 9, 10)}, r"it is \[0, 0, 0, 0\] ... \[0, 0, 0, 10\]"),
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\], not -0.1"),
        ({"alpha": float("nan")}, r"alpha must lie in \[0, 1\], not nan"),
        ({"alpha": torch.tensor(1.5)}, r"alpha must lie in \[0, 1\], not 1.5"),
        ({"alpha": torch.tensor(float("nan"))}, r"alpha must lie in \[0, 1\], not nan"),
        ({"alpha": torch.tensor([0.5])}, r"alpha must be a number or a 0-d tensor, not of shape \[1\]"),
        ({"alpha": torch.tensor(0.5, device="meta")}, "must be on one device, not cpu, cpu, cpu, cpu, meta"),
        ({"mask": "diagonal"}, "mask must be one of column, row, uniform, not 'diagonal'"),
        ({"scale": 0}, "scale must be a positive number, not 0.0"),
        ({"scale": float("inf")}, "scale must be a positive number, not inf"),
        ({"scale": float("nan")}, "scale must be a positive number, not nan"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "q": torch.randn(9, 4, 16),
        "k": torch.randn(9, 2, 16),
        "v": torch.randn(9, 2, 16),
        "cu_seqlens": bounds(0, 9),
        "alpha": 0.5,
    }
    soft_mask_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        soft_mask_attention(**(arguments | change))


@pytest.mark.gpu
def test_on_the_gpu_nothing_waits_and_a_changed_alpha_or_batch_compiles_nothing():
    def run(alpha, lengths):
        arguments = batch(lengths, 4, 2, 112, torch.bfloat16)
        alpha = number(alpha)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results_and_gradients(soft_mask_attention, arguments, alpha)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def compiled():
        kernels = tiles.plan_blocks, tiles.forward_block, gradients.dq_block, gradients.dk_dv_block
        if launch.hopper.runs(torch.device("cuda"), 112, torch.bfloat16):
            from conan_kernels.attention.hopper import dk_dv, dq, forward

            kernels = tiles.plan_blocks, forward.forward_blocks, dq.dq_blocks, dk_dv.dk_dv_blocks
        return [sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in kernels]

    run(0.3, [100, 7])
    before = compiled()
    assert min(before) > 0
    for alpha, lengths in ((0.0, [128]), (1.0, [1]), (0.5, [1000, 0, 0, 17]), (1e-4, [16] * 16)):
        run(alpha, lengths)
    assert compiled() == before


@pytest.mark.gpu
def test_inductor_and_cuda_graphs_take_a_new_alpha():
    arguments = batch([200, 31], 4, 2, 112, torch.bfloat16)
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(soft_mask_attention, fullgraph=True, mode=mode)
        for alpha in (0.0, 0.3, 1.0):
            found, expected = (
                results_and_gradients(form, arguments, number(alpha)) for form in (compiled, soft_mask_attention)
            )
            torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "wrong", ["alpha=float('nan')", "alpha=1.5", "cu=[0, 9, 5, 20]", "cu=[0, 19]", "cu=[0, 21]", "cu=[1, 20]"]
)
def test_on_the_gpu_what_only_the_device_knows_fails_there(wrong):
    """In a process of its own, for a failed assertion ends the device's context."""
    import subprocess

    code = f"""
import torch, conan_kernels
settings = dict(alpha=0.5, cu=[0, 20]) | dict({wrong})
q = torch.randn(20, 1, 16, device="cuda")
cu_seqlens = torch.tensor(settings["cu"], dtype=torch.int32, device="cuda")
conan_kernels.soft_mask_attention(q, q, q, cu_seqlens, torch.tensor(settings["alpha"], device="cuda"))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "device-side assert" in done.stderr
