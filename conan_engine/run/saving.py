"""Write checkpoints while training continues.

Every rank copies its part to host memory, which training waits for, and a thread writes the copy. Only a few numbers
are gathered.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from conan_engine.errors import UserError
from conan_engine.run import checkpoint, pieces

if TYPE_CHECKING:
    from conan_engine.config import Config
    from conan_engine.data.tokenizer import AnyTokenizer
    from conan_engine.parallel.mesh import Mesh
    from conan_engine.parallel.sharded_adamw import ShardedAdamW


class Saver:
    """Writes RUN/checkpoints/<stage>-<step>, one at a time, complete or not at all.

    `start` one, `poll` it every step until it is written, `finish` it when nothing else is left to do. All are
    collectives, and raise UserError on every rank if one cannot write.

    A checkpoint is the files of every rank, then state.json with a digest of each, then its name: until then it is a
    folder .<stage>-<step>.partial. All machines share the folder.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: AnyTokenizer,
        data: dict[str, dict[str, str]],
        mesh: Mesh,
        base: dict[str, str] | None = None,
        began: float | None = None,
        precision: str | None = None,
    ) -> None:
        """data: {use: {source: fingerprint of its shards}}. base: checkpoint.base_of the frozen weights, if adapters
        are trained. began: when training began (time.perf_counter), None means now. precision: of the products,
        if the config leaves it open.
        """
        self.config, self.mesh, self.folder = config, mesh, Path(config.out_dir, "checkpoints")
        self.always = {
            "tokenizer": tokenizer.hash,
            "data": data,
            "config": dataclasses.asdict(config),
            "base": base,
            "precision": precision,
        }
        self.thread, self.work, self.state = ThreadPoolExecutor(1), None, None
        self.began = time.perf_counter() if began is None else began
        if mesh.rank == 0:
            for left in self.folder.glob(".*.partial"):  # left by a kill
                shutil.rmtree(left)

    def start(
        self,
        stage: str,
        step: int,
        optimizer: ShardedAdamW,
        stage_state: dict[str, np.ndarray],
        counters: dict[str, Any],
    ) -> None:
        """Save the trained weights, both moments of AdamW, the stage's state (negative pools), every rank's random
        state, the step and `counters`, as they are now.

        The step is all that the position in the data and the schedules depend on. Waits for the checkpoint before, then
        for the copy. Raises UserError, and keeps the checkpoint before, if some numbers are not finite.
        """
        self.finish()
        # ({name: numbers}, {name: place of the first one})
        files, finite = {"model": ({}, {}), "optimizer": ({}, {})}, []
        for key, name, first, values in optimizer.held():
            tensors, starts = files["model" if key == "weight" else "optimizer"]
            name = name if key == "weight" else f"{key}.{name}"
            tensors[name], starts[name] = _copied(values), first
            finite.append(torch.stack(values.aminmax()).isfinite().all())
        if self.mesh.any(bool(finite) and not torch.stack(finite).all()):
            raise UserError(
                f"{stage} step {step}: weights or moments are no longer finite; they are not saved, and "
                f"the checkpoint before is kept. Lower {stage}.lr "
                f"(now {getattr(self.config, stage).lr:g}) and start again: the run continues from there"
                if self.mesh.rank == 0
                else ""
            )
        stage_state = (
            {name: torch.tensor(array) for name, array in stage_state.items()} if self.mesh.rank == 0 else None
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        every = self.mesh.gather_objects((self.mesh.tensor.rank, _rng_state()))
        rngs = [rng for place, rng in every if place == 0]  # all tensor ranks draw the same numbers
        state = {
            "stage": stage,
            "step": step,
            "counters": counters,
            "seconds": time.perf_counter() - self.began,
            **self.always,
            "rngs": rngs,
        }
        self.state = json.loads(json.dumps(state))  # a copy, since training changes the original
        self.name = f"{stage}-{step:08d}"
        self.work = self.thread.submit(self._write, files, stage_state)

    def poll(self) -> None:
        """Continue with what is ready on all ranks."""
        if self.work and not self.mesh.any(not self.work.done()):
            self._advance()

    def finish(self) -> None:
        """Wait until nothing is being written."""
        while self.work:
            self.poll()
            time.sleep(0.01)

    def close(self) -> None:
        self.thread.shutdown()

    def _advance(self):
        """One step further: all ranks' files are written, or the checkpoint is complete, or a rank has failed."""
        error = self.work.exception()
        if error and not isinstance(error, (OSError, SafetensorError, UserError)):
            raise error
        outcomes = self.mesh.gather_objects(str(error) if error else self.work.result())
        failed = next((outcome for outcome in outcomes if isinstance(outcome, str)), None)
        if failed:
            self.mesh.of_all(lambda: self.mesh.rank or shutil.rmtree(self._partial(), ignore_errors=True))
            said = (
                f"cannot write it ({failed}); make room, or make the folder writable, "
                f"then run the same command again: it continues from the checkpoint before"
            )
            raise UserError(f"{self.folder / self.name}: {said}" if self.mesh.rank == 0 else "")
        state, self.state = self.state, None
        if state is None:
            self.work = None
        else:
            state["digests"] = {name: digest for outcome in outcomes for name, digest in outcome.items()}
            self.work = self.thread.submit(self._complete if self.mesh.rank == 0 else dict, state)

    def _partial(self):
        return self.folder / f".{self.name}.partial"

    def _write(self, files, stage_state):
        """Write this rank's files to disk; {name: digest}."""
        partial, digests = self._partial(), {}
        partial.mkdir(parents=True, exist_ok=True)
        for name, (tensors, starts) in files.items():
            path = partial / f"{name}-{self.mesh.rank:05d}-of-{self.mesh.world:05d}.safetensors"
            pieces.write(path, tensors, starts, self.mesh.tensor)
            digests[path.name] = checkpoint.digest(path)
            checkpoint.sync(path)
        if stage_state is not None:
            save_file(stage_state, partial / "stage.safetensors")
            digests["stage.safetensors"] = checkpoint.digest(partial / "stage.safetensors")
            checkpoint.sync(partial / "stage.safetensors")
        return digests

    def _complete(self, state):
        """On rank 0: write the index, rename the folder, and remove checkpoints older than the newest `keep`."""
        partial, final = self._partial(), self.folder / self.name
        for name in state["digests"]:
            if not (partial / name).exists():
                raise UserError(
                    f"{name} was written by another machine and is not here: out_dir must be a folder that all share"
                )
        (partial / "state.json").write_text(json.dumps(state))
        checkpoint.sync(partial / "state.json")
        checkpoint.sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        checkpoint.sync(self.folder)
        best = state["counters"].get("best")
        for old in checkpoint.of_stage(self.config.out_dir, state["stage"])[self.config.keep :]:
            if not (self.config.validation.keep_best and best and old.name == f"{state['stage']}-{best['step']:08d}"):
                shutil.rmtree(old)
        return {}


def _copied(values):
    """A copy in host memory, taken when the GPU has reached this point."""
    return torch.empty_like(values, device="cpu", pin_memory=values.is_cuda).copy_(values, non_blocking=True)


def _rng_state():
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state().tolist()).hex() if torch.cuda.is_available() else "",
    }
