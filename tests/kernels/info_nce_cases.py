"""Random inputs for the InfoNCE tests, and the rule by which a form is right."""

import torch
from rounding import assert_within

from conan_kernels import Known, Margin
from conan_kernels.info_nce.reference import info_nce_reference, similarities_and_logits, unit

NAMES = ("loss", "loss_per_dim", "positive", "hard", "accuracy", "dqueries", "ddocuments", "dtemperature", "dhard")


def batch(N, M, E, K=0, groups=False, known=False, temperature=0.05, dtype=torch.float32, seed=None, device="cpu"):
    """Arguments of `info_nce` by name: queries near their positives, some documents twice, some the positive of
    several; drawn anew each time, where no seed says which."""
    generator = torch.Generator().manual_seed(torch.randint(2**62, ()).item() if seed is None else seed)
    documents = torch.randn(M, E, generator=generator) * torch.rand(M, 1, generator=generator).add(0.1)
    target = torch.randint(M, (N,), generator=generator)
    if M > 8:  # the twins are nobody's positive: whether a positive beats its own twin is a matter of rounding
        documents[M // 2 :: 7] = documents[0]
        target[(target == 0) | ((target >= M // 2) & ((target - M // 2) % 7 == 0))] = 1
    queries = documents[target] + 0.6 * torch.randn(N, E, generator=generator)
    arguments = {"queries": queries.to(dtype), "documents": documents.to(dtype), "target": target}
    arguments["temperature"] = torch.tensor(temperature)
    if K:
        arguments["hard"] = (queries[:, None] + 1.5 * torch.randn(N, K, E, generator=generator)).to(dtype)
    if groups:
        arguments["query_group"] = torch.randint(-1, 5, (N,), generator=generator)
        arguments["document_group"] = torch.randint(-1, 5, (M,), generator=generator)
    if known:
        arguments["known"] = Known(*(x.to(device) for x in known_groups(arguments, generator)))
    return {name: value if name == "known" else value.to(device) for name, value in arguments.items()}


def known_groups(arguments, generator):
    """For each query none to three groups, some twice, some of no document or below 0; every fifth has the first one's.
    Where there are no groups yet, documents get some, and queries none of their own."""
    N, M = len(arguments["queries"]), len(arguments["documents"])
    arguments.setdefault("query_group", torch.full((N,), -1))
    arguments.setdefault("document_group", torch.randint(-1, max(1, M // 2), (M,), generator=generator))
    highest = arguments["document_group"].max().item() + 1
    count = torch.randint(0, 4, (N,), generator=generator)
    last = count.cumsum(0)
    ids = torch.randint(-1, highest + 1, (count.sum(),), generator=generator)
    first = last - count
    sharing = torch.arange(N) % 5 == 4
    first[sharing], last[sharing] = first[0], last[0]
    return first, last, ids


def clear_margin(arguments, dims, fraction=False):
    """A margin in the widest gap between the similarities' distances from the positives', so that no rounding crosses
    it."""
    distances = []
    for dim in dims:
        q, d = (unit(arguments[name][:, :dim].double()) for name in ("queries", "documents"))
        positive = (q * d[arguments["target"]]).sum(1)
        distance = q @ d.T - positive[:, None]
        distances.append(distance / positive.abs()[:, None] if fraction else distance)
    found = torch.cat([x.flatten() for x in distances]).sort().values
    found = found[(found > -0.6) & (found < -0.2)]  # well below 0: a margin that leaves something out
    widest = found.diff().argmax()
    middle = found[widest : widest + 2].mean().item()
    return Margin(fraction=middle) if fraction else Margin(absolute=middle)


def results_and_gradients(form, arguments, dtype=None, **options):
    """The five results, then the gradients of 1.7 * loss; vectors and temperature in `dtype` where given."""
    arguments = dict(arguments)
    leaves = [name for name in ("queries", "documents", "temperature", "hard") if name in arguments]
    for name in leaves:
        arguments[name] = arguments[name].detach().to(dtype or arguments[name].dtype).requires_grad_()
    result = form(**arguments, **options)
    gradients = torch.autograd.grad(1.7 * result.loss, [arguments[name] for name in leaves])
    return dict(zip(NAMES, (*result, *gradients)))


def assert_as_exact_as_textbook(form, arguments, **options):
    """Against the textbook form in fp64: no error is above twice the largest of the textbook form in the inputs' dtype,
    or, where that is larger, above what rounding may do to that number (`rounding_bounds`)."""
    exact = results_and_gradients(info_nce_reference, arguments, torch.float64, **options)
    plain = results_and_gradients(info_nce_reference, arguments, **options)
    found = results_and_gradients(form, arguments, **options)
    bounds = rounding_bounds(arguments, **options)
    for name, expected in exact.items():
        if expected.numel():
            assert_within(name, found[name], plain[name], expected, bounds[name])


def rounding_bounds(arguments, dims=None, weights=None, margin=None, symmetric=False):
    """By name, for each number of the results, what rounding may do to it on any processor and in any order of
    summation, to first order. eps is fp32's, h that of the inputs' dtype, in which gradients are given and weights
    multiply. With s the cosines over d columns, z = s / T, and p, u = dloss / dz and 1 / norms r as in
    kernels/info_nce/chunked.py:

        e_ij = eps (sqrt(d) |s_ij| + 2)             the cosine: its product, and the norms
        z_ij : (e_ij + eps (2 |s_ij| + 1)) / T      the logit, when it is divided by T and the maximum is taken off it
        p_ij : p_ij (error of z_ij + sum_j p_ij error of z_ij + (sqrt(M) + 4) eps)
        u_ij : that + (eps + 1.5 h) |u_ij|, for it is rounded, then the sum over the dims, then the gradient
        dq_i : sum_j r_i / T (error of u_ij + sqrt(M) eps |u_ij|) (|d^_j| + |s_ij| |q^_i|)     q^, d^: of length 1; dd_j
            likewise
        dT   : sum_ij (error of u_ij |z_ij| + |u_ij| error of z_ij) / T

    Both ways (symmetric) a half of each is that of the columns, whose u have the same errors by the same reasons.
    """
    a = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in arguments.items()}
    q, d, T = a["queries"], a["documents"], a["temperature"]
    (N, E), M = q.shape, len(d)
    hard = a.get("hard", q.new_empty(N, 0, E))
    dims = dims or (E,)
    weights = weights or (1 / len(dims),) * len(dims)
    eps, h = torch.finfo(torch.float32).eps, torch.finfo(arguments["queries"].dtype).eps
    h = 0.0 if h == eps else h
    b = {"loss": 0.0, "loss_per_dim": q.new_zeros(len(dims)), "accuracy": eps, "dtemperature": 0.0}
    b |= {"dqueries": torch.zeros_like(q), "ddocuments": torch.zeros_like(d), "dhard": torch.zeros_like(hard)}
    for k, (dim, weight) in enumerate(zip(dims, weights)):
        s, z, is_positive = similarities_and_logits(**(a | {"hard": hard}), dim=dim, margin=margin)
        open_z = z.masked_fill(z == -torch.inf, 0)
        of_s = eps * (dim**0.5 * s.abs() + 2)
        of_z = (of_s + eps * (2 * s.abs() + 1)) / T
        p, many = z.softmax(1), s.shape[1] ** 0.5 * eps
        of_row = (p * of_z).sum(1, keepdim=True) + many
        of_loss = of_row[:, 0] + of_z[is_positive] + eps * (z.logsumexp(1).abs() + 1)
        b["loss_per_dim"][k] = of_loss.mean()
        b["loss"] += weight * of_loss.mean().item()
        share = 1.7 * weight / N
        u, of_u = share * (p - is_positive.double()), share * p * (of_z + of_row + 4 * eps)
        if symmetric:
            u_columns, of_columns, of_their_loss = of_documents(z, of_z, is_positive, a["target"], M, eps)
            u, of_u = (u + share * u_columns) / 2, (of_u + share * of_columns) / 2
            b["loss_per_dim"][k] = (b["loss_per_dim"][k] + of_their_loss) / 2
            b["loss"] += weight * (of_their_loss - of_loss.mean()).item() / 2
        of_u = of_u + (eps + 1.5 * h) * u.abs()
        b["dtemperature"] += ((of_u * open_z.abs() + u.abs() * of_z).sum() / T).item()
        total = of_u + max(many, N**0.5 * eps) * u.abs()
        total_d, total_h, s_d, s_h = total[:, :M], total[:, M:], s[:, :M].abs(), s[:, M:].abs()
        columns = slice(0, dim)
        (Q, rq), (D, rd), (H, rh) = (unit_and_inverse_norm(x[..., columns]) for x in (q, d, hard))
        Q, D, H = Q.abs(), D.abs(), H.abs()
        b["dqueries"][:, columns] += (
            rq / T * (total_d @ D + (total_h[..., None] * H).sum(1) + (total * s.abs()).sum(1, keepdim=True) * Q)
        )
        b["ddocuments"][:, columns] += rd / T * (total_d.T @ Q + (total_d * s_d).sum(0)[:, None] * D)
        b["dhard"][..., columns] += rh / T * (total_h[..., None] * Q[:, None] + (total_h * s_h)[..., None] * H)
    b["positive"], b["hard"] = of_s[is_positive], of_s[:, M:]
    return b


def of_documents(z, of_z, is_positive, target, M, eps):
    """Of z [N, M+K] and its errors, what the documents' finding of their queries adds: N times dloss / dz, its error,
    and that of the loss."""
    others = z.masked_fill(is_positive, -torch.inf)[:, :M].clamp(min=-1e30)  # [N, M]
    log_sum = others.logsumexp(0)
    share = (others - log_sum).exp()
    of_sum = (share * of_z[:, :M]).sum(0) + (len(z) ** 0.5 + 4) * eps
    positive, of_positive = z[is_positive], of_z[is_positive]
    weight = torch.sigmoid(log_sum[target] - positive)  # [N]
    of_weight = weight * (of_sum[target] + of_positive + 4 * eps)
    u, of_u = torch.zeros_like(z), torch.zeros_like(z)
    total, of_total = (torch.zeros(M, dtype=z.dtype).index_add_(0, target, x) for x in (weight, of_weight))
    u[:, :M], of_u[:, :M] = share * total, share * (of_total + total * (of_z[:, :M] + of_sum + 4 * eps))
    u[is_positive], of_u[is_positive] = -weight, of_weight
    of_loss = of_sum[target] + 2 * of_positive + eps * (log_sum[target].abs().clamp(max=1e9) + positive.abs() + 1)
    return u, of_u, of_loss.mean()


def unit_and_inverse_norm(x):
    norm = x.norm(dim=-1, keepdim=True)
    return unit(x), torch.where(norm > 0, 1 / norm, 0)
