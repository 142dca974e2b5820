"""Run by test_info_nce_ranks.py: `info_nce_ranks.py WORLD FOLDER`. Forks WORLD gloo ranks, each of which compares its loss
and gradients with those of one rank that has everything; exits with the number of ranks that failed."""

import multiprocessing
import sys

import torch
import torch.distributed as dist
from info_nce_cases import batch

from conan_kernels import gather_documents, info_nce


def check(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for dtype, K, dims in ((torch.float32, 0, (16,)), (torch.float32, 3, (4, 16)), (torch.bfloat16, 3, (4, 16))):
        whole = batch(N=world * 5, M=world * 7, E=16, K=K, groups=True, dtype=dtype)
        mine = {name: x if x.ndim == 0 else x.chunk(world)[rank] for name, x in whole.items()}
        whole["target"] = torch.arange(world).repeat_interleave(5) * 7 + torch.arange(5).repeat(world)  # row i of one's own
        mine["target"] = whole["target"].chunk(world)[rank]
        leaves = [name for name in ("queries", "documents", "temperature", "hard") if name in whole]
        for arguments in (whole, mine):
            for name in leaves:
                arguments[name] = arguments[name].clone().requires_grad_()
        expected = info_nce(**whole, dims=dims)
        expected_gradients = dict(zip(leaves, torch.autograd.grad(expected.loss, [whole[name] for name in leaves])))

        gathered = {name: gather_documents(mine[name]) for name in ("documents", "document_group")}
        found = info_nce(**(mine | gathered), dims=dims)
        gradients = dict(zip(leaves, torch.autograd.grad(found.loss / world, [mine[name] for name in leaves])))
        loss = found.loss.detach().clone()
        for tensor in (loss, gradients["temperature"]):
            dist.all_reduce(tensor)
        torch.testing.assert_close(loss / world, expected.loss.detach())
        torch.testing.assert_close(found.positive, expected.positive.chunk(world)[rank])
        for name in leaves:
            wanted = expected_gradients[name]
            wanted = wanted if wanted.ndim == 0 else wanted.chunk(world)[rank]
            assert wanted.abs().max() > 1e-4
            tolerance = {"rtol": 2e-2, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(gradients[name], wanted, **tolerance, msg=lambda text: f"rank {rank}, {name}: {text}")
    dist.destroy_process_group()


if __name__ == "__main__":
    world, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    processes = [multiprocessing.get_context("fork").Process(target=check, args=(rank, world, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(sum(process.exitcode != 0 for process in processes))
