from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from training_data import tiny_config, write_folders
from typer.testing import CliRunner, Result

import infoclip
from infoclip import cli
from infoclip.config import apply_overrides, load_config, save_config
from infoclip.errors import InfoclipWarning, StorageError
from infoclip.recipes import get_recipe, list_recipes

ROOT = Path(__file__).resolve().parents[1]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def sentence(result: Result, code: int = 2) -> str:
    """The error's one line: nothing on stdout, no traceback, the right exit code."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_help_and_version_need_no_torch() -> None:
    """`--help` answers at once because nothing heavy is imported; the import is what can be tested without a clock."""
    code = (
        "import sys\nfrom infoclip import cli\n"
        "try:\n    cli.app(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'numpy', 'PIL', 'open_clip', 'triton', 'torchvision', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for arguments in (["--help"], ["--version"], ["train", "--help"], ["recipes"], ["recipes", "scenes"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_version() -> None:
    assert call("--version").stdout == f"infoclip {infoclip.__version__}\n"
    assert f'version = "{infoclip.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_importing_the_package_is_cheap_and_lists_its_names() -> None:
    code = "import sys, infoclip; assert 'torch' not in sys.modules; assert set(infoclip.__all__) <= set(dir(infoclip))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = infoclip.nothing


@pytest.mark.parametrize("name", [name for name in infoclip.__all__ if name != "__version__"])
def test_public_names_exist(name: str) -> None:
    assert getattr(infoclip, name) is not None


@pytest.mark.parametrize("command", ["info", "recipes", "data", "pretrain", "train", "evaluate", "predict", "demo"])
def test_every_command_has_help(command: str) -> None:
    assert command in call("--help").stdout
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_recipes_are_listed_and_shown_as_overrides() -> None:
    listed = call("recipes").stdout
    assert all(name in listed for name in list_recipes())
    assert set(json.loads(call("recipes", "--json").stdout)) == set(list_recipes())
    lines = call("recipes", "scenes").stdout.split("\n")[:-1]
    base = get_recipe("scenes")
    assert apply_overrides(base, lines) == base  # what is shown is what can be given
    assert json.loads(call("recipes", "scenes", "--json").stdout)["clip"]["model"] == "builtin:scenes"


def test_unknown_recipe_and_key_name_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'scenes'" in sentence(call("train", "scene", "--out", tmp_path / "x"))
    assert "did you mean 'optim.lr'" in sentence(call("train", "scenes", "optim.lrr=1", "--out", tmp_path / "x"))
    assert "expected key=value" in sentence(call("train", "scenes", "fast", "--out", tmp_path / "x"))
    assert "Unknown recipe" in sentence(call("recipes", "nothing"))
    assert not (tmp_path / "x").exists()


def test_wrong_usage_exits_with_2() -> None:
    for arguments in (["train"], ["train", "scenes"], ["nothing"], ["predict"], ["demo", "--seeds"]):
        result = call(*arguments)
        assert result.exit_code == 2, arguments
        assert "Traceback" not in result.output


def test_train_runs_resumes_and_refuses(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data")
    config = tmp_path / "config.json"
    save_config(tiny_config(root, steps=3), config)
    out = tmp_path / "run"
    result = call("train", config, "optim.lr=5e-4", "--out", out, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("3 steps in ")
    assert str(out / "model") in result.stdout
    assert load_config(out / "config.json").optim.lr == 5e-4
    assert "already holds a run" in sentence(call("train", config, "optim.lr=5e-4", "--out", out, "--quiet"))
    assert "optim.lr (was 0.0005, now 0.001)" in sentence(call("train", config, "--out", out, "--resume", "--quiet"))
    assert call("train", config, "optim.lr=5e-4", "--out", out, "--resume", "--quiet").exit_code == 0


def test_train_on_bad_data_is_one_sentence(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data")
    (root / "masks" / "4.png").write_bytes(b"no picture")
    config = tmp_path / "config.json"
    save_config(tiny_config(root, steps=4), config)
    for workers in (0, 1):
        result = call("train", config, f"workers={workers}", "--out", tmp_path / f"run{workers}", "--quiet")
        assert str(root / "masks" / "4.png") in sentence(result)


def test_a_recipe_without_data_says_what_to_give(tmp_path: Path) -> None:
    for recipe in ("infoclip-vitb16-coco", "catseg-vitl14-coco"):
        assert "pass data.root=FOLDER" in sentence(call("train", recipe, "--out", tmp_path / "x", "--quiet"))


def test_interrupt_exits_with_130_and_says_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import infoclip.engine.train as module

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", interrupted)
    assert "--resume" in sentence(call("train", "scenes", "--out", tmp_path / "x"), 130)


def test_errors_that_stop_a_run_exit_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import infoclip.engine.train as module

    for error in (StorageError("The disk is full."), PermissionError(13, "Permission denied", "x")):

        def failing(*args: Any, error: Exception = error, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(module, "train", failing)
        sentence(call("train", "scenes", "--out", tmp_path / "x"), 1)


def test_a_warning_is_one_line_and_libraries_stay_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards

    @cli._guarded
    def command() -> None:
        warnings.warn("a library's advice to developers", UserWarning, 1)
        warnings.warn("This word is unknown.", InfoclipWarning, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        command()
    assert capsys.readouterr().err == "warning: This word is unknown.\n"


def test_a_defect_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import infoclip.engine.train as module

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "train", broken)
    assert isinstance(call("train", "scenes", "--out", tmp_path / "x").exception, ZeroDivisionError)


def test_class_names_come_from_one_place(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    arguments = ("predict", tmp_path, picture, "--out", tmp_path / "out")
    assert "either --classes" in sentence(call(*arguments))
    assert "either --classes" in sentence(call(*arguments, "--classes", "a", "--classes-file", "voc_20"))
    assert "'a' is in --classes twice" in sentence(call(*arguments, "--classes", "a, b, a"))
    assert "has no name" in sentence(call(*arguments, "--classes", "a,,b"))
    assert "did you mean 'voc_20'" in sentence(call(*arguments, "--classes-file", "voc20"))
    assert not (tmp_path / "out").exists()


def test_seeds() -> None:
    assert cli._seeds("0,1, 2") == [0, 1, 2]
    assert cli._seeds("0 1") == [0, 1]
    for text in ("", "a", "1,1"):
        assert "--seeds" in sentence(call("demo", "--seeds", text))


def test_evaluate_names_a_missing_model_first(tmp_path: Path) -> None:
    assert "There is no model at" in sentence(call("evaluate", tmp_path / "none"))


def test_evaluate_names_known_benchmarks(tmp_path: Path) -> None:
    assert "did you mean 'a150'" in sentence(call("evaluate", tmp_path, "--data", "a15"))


def test_pretraining_defaults_are_those_of_the_shipped_checkpoint() -> None:
    import inspect

    from infoclip.pretrain import PretrainConfig

    shown = inspect.signature(cli.pretrain_scenes).parameters
    for name in ("steps", "batch_size", "seed"):
        assert shown[name].default == getattr(PretrainConfig(), name), name
