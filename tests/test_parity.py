"""Recorded numbers of the published implementations, and the program that compares with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import torch
from parity_common import Case, Row, load_case
from parity_model import check_aggregator
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(p.name.removesuffix(".json") for p in GOLDEN.glob("*.json"))
# The kinds of cases that this code covers: a case of one of them must never be skipped.
BUILT = {
    "aggregator", "catseg_model", "cdt", "clip_dense", "fcclip_inference", "ma_loss", "maft_inference", "maft_model",
    "mask_pooling_cls", "matcher_criterion", "metrics", "msdeform", "optim", "rc", "renyi_infosam", "tokenizer",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    torch.set_num_threads(2)  # as recorded: sums over many terms depend on how threads cut them
    result, rows, remark = parity.run_case(load_case(GOLDEN / f"{name}.json"))
    covered = name.partition(".")[0] in BUILT
    assert result in (("pass",) if covered else ("pass", "skipped")), remark
    assert rows or result == "skipped"


def test_the_segmentor_is_covered() -> None:
    needed = {"catseg_model", "optim.catseg"} | {
        f"aggregator.{name}"
        for name in ("noguidance", "pool1_p1_full_nopad", "pool1_p3_linear_topk", "pool2_p1_full_padded",
                     "pool2_p1_linear_padded", "pool2_p3_full_padexact")
    }  # fmt: skip
    assert needed <= set(CASES)


def test_every_recorded_tensor_of_the_aggregator_is_compared() -> None:
    case = load_case(GOLDEN / "aggregator.pool1_p3_linear_topk.json")
    compared = {row.name for row in check_aggregator(case)}
    recorded = {name for name in case.tensors if name.startswith(("out.", "grad."))}
    assert recorded <= compared


def copy_case(name: str, folder: Path) -> None:
    for suffix in (".json", ".safetensors"):
        shutil.copyfile(GOLDEN / (name + suffix), folder / (name + suffix))


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(GOLDEN.parent / "parity.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_program_passes_and_names_what_it_skips(tmp_path: Path) -> None:
    copy_case("aggregator.noguidance", tmp_path)
    info = {"case": "starfish.blue", "hyper_parameters": {}}
    (tmp_path / "starfish.blue.json").write_text(json.dumps(info))
    save_file({"out.x": torch.zeros(1)}, tmp_path / "starfish.blue.safetensors")
    done = run(".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["aggregator.noguidance"].endswith("pass")
    assert lines["starfish.blue"].endswith("skipped: not built yet")
    assert "1 passed, 0 failed, 1 skipped" in done.stdout


@pytest.mark.parametrize("tensor", ["out.logits", "grad.w.conv1.weight", "grad.text_feats"])
def test_a_planted_error_is_caught(tmp_path: Path, tensor: str, capsys) -> None:
    copy_case("aggregator.noguidance", tmp_path)
    path = tmp_path / "aggregator.noguidance.safetensors"
    tensors = load_file(path)
    tensors[tensor].view(-1)[3] += 1e-4 * tensors[tensor].abs().max()
    save_file(tensors, path)
    assert parity.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"FAIL: {tensor}: error" in out
    assert "0 passed, 1 failed" in out


def test_program_refuses_what_it_cannot_read(tmp_path: Path, capsys) -> None:
    def error(folder: Path) -> str:
        assert parity.main([str(folder)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    assert "not a folder" in error(tmp_path / "nowhere")
    assert "no parity case found" in error(tmp_path)
    assert parity.main([str(GOLDEN), "--device", "abacus"]) == 2
    assert "cannot compute on 'abacus'" in capsys.readouterr().err
    copy_case("aggregator.noguidance", tmp_path)
    weights = tmp_path / "aggregator.noguidance.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:1000])
    assert "Cannot read" in error(tmp_path)
    weights.unlink()
    assert "has no aggregator.noguidance.safetensors beside it" in error(tmp_path)
    tensors = load_file(GOLDEN / "aggregator.noguidance.safetensors")
    del tensors["in.img_feats"]
    save_file(tensors, weights)
    assert "has no tensor 'in.img_feats'" in error(tmp_path)
    (tmp_path / "aggregator.noguidance.json").write_text("{")
    assert "Cannot read" in error(tmp_path)


def test_program_fails_when_a_check_breaks(tmp_path: Path, capsys) -> None:
    copy_case("aggregator.noguidance", tmp_path)
    path = tmp_path / "aggregator.noguidance.json"
    info = json.loads(path.read_text())
    info["hyper_parameters"]["hidden_dim"] = 32
    path.write_text(json.dumps(info))
    assert parity.main([str(tmp_path)]) == 1
    assert "size mismatch" in capsys.readouterr().out


def test_cases_of_other_sizes_are_understood() -> None:
    """A case made here, of sizes that no recorded case has: the check must read them all from the case."""
    from infoclip.config import ModelConfig
    from infoclip.model.aggregator import Aggregator

    hyper = {
        "text_guidance_dim": 10, "text_guidance_proj_dim": 6, "appearance_guidance_dim": 10,
        "appearance_guidance_proj_dim": 5, "decoder_dims": [16, 48], "decoder_guidance_dims": [7, 3],
        "decoder_guidance_proj_dims": [3, 2], "num_layers": 3, "nheads": 3, "hidden_dim": 12, "pooling_size": [3, 2],
        "feature_resolution": [6, 9], "window_size": 3, "attention_type": "linear", "prompt_channel": 2, "pad_len": 5,
    }  # fmt: skip
    config = ModelConfig(
        hidden_dim=12, num_layers=3, num_heads=3, window_size=3, pad_len=5, text_guidance_proj_dim=6,
        appearance_guidance_proj_dim=5, decoder_dims=(16, 48), decoder_guidance_dims=(7, 3),
        decoder_guidance_proj_dims=(3, 2),
    )  # fmt: skip
    torch.manual_seed(5)
    model = Aggregator(config, 10, 10, 2, (6, 9))
    tensors = {f"sd.{k}": v.clone() for k, v in model.state_dict().items()}
    tensors |= {"in.img_feats": torch.randn(3, 10, 6, 9), "in.text_feats": torch.randn(3, 7, 2, 10)}
    sizes = [(10, 6, 9), (7, 12, 18), (3, 24, 36)]
    tensors |= {f"in.appearance{i}": torch.randn(3, *size) for i, size in enumerate(sizes)}
    args = [tensors[k] for k in ("in.img_feats", "in.text_feats")]
    logits = model(*args, [tensors[f"in.appearance{i}"] for i in range(3)], pooling=(3, 2)).detach()
    tensors |= {"cot.logits": torch.randn_like(logits), "out.logits": logits, "out.corr": model.correlation(*args)}
    tensors |= {f"grad.{k[3:]}": torch.zeros_like(v) for k, v in tensors.items() if k.startswith("in.")}
    rows = {
        r.name: r
        for r in check_aggregator(Case("aggregator.made", Path("made.json"), {"hyper_parameters": hyper}, tensors))
    }
    assert rows["out.logits"].ok
    assert rows["out.corr"].ok
    assert rows["grad.img_feats"].got.abs().max() > 0


def test_row() -> None:
    want = torch.tensor([1.0, -2.0])
    assert Row("x", want + 3e-6, want, fp64_err=1e-7, absmax=2.0).ok  # 2e-6 of 2
    assert not Row("x", want + 5e-6, want, fp64_err=1e-7, absmax=2.0).ok
    assert Row("x", want + 5e-6, want, fp64_err=1e-6, absmax=2.0).ok  # ten times what float32 loses
    assert not Row("x", torch.tensor([1.0, float("nan")]), want).ok
    assert not Row("x", want[:1], want).ok
    assert Row("x", torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.uint8)).ok
    assert not Row("x", torch.tensor([1, 3]), torch.tensor([1, 2])).ok
    assert Row("x", torch.tensor([float("inf")]), torch.tensor([float("inf")])).error == 0
    noise = Row("grad.x", torch.tensor([1e-7]), torch.tensor([2e-8]), "grad", fp64_err=2e-8, absmax=2e-8)
    assert noise.is_noise
    assert parity.worst_relative([noise], "grad") == "-"
