"""What attn.py measures: soft-masked attention as this engine and as each of its peers computes it."""

import importlib
import inspect
from dataclasses import dataclass, field, replace

import measured
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from conan_kernels import soft_mask_attention, soft_mask_plan
from conan_kernels.attention.reference import soft_mask_attention_reference, soft_mask_bias

PLAIN = {"CONAN_HOPPER": "0"}


class Problem:
    """A packed batch: q [T, H, D], k and v [T, G, D], dout [T, H, D]."""

    def __init__(self, lengths, alpha, H, G, D, device, dtype):
        self.lengths, self.alpha, self.H, self.G, self.D, self.device = lengths, alpha, H, G, D, device
        T, self.B, self.L = sum(lengths), len(lengths), max(lengths)
        self.q, self.k, self.v, self.dout = (
            torch.randn(T, heads, D, device=device, dtype=dtype) for heads in (H, G, G, H)
        )
        self.cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
        self.even = len(set(lengths)) == 1
        pairs = sum(n * (n + 1) // 2 if alpha == 0 else n * n for n in lengths)
        self.flops = 4 * D * H * pairs  # forward

    def own(self):
        """bool [B, L]: what of a padded batch is not padding."""
        return torch.arange(self.L, device=self.device) < self.cu_seqlens.diff()[:, None]

    def padded(self, x):
        """[T, heads, D] -> [B, heads, L, D]"""
        if self.even:
            return x.view(self.B, self.L, *x.shape[1:]).transpose(1, 2)
        dense = x.new_zeros(self.B, self.L, *x.shape[1:])
        dense[self.own()] = x
        return dense.transpose(1, 2)

    def packed(self, x):
        x = x.transpose(1, 2)
        return x.flatten(0, 1) if self.even else x[self.own()]


@dataclass
class Form:
    """run() -> out, in the form's own layout, as are the leaves and dout; packed(out) -> [T, H, D]."""

    run: object
    leaves: tuple
    dout: torch.Tensor
    packed: object = lambda out: out
    environment: dict = field(default_factory=dict)  # variables that its kernels are chosen by


def leaves(*tensors):
    return tuple(x.detach().requires_grad_() for x in tensors)


def ours(p):
    qkv = leaves(p.q, p.k, p.v)
    alpha = torch.tensor(p.alpha, device=p.device)
    plan = soft_mask_plan(p.q, p.cu_seqlens, alpha)
    return Form(lambda: soft_mask_attention(*qkv, p.cu_seqlens, alpha, plan=plan), qkv, p.dout)


def plain(p):
    """ours without the kernels for Hopper."""
    with measured.environment(**PLAIN):
        return replace(ours(p), environment=PLAIN)


def reference(p):
    qkv = leaves(p.q, p.k, p.v)
    return Form(lambda: soft_mask_attention_reference(*qkv, p.cu_seqlens, p.alpha), qkv, p.dout)


def sdpa(backend):
    def form(p):
        qkv = leaves(*map(p.padded, (p.q, p.k, p.v)))
        mask = None
        if 0 < p.alpha < 1:  # [L, L], or [B, 1, L, L] where lengths differ
            biases = [
                soft_mask_bias(n, p.alpha, dtype=torch.float32, device=p.device)
                for n in ([p.L] if p.even else p.lengths)
            ]
            # finite: padding rows are not NaN
            padded = [F.pad(bias, (0, p.L - len(bias)) * 2, value=-1e4) for bias in biases]
            mask = (padded[0] if p.even else torch.stack(padded)[:, None]).to(p.q.dtype)
        elif p.alpha == 1 and not p.even:
            mask = p.own()[:, None, None, :].expand(-1, 1, p.L, -1)

        def run(gqa=True):
            q, k, v = qkv
            if not gqa:
                k, v = (x.repeat_interleave(p.H // p.G, dim=1) for x in (k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=p.alpha == 0, enable_gqa=gqa)

        try:
            torch.autograd.grad(run(), qkv, p.padded(p.dout))
            return Form(run, qkv, p.padded(p.dout), p.packed)
        except RuntimeError:  # this backend knows no grouped heads: they are copied for it, within its time
            return Form(lambda: run(gqa=False), qkv, p.padded(p.dout), p.packed)

    return form


def nested(p):
    if 0 < p.alpha < 1:
        raise ValueError("nested tensors take no mask")
    qkv = leaves(p.q, p.k, p.v)
    offsets = p.cu_seqlens.long()

    def run():
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                x.repeat_interleave(p.H // x.shape[1], dim=1), offsets, min_seqlen=min(p.lengths), max_seqlen=p.L
            )
            for x in qkv
        )
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=p.alpha == 0).transpose(1, 2).values()

    return Form(run, qkv, p.dout)


def varlen(p):
    """PyTorch's own varlen attention, which is flash-attention 2."""
    from torch.nn.attention.varlen import varlen_attn

    if 0 < p.alpha < 1:
        raise ValueError("takes no mask")
    qkv = leaves(p.q, p.k, p.v)
    known = inspect.signature(varlen_attn).parameters
    options = (
        {"window_size": (-1, 0) if p.alpha == 0 else (-1, -1)}
        if "window_size" in known
        else {"is_causal": p.alpha == 0}
    )

    def run():
        q, k, v = qkv
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:  # torch before 2.12: the heads are copied for it, within its time
            k, v = (x.repeat_interleave(p.H // p.G, dim=1) for x in (k, v))
        return varlen_attn(q, k, v, p.cu_seqlens, p.cu_seqlens, p.L, p.L, **options)

    return Form(run, qkv, p.dout)


def flash_attn(module):
    def form(p):
        attend = importlib.import_module(module).flash_attn_varlen_func
        if 0 < p.alpha < 1:
            raise ValueError("takes no mask")
        qkv = leaves(p.q, p.k, p.v)
        lengths = dict(cu_seqlens_q=p.cu_seqlens, cu_seqlens_k=p.cu_seqlens, max_seqlen_q=p.L, max_seqlen_k=p.L)

        def run():
            out = attend(*qkv, **lengths, causal=p.alpha == 0)
            return out[0] if isinstance(out, tuple) else out

        return Form(run, qkv, p.dout)

    return form


def flex(backend):
    def form(p):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # else one row of all tokens, [1, heads, T, D]
        heads = p.padded if p.even else lambda x: x.transpose(0, 1)[None]
        qkv = leaves(*map(heads, (p.q, p.k, p.v)))
        length = p.L if p.even else len(p.q)
        score_mod = block_mask = None
        if 0 < p.alpha < 1:
            columns = [torch.arange(1, n + 1, device=p.device) / n for n in ([p.L] if p.even else p.lengths)]
            bias = (p.alpha / torch.cat(columns)).clamp(max=1).log()  # [length], of the future of each column

            def score_mod(score, b, h, q, k):
                return torch.where(k <= q, score, score + bias[k])

        if p.alpha == 0 or not p.even:
            sequence = torch.zeros(length, dtype=torch.int32, device=p.device)
            if not p.even:
                sequence = torch.repeat_interleave(torch.arange(p.B, device=p.device), p.cu_seqlens.diff())

            def visible(b, h, q, k):
                return (sequence[q] == sequence[k]) & ((k <= q) | (p.alpha > 0))

            def causal(b, h, q, k):
                return k <= q

            block_mask = create_block_mask(causal if p.even else visible, None, None, length, length, device=p.device)
        compiled = torch.compile(flex_attention, dynamic=False)
        options = {"BACKEND": backend}

        def run():
            return compiled(*qkv, score_mod=score_mod, block_mask=block_mask, enable_gqa=True, kernel_options=options)

        return Form(run, qkv, heads(p.dout), p.packed if p.even else lambda out: out[0].transpose(0, 1))

    return form


def peers(device):
    """({name: form} for sequences of one length, the same for packed batches); says who is not installed."""
    dense = {"SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION), "SDPA math": sdpa(SDPBackend.MATH)}
    if device == "cpu":
        print("left out, for they need a GPU: SDPA cuDNN, SDPA efficient, varlen, FlexAttention's backward, flash-attn")
        return dense, {"nested SDPA": nested}
    dense |= {"SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION), "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION)}
    either = {"Flex Triton": flex("TRITON")}
    for name, module, form in (
        ("Flex FLASH", "flash_attn.cute", flex("FLASH")),
        ("flash-attn 2", "flash_attn", flash_attn("flash_attn")),
        ("flash-attn 3", "flash_attn_interface", flash_attn("flash_attn_interface")),
        ("flash-attn 4", "flash_attn.cute", flash_attn("flash_attn.cute")),
    ):
        try:
            importlib.import_module(module)
            either[name] = form
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return dense | either, {"nested SDPA": nested, "varlen": varlen} | either
