"""``infoclip info``."""

from __future__ import annotations

import json
import sys
import types

import torch

from infoclip import info, kernels


def test_collect_is_json_and_names_everything():
    found = json.loads(json.dumps(info.collect()))
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert {(row["op"], row["backend"]) for row in found["ops"]} >= {("cost_volume", b) for b in kernels.BACKENDS}
    for row in found["ops"]:
        assert row["available"] or row["why_not"]
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["attention"]["backend"] in ("sdpa", "xformers")


def test_show_prints_each_op_and_json(capsys):
    info.show()
    text = capsys.readouterr().out
    for word in ("cost_volume", "reference", "triton", "native", "attention", "instructions"):
        assert word in text
    info.show(json=True)
    assert json.loads(capsys.readouterr().out)["ops"]


def fake_xformers(monkeypatch, available):
    operator = types.SimpleNamespace(NAME="cutlassF-pt", is_available=lambda: available)
    module = types.SimpleNamespace(ALL_FW_OPS=[operator], ALL_BW_OPS=[])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", module)


def test_attention_is_xformers_only_where_an_operator_is_there(monkeypatch):
    fake_xformers(monkeypatch, True)
    assert info.attention_backend() == {"backend": "xformers", "reason": "operators available: cutlassF-pt"}
    fake_xformers(monkeypatch, False)
    assert info.attention_backend()["backend"] == "sdpa"
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", None)  # an import of it raises
    assert "does not import" in info.attention_backend()["reason"]
