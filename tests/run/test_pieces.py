"""Parts of parameters, as the ranks of one mesh wrote them, read as those of another need them."""

import random

import pytest
import torch

from conan_engine.parallel.mesh import Group
from conan_engine.parallel.tensor_parallel import Split
from conan_engine.run import pieces
from conan_engine.run.pieces import Pieces

RANKS = (1, 2, 4)
SHAPES = {  # each with how it is cut, if at all
    "columns": ((24, 5), Split(0, (16, 4, 4))),
    "rows": ((7, 12), Split(1, (12,))),
    "gate and up, turned": ((3, 16), Split(1, (8, 8))),
    "norm": ((9,), None),
}


def _parameter(whole, split, group):
    """A rank's own part of a whole parameter."""
    part = torch.nn.Parameter(split.cut(whole, group).clone() if split else whole.clone())
    if split:
        part.split_by = split
    return part


def _write(folder, wholes, ranks, data):
    """What `data` copies of a model on so many ranks each leave: consecutive parts of any size, also none."""
    for place in range(ranks):
        group = Group(rank=place, world=ranks)
        tensors, starts = [{} for _ in range(data)], [{} for _ in range(data)]
        for name, (_, split) in SHAPES.items():
            if split or place == 0:
                flat = _parameter(wholes[name], split, group).detach().flatten()
                edges = [0, *sorted(random.randint(0, len(flat)) for _ in range(data - 1)), len(flat)]
                for copy, (start, end) in enumerate(zip(edges, edges[1:])):
                    if start < end:
                        tensors[copy][name], starts[copy][name] = flat[start:end].clone(), start
        for copy in range(data):
            pieces.write(folder / f"{copy}-{place}", tensors[copy], starts[copy], group)
    return Pieces(sorted(folder.iterdir()))


@pytest.mark.parametrize("data", [1, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_any_mesh_reads_what_another_wrote(tmp_path, ranks, data):
    wholes = {name: torch.randn(shape) for name, (shape, _) in SHAPES.items()}
    found = _write(tmp_path, wholes, ranks, data)
    for group in (Group(rank=place, world=world) for world in RANKS for place in range(world)):
        for name, (_, split) in SHAPES.items():
            p = _parameter(wholes[name], split, group)
            flat = p.detach().flatten()
            out = torch.full_like(flat, torch.nan)
            found.read_into(out, name, p, group)
            assert torch.equal(out, flat), (name, group.world)
            for _ in range(10):
                start = random.randrange(len(flat))
                out = torch.full((random.randint(1, len(flat) - start),), torch.nan)
                found.read_into(out, name, p, group, start)
                assert torch.equal(out, flat[start : start + len(out)]), (name, group.world, start)


def test_whole_tensors_of_a_file_that_says_nothing_of_ranks(tmp_path):
    wholes = {name: torch.randn(shape) for name, (shape, _) in SHAPES.items()}
    pieces.save_file(wholes, tmp_path / "model.safetensors")
    found = Pieces([tmp_path / "model.safetensors"])
    for name, (_, split) in SHAPES.items():
        p = _parameter(wholes[name], split, Group(rank=1, world=2))
        found.read_into(p.detach().view(-1).zero_(), name, p, Group(rank=1, world=2))
        assert torch.equal(p, _parameter(wholes[name], split, Group(rank=1, world=2)))


def test_a_part_that_no_file_has_is_an_error(tmp_path):
    wholes = {name: torch.randn(shape) for name, (shape, _) in SHAPES.items()}
    _write(tmp_path, wholes, 2, 1)
    found = Pieces([tmp_path / "0-0"])
    p = _parameter(wholes["rows"], SHAPES["rows"][1], Group())
    for name in ("rows", "columns", "another"):
        with pytest.raises(KeyError, match=name):
            found.read_into(torch.empty(p.numel()), name, p, Group())
