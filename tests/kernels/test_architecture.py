"""What a machine that the kernels do not run on is told, and which tiles each architecture gets."""

import ast
from pathlib import Path

import pytest
import torch

import conan_kernels
from conan_kernels import architecture
from conan_kernels.architecture import attention_tiles, product_options, similarity_tiles


@pytest.mark.parametrize(
    ("arch", "triton_version", "message"),
    [
        (75, "3.9.0", r"Quadro T2000 has compute capability 7\.5, and the kernels need 8\.0 or higher"),
        (90, "3.5.1", r"Triton 3\.5\.1 is installed, and the kernels need 3\.6 or newer: install torch 2\.11"),
        (90, "none", r"Triton none is installed, and the kernels need 3\.6 or newer"),
    ],
)
def test_what_is_too_old_is_named_in_one_line(arch, triton_version, message):
    with pytest.raises(RuntimeError, match=message) as raised:
        architecture.check(arch, "Quadro T2000", triton_version)
    assert "\n" not in str(raised.value)


def test_what_is_new_enough_passes():
    for arch in (80, 86, 89, 90, 100, 103, 120, 121):
        for version in ("3.6.0", "3.9.0", "3.10.0+git1234", "4.0.0"):
            architecture.check(arch, "a GPU", version)


def test_a_gpu_that_is_too_old_is_refused_before_anything_is_launched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Quadro T2000")
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5"):
        architecture.architecture(torch.device("cuda", 0))


def test_each_architecture_gets_its_own_row_and_a_later_one_the_last_before_it():
    for tiles in (
        lambda arch: attention_tiles(torch.bfloat16, 112, arch),
        lambda arch: similarity_tiles(torch.bfloat16, arch),
    ):
        assert tiles(89) == tiles(86) and tiles(103) == tiles(100) and tiles(121) == tiles(120)
        assert tiles(120) != tiles(100)  # 99 KB of shared memory there, 227 here
    assert product_options(torch.bfloat16, 89)[1]["BN"] < product_options(torch.bfloat16, 90)[1]["BN"]


def test_forward_and_backward_agree_on_the_plan():
    for arch in (80, 86, 90, 100, 120):
        for D in range(16, 129, 16):
            for dtype in (torch.bfloat16, torch.float32):
                _, dq, dk_dv = attention_tiles(dtype, D, arch)
                assert dq["BM"] == dk_dv["BN"]


def test_a_cpu_needs_no_triton():
    assert architecture.architecture(torch.device("cpu")) == 90
    assert conan_kernels.info_nce(torch.randn(2, 4), torch.randn(2, 4), torch.arange(2), 0.1).loss > 0


def test_every_launch_asks_for_fused_multiply_and_add():
    launches = [
        ast.unparse(call)
        for file in Path(architecture.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)  # kernel[grid](...)
    ]
    assert len(launches) >= 16
    assert all("**FUSION" in launch for launch in launches), launches
