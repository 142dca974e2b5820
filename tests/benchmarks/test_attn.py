"""What attn.py measures beside ours computes the same: without that a peer's time says nothing."""

import json

import attn
import attn_forms
import measured
import pytest
import torch


@pytest.mark.parametrize("alpha", attn.ALPHAS)
@pytest.mark.parametrize("lengths", [[24, 24], [5, 17, 1, 9]], ids=["even", "ragged"])
@pytest.mark.parametrize("form", ["FlexAttention", "SDPA"])
def test_a_peer_computes_what_ours_does(monkeypatch, form, lengths, alpha):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # FlexAttention compiled is for a GPU
    problem = attn_forms.Problem(lengths, alpha, 4, 2, 16, "cpu", torch.float32)
    expected = attn_forms.reference(problem)
    found = (
        attn_forms.flex("AUTO")(problem)
        if form == "FlexAttention"
        else attn_forms.sdpa(attn_forms.SDPBackend.MATH)(problem)
    )
    if form == "FlexAttention":  # which has no backward on a CPU
        for leaf in found.leaves:
            leaf.requires_grad_(False)
    torch.testing.assert_close(found.packed(found.run()), expected.run(), rtol=1e-4, atol=1e-5)
    if form == "FlexAttention":
        return
    for one, other in zip(
        torch.autograd.grad(found.run(), found.leaves, found.dout),
        torch.autograd.grad(expected.run(), expected.leaves, expected.dout),
    ):
        one = found.packed(one) if one.dim() == 4 else one
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_rows_go_on_behind_those_that_are_there(tmp_path):
    path, about = tmp_path / "some/rows.json", {"commit": "abc", "machine": "m", "versions": {"torch": None}}
    rows = measured.Rows(path, about)
    rows.report["rate"] = 5
    rows.add({"form": "ours", "seconds": 1.0})
    again = measured.Rows(path, about)
    assert again.find(form="ours")["seconds"] == 1.0 and again.find(form="theirs") is None and again.report["rate"] == 5
    again.add({"form": "theirs"})
    assert [row["form"] for row in json.loads(path.read_text())["rows"]] == ["ours", "theirs"]
    assert list(measured.Rows(path, about | {"commit": "def"})) == []
    path.write_text('{"commit": "abc"')
    assert list(measured.Rows(path, about)) == []
