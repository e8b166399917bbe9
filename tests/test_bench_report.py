"""The report of the benchmarks' figures: tables and pictures of a folder, and what is refused."""

from __future__ import annotations

import json

import pytest

from bench import __main__ as command
from bench import harness, report
from tests.kernel_checks import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing of Triton here")
OP = "infonce"


def entry(backend: str, dtype: str, part: str, median: float, n: int = 576, **more) -> dict:
    facts = {
        "op": OP, "device": "cpu", "dtype": dtype, "case": f"N{n}", "part": part, "backend": backend, "flop": 4e9,
        "bytes": 2e7, "arithmetic": dtype, "published": n == 576, "once": n > 9999, "series": "one image", "n": n,
        "q20": median, "q50": median, "q80": median,
    }  # fmt: skip
    facts |= more
    return {"stats": {"median": median, "rounds": 5}, "extra_info": facts}


def rate(dtype: str, amount: float) -> dict:
    return {
        "stats": {"median": 0.1},
        "extra_info": {"op": "machine", "device": "cpu", "dtype": dtype, "amount": amount},
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    timed = [rate("float32", 20e9), rate("bfloat16", 40e9), rate("copy", 3e9)]
    for n in (576, 2304):
        timed += [entry("reference", "float32", "both", 0.4, n), entry("native", "float32", "both", 0.1, n)]
    timed.append(entry("native", "bfloat16", "both", 0.05))
    memory = [
        entry("native", "float32", "memory", 4.0, n, peak=1000 * n, bound=2000 * n, seconds=3.0) for n in (576, 65536)
    ]
    for name, benchmarks in (("a.json", memory), ("b.json", timed)):
        facts = {"machine": "a machine; commit 123", "command": "python -m bench infonce", "benchmarks": benchmarks}
        (tmp_path / name).write_text(json.dumps(facts))
    errors = [
        {"op": OP, "device": "cpu", "backend": backend, "dtype": "float32", "value": 3e-8, "gradient": 6e-7}
        for backend in ("reference", "native", "triton")
    ]
    facts = {"machine": "a machine", "command": "python -m bench errors", "errors": errors}
    (tmp_path / "errors.json").write_text(json.dumps(facts))
    compiled = {
        "op": OP, "form": "triton", "arch": "sm_90", "kernels": 7, "registers": 99, "shared": 1, "spilling": 0,
        "matrix_kernels": 1, "instructions": ["HGMMA"], "failures": 0,
    }  # fmt: skip
    (tmp_path / "aot.json").write_text(json.dumps({"machine": "a machine", "errors": [], "summary": [compiled]}))
    (tmp_path / "other.json").write_text('{"something": 1}')
    return tmp_path


def run(folder) -> int:
    return command.main(["report", "--folder", str(folder)])


def test_tables_and_pictures(folder, capsys):
    assert run(folder) == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    # Time and memory of the same case come from two files.
    assert "| infonce | native, CPU | 3e-08, 6e-07 |  | 1.2 | 0.6 | 4.00 |  | 2.00 |  |  |" in text
    assert (
        "| infonce | triton, CUDA | 3e-08, 6e-07 |  |  |  |  |  |  | sm 90: 7 kernels, no spills, HGMMA | pending |"
        in text
    )
    assert "| N576 | both | float32 | native | 100.00 / 100.00 / 100.00 | 4.00 |  | 40.0 | 20% | 0.6 | 1.2 |" in text
    assert text.count("### a machine") == 1
    assert "| N65536 | both | float32 | native | 3000 once |" in text
    assert "commit 123" in text
    for name in ("roofline", "time", "memory"):
        assert (folder / f"{name}.cpu.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (folder / f"{name}.cpu.svg").read_text()
    assert "left alone: other.json" in capsys.readouterr().out
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert run(folder) == 0
    assert {file: file.read_bytes() for file in folder.iterdir()} == before  # the same bytes twice


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"benchmarks": 3}', '{"benchmarks": []}', '{"errors": [{"op": "x"}], "command": ""}']
)
def test_a_broken_file_is_refused(folder, capsys, text):
    (folder / "b.json").write_text(text)
    before = (folder / "README.md").read_bytes()
    assert run(folder) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {folder / 'b.json'} is not what 'python -m bench ... --json' writes (")
    assert told.count("\n") == 1
    assert (folder / "README.md").read_bytes() == before


def test_wrong_folders(folder, capsys, tmp_path):
    assert run(tmp_path / "nothing") == 2
    assert "is no folder" in capsys.readouterr().err
    (folder / "README.md").write_text("no markers\n")
    assert run(folder) == 2
    assert "once each" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 2
    assert "holds no figure" in capsys.readouterr().err


def test_the_shipped_tables_are_of_the_shipped_files():
    """The README of the results says what their JSON says."""
    found = report.read(report.FOLDER)
    text = (report.FOLDER / "README.md").read_text()
    inside = text.partition(report.BEGIN)[2].partition(report.END)[0]
    assert inside == ("\n" if found.empty else f"\n{report.tables(found)}\n")


def test_errors_are_distances_to_float64(capsys, tmp_path, monkeypatch):
    from bench import errors

    suite = next(suite for suites in harness.all_suites().values() for suite in suites if suite.op == "cost_volume")
    rows = errors.of_suite(suite, "cpu", "bfloat16", ["reference"], small=True)
    assert [row["backend"] for row in rows] == ["reference"]
    assert 1e-4 < rows[0]["value"] < 2**-8  # rounded once to a half
    assert 1e-4 < rows[0]["gradient"] < 2**-7
    single = errors.of_suite(suite, "cpu", "float32", ["reference"], small=True)[0]
    assert 0 < single["value"] < 1e-6
    assert "| cost_volume | cpu | reference | small | bfloat16 |" in errors.table(rows)


@pytest.mark.parametrize("arguments", [["nothing"], ["--json", "no/such/folder/x.json"], ["--interpreted"]])
def test_wrong_arguments_of_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["errors", *arguments])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infonce", "--threshold", "0.1"], "needs --base"),
        (["infonce", "--base", "HEAD", "--threshold", "-1"], "expected 0 or more"),
        (["infonce", "--json", "no/such/folder/x.json"], "there is no folder"),
        (["nothing"], "invalid choice"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
