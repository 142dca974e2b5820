"""Where a run computes, and the line where it cannot."""

import pytest
import torch

from conan_engine.errors import UserError
from conan_engine.parallel import device


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose() == device.choose("cpu") == torch.device("cpu")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"needs CUDA GPU 2, and torch .* sees 2; use --device=cpu, or fewer processes"):
        device.choose("cuda", 2)


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    with pytest.raises(
        UserError, match=r"device: Tesla V100 has compute capability 7\.0, .*; --device=cpu runs without"
    ):
        device.choose("cuda")


def test_heads_that_a_gpu_does_not_take():
    for head in (4, 24, 144):
        device.check_heads(torch.device("cpu"), head)
        with pytest.raises(UserError, match=rf"model.head_dim: heads have {head} numbers, .* or use --device=cpu"):
            device.check_heads(torch.device("cuda", 0), head)
    device.check_heads(torch.device("cuda", 0), 112)
