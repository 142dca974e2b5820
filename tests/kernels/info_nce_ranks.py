"""Run by test_info_nce_ranks.py: `info_nce_ranks.py WORLD FOLDER SEED`. Forks WORLD gloo ranks, each of which compares
its loss and gradients with those of one rank that has everything; exits with the number of ranks that failed."""

import multiprocessing
import sys

import torch
import torch.distributed as dist
from info_nce_cases import batch, results_and_gradients, rounding_bounds
from rounding import assert_within

from conan_kernels import gather_documents, info_nce
from conan_kernels.info_nce.reference import info_nce_reference


def check(rank, world, folder, seed):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for dtype, K, dims in ((torch.float32, 0, (16,)), (torch.float32, 3, (4, 16)), (torch.bfloat16, 3, (4, 16))):
        whole = batch(N=world * 5, M=world * 7, E=16, K=K, groups=True, known=True, dtype=dtype, seed=seed)
        known = whole["known"]
        mine = {name: x if name == "known" or x.ndim == 0 else x.chunk(world)[rank] for name, x in whole.items()}
        mine["known"] = known._replace(first=known.first.chunk(world)[rank], last=known.last.chunk(world)[rank])
        # row i of one's own
        whole["target"] = torch.arange(world).repeat_interleave(5) * 7 + torch.arange(5).repeat(world)
        mine["target"] = whole["target"].chunk(world)[rank]
        exact = results_and_gradients(info_nce_reference, whole, torch.float64, dims=dims)
        alone = results_and_gradients(info_nce, whole, dims=dims)
        bounds = rounding_bounds(whole, dims)

        def over_ranks(documents, document_group, **arguments):
            found = info_nce(
                **arguments, documents=gather_documents(documents), document_group=gather_documents(document_group)
            )
            return found._replace(loss=found.loss / world)

        found = results_and_gradients(over_ranks, mine, dims=dims)
        for name in ("loss", "dtemperature"):
            found[name] = found[name].detach().clone()
            dist.all_reduce(found[name])
        for name in ("loss", "positive", "dqueries", "ddocuments", "dtemperature", *["dhard"] * (K > 0)):
            *expected, bound = (
                x if not torch.is_tensor(x) or x.ndim == 0 else x.chunk(world)[rank]
                for x in (alone[name], exact[name], bounds[name])
            )
            assert name in ("loss", "positive") or expected[1].abs().max() > 1e-4
            assert_within(f"rank {rank}, {name}", found[name], *expected, bound)
    dist.destroy_process_group()


if __name__ == "__main__":
    world, folder, seed = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    processes = [
        multiprocessing.get_context("fork").Process(target=check, args=(rank, world, folder, seed))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(sum(process.exitcode != 0 for process in processes))
