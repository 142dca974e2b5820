"""Which precision a run computes in: what is set, what it began with, or what was measured to be faster."""

from types import SimpleNamespace

import pytest
import torch

from conan_engine.config import Config
from conan_engine.parallel import cpu, precision
from conan_engine.parallel.mesh import Mesh


@pytest.mark.parametrize(("set_to", "before", "rate", "chosen", "said"), [
    ("bfloat16", None, 0.5, "bfloat16", ""),
    ("float32", "bfloat16", 2.0, "float32", ""),
    ("auto", None, 0.61, "float32", "products in float32: bfloat16 runs at 0.61 times the rate of float32 here"),
    ("auto", None, 1.03, "float32", "products in float32: bfloat16 runs at 1.03"),
    ("auto", None, 1.9, "bfloat16", "products in bfloat16: bfloat16 runs at 1.90"),
    ("auto", None, None, "float32", "no instructions for bfloat16"),
    ("auto", "bfloat16", 0.5, "bfloat16", "products in bfloat16, as this run began"),
    ("auto", "float32", 2.0, "float32", "products in float32, as this run began"),
])  # fmt: skip
def test_the_faster_one_unless_it_is_settled(monkeypatch, set_to, before, rate, chosen, said):
    monkeypatch.setattr(cpu, "bfloat16_rate", lambda width, ffn: rate)
    found, why = precision.choose(Config(precision=set_to), Mesh("cpu"), before)
    assert found == chosen and said in why and bool(why) == bool(said)


def test_a_gpu_multiplies_bfloat16():
    assert precision.choose(Config(), SimpleNamespace(device=torch.device("cuda"))) == ("bfloat16", "")


def test_the_rate_is_of_products_that_were_made(monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    before = torch.get_rng_state()
    rate = cpu.bfloat16_rate(96, 160)
    assert 1e-3 < rate < 1e3 and torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    assert cpu.bfloat16_rate(96, 160) is None
