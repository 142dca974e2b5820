"""Which GPU is which."""

import pytest
import torch

from conan_engine.errors import UserError
from conan_engine.plan import devices


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20-3e", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GH200 480GB", 989),
        ("Somebody's", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_gives(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    found = devices.of(torch.device("cuda", 0))
    assert (found and found.tflops) == tflops
    assert devices.of(torch.device("cpu")) is None


@pytest.mark.parametrize(("typed", "name"), [("h200", "H200"), ("rtx4090", "RTX 4090"), ("H100-PCIe", "H100 PCIe")])
def test_a_gpu_is_known_by_the_name_that_one_types(typed, name):
    assert devices.named(typed).name == name


def test_an_unknown_gpu_is_one_line_that_names_the_known_ones():
    with pytest.raises(UserError, match="plan.device is 'h300'; expected one of B200, .*RTX 3090"):
        devices.named("h300")
