"""Where the kernels for Hopper run, and in which layout they take tensors."""

import pytest
import torch

from conan_kernels.attention.hopper import launch


def test_a_head_dim_that_they_lack_is_one_line():
    launch._runs.cache_clear()
    with pytest.warns(
        UserWarning, match=r"a head dim of 64, 80, 96, 112, 128, not 48: the plain kernels run"
    ) as raised:
        assert not launch._runs(90, 48, torch.float16)
    assert len(raised) == 1 and "\n" not in str(raised[0].message)


def test_they_run_for_16_bits_on_sm_90_alone(monkeypatch, recwarn):
    launch._runs.cache_clear()
    assert launch._runs(90, 64, torch.float16) and launch._runs(90, 112, torch.bfloat16)
    assert not launch._runs(90, 112, torch.float32) and not launch._runs(100, 112, torch.bfloat16)
    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    assert launch.runs(torch.device("cuda"), 112, torch.bfloat16)
    assert not launch.runs(torch.device("cpu"), 112, torch.bfloat16)
    monkeypatch.setenv("CONAN_HOPPER", "0")
    assert not launch.runs(torch.device("cuda"), 112, torch.bfloat16)
    assert not recwarn


def test_more_rows_than_tma_can_count_are_one_line():
    launch.check(torch.empty(2**24 - 1, 0))
    with pytest.raises(ValueError, match="must be below 16777216, not 16777216: attend in parts"):
        launch.check(torch.empty(2**24, 0))


def test_rows_that_tma_cannot_take_are_copied():
    x = torch.randn(6, 3, 64, dtype=torch.float16)
    assert launch.rows(x) is x and launch.rows(x[:, 1:]).data_ptr() == x[:, 1:].data_ptr()
    flat = torch.randn(6 * 200, dtype=torch.float16)
    for strides, offset in (((200, 64, 1), 0), ((0, 64, 1), 0), ((192, 64, 1), 1), ((192, 1, 3), 0)):
        view = flat.as_strided((6, 3, 64), strides, offset)
        copied = launch.rows(view)
        assert torch.equal(copied, view) and copied.is_contiguous() and copied.data_ptr() % 16 == 0
    assert launch.heads_of_a_token(x[:, 1:]) == 3 and launch.heads_of_a_token(x[:1]) == 3
