"""A test's function on several ranks: real processes, gloo between them."""

import importlib.util
import inspect
import os
import tempfile

import torch

from conan_engine.parallel.mesh import Mesh


def on_ranks(world, function, *arguments, tensor=1):
    """Call function(mesh, *arguments), of a test's own module, on each of `world` ranks, `tensor` of which share a
    model; an exception there is one here."""
    with tempfile.TemporaryDirectory() as folder:
        meet = f"file://{folder}/meet"
        torch.multiprocessing.spawn(
            _on_rank, (world, tensor, meet, inspect.getfile(function), function.__name__, arguments), nprocs=world
        )


def _on_rank(rank, world, tensor, meet, path, name, arguments):
    torch.set_num_threads(1)
    # pytest imports tests under names that no child knows
    spec = importlib.util.spec_from_file_location("on_rank", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    mesh = Mesh("cpu", tensor)
    getattr(module, name)(mesh, *arguments)
    mesh.close()
    # as train.py does where it fails: gloo's threads may hold what Python takes down as it ends, and then abort
    os._exit(0)
