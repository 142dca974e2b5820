"""Where the kernels for Hopper run, and in which layout they take tensors."""

import pytest
import torch

from conan_kernels.attention.hopper import launch


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((100, torch.bfloat16, 112, True), r"not sm_100, torch\.bfloat16 and 112: the plain kernel runs"),
        ((90, torch.float32, 112, True), r"not sm_90, torch\.float32 and 112"),
        ((90, torch.float16, 48, True), r"a head dim of 64, 80, 96, 112, 128"),
        ((90, torch.float16, 64, False), r"not 2\^31 or more of these"),
    ],
)
def test_where_it_cannot_run_one_line_says_so(given, found):
    launch._runs.cache_clear()
    with pytest.warns(UserWarning, match=found) as raised:
        assert not launch._runs(*given)
    assert len(raised) == 1 and "\n" not in str(raised[0].message)
    assert launch._runs(90, torch.bfloat16, 112, True)


def test_rows_that_tma_cannot_take_are_copied():
    x = torch.randn(6, 3, 64, dtype=torch.float16)
    assert launch.rows(x) is x and launch.rows(x[:, 1:]).data_ptr() == x[:, 1:].data_ptr()
    flat = torch.randn(6 * 200, dtype=torch.float16)
    for strides, offset in (((200, 64, 1), 0), ((0, 64, 1), 0), ((192, 64, 1), 1), ((192, 1, 3), 0)):
        view = flat.as_strided((6, 3, 64), strides, offset)
        copied = launch.rows(view)
        assert torch.equal(copied, view) and copied.is_contiguous() and copied.data_ptr() % 16 == 0
    assert launch.heads_of_a_token(x[:, 1:]) == 3 and launch.heads_of_a_token(x[:1]) == 3
