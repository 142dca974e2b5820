"""Run work as tasks of a Ray cluster, in place of processes on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from conan_engine.errors import UserError


def unordered(address: str, function: Callable, items: Iterable, look: Callable[[], None], gpu: bool) -> Iterator[Any]:
    """The same as processes.Pool.unordered, on the cluster at `address` ("auto": the one of this machine).

    gpu: each item has a GPU to itself, if there are any. Raises UserError if Ray is not installed or does not answer.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray: Ray is not installed; pip install 'conan-engine[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--ray: no cluster at {address!r} ({' '.join(str(error).split())}); start one with `ray start --head`"
        ) from None
    try:
        shared = ray.put(function)
        call = ray.remote(_call).options(max_retries=3, num_gpus=1 if gpu and ray.cluster_resources().get("GPU") else 0)
        waiting = {call.remote(shared, item): i for i, item in enumerate(items)}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=1)
            look()
            for reference in done:
                yield waiting.pop(reference), ray.get(reference)
    finally:
        ray.shutdown()


def _call(function, item):
    return function(item)
