"""The benchmarks: sizes from the recipes, values checked, the table's arithmetic, another commit's code beside."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest
import torch

from bench import base, harness, shapes
from bench.harness import Case
from infoclip import recipes
from infoclip.errors import ConfigError
from infoclip.kernels import ROOMS
from tests.kernel_checks import INTERPRETED, needs_native

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing of Triton here")
SUITES = [suite for suites in harness.all_suites().values() for suite in suites]


def test_every_room_has_a_suite_with_one_published_case():
    assert {suite.op for suite in SUITES} == set(ROOMS)
    assert len({suite.title for suite in SUITES}) == len(SUITES)
    for suite in SUITES:
        cases = suite.cases()
        assert sum(case.published for case in cases) == 1, suite.title
        assert len({case.name for case in cases}) == len(cases), suite.title


def test_shapes_are_the_recipes():
    published = shapes.shapes_of("infoclip-vitb16-coco")
    config = recipes.get_recipe("infoclip-vitb16-coco")
    assert published.batch == config.data.batch_size
    assert published.grid * 16 == config.clip.image_size
    assert published.labels == config.data.crop
    assert (published.pixels, published.classes, published.prompts, published.dim) == (576, 171, 1, 512)
    assert (published.logits, shapes.vocabulary("a847")) == (96, 847)
    assert shapes.levels(800, 1333) == ((25, 42), (50, 84), (100, 168))


def test_a_changed_recipe_changes_every_case(monkeypatch):
    """No suite has typed a recipe's size again."""

    def changed(name: str):
        made = recipes.RECIPES[name]

        def recipe():
            config = made()
            config.data.batch_size += 3
            return config

        return recipe

    def typed(suite: harness.Suite) -> list[Case]:
        return [case for case in suite.cases() if not case.series and "800 x 1333" not in case.name]

    def batches() -> dict[str, list[int]]:
        shapes.shapes_of.cache_clear()
        return {suite.title: [case.sizes[0] for case in typed(suite)] for suite in SUITES}

    before = batches()
    monkeypatch.setattr(recipes, "RECIPES", {name: changed(name) for name in recipes.RECIPES})
    after = batches()
    monkeypatch.undo()
    shapes.shapes_of.cache_clear()
    for title, sizes in before.items():
        # Cases of one image stay so; every other one has the recipe's batch.
        assert after[title] == [b + 3 if b > 1 else b for b in sizes], title
        assert any(b > 1 for b in sizes), title


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.title)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@needs_native
def test_values_are_checked_before_they_are_timed(suite, dtype):
    placed = harness.place(suite, suite.tiny, "cpu", dtype)
    harness.check(placed, "native", dtype)
    for step in placed.steps("native").values():
        step()
    call = placed.call
    placed.call = lambda backend, *arguments: call(backend, *arguments) * (1.1 if backend == "native" else 1.0)
    with pytest.raises(AssertionError, match="value is off by"):
        harness.check(placed, "native", dtype)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.title)
def test_what_a_suite_states_is_of_its_case(suite):
    """Bounds cover results and gradients, and the traffic covers the inputs."""
    case = next(case for case in suite.cases() if case.published)
    placed = harness.place(suite, suite.tiny, "cpu", "float32")
    inputs = sum(4 * leaf.numel() for leaf in placed.leaves)
    assert suite.bound(suite.tiny, "cpu", "float32", 4) > inputs  # of the gradients alone
    assert suite.traffic(suite.tiny, 4)[0] >= inputs
    assert suite.operations(case.sizes)[0] > suite.operations(suite.tiny)[0] > 0


def entry(median: float, **facts) -> dict:
    facts = {"published": False, "series": "", "n": 0, "flop": 8e9, "bytes": 1e6, "arithmetic": facts["dtype"], **facts}
    times = {"q20": 0.9 * median, "q50": median, "q80": 1.2 * median}
    return {"stats": {"median": median, "rounds": 5}, "extra_info": {**times, **facts}}


def test_rows_have_ratios_shares_and_bytes():
    where = {"op": "some_op", "device": "cpu", "case": "N9", "part": "both"}
    rate = {"op": "machine", "device": "cpu"}
    told = [
        {"stats": {"median": 0.1}, "extra_info": {**rate, "dtype": "float32", "amount": 10e9}},
        {"stats": {"median": 0.1}, "extra_info": {**rate, "dtype": "float32", "amount": 20e9}},  # the best counts
        {"stats": {"median": 0.1}, "extra_info": {**rate, "dtype": "copy", "amount": 1e9}},
        entry(0.4, **where, dtype="float32", backend="reference"),
        entry(0.1, **where, dtype="float32", backend="native"),
        entry(0.05, **where, dtype="bfloat16", backend="native", bytes=4e8),
        {
            "stats": {"median": 9.0, "rounds": 1},
            "extra_info": {**entry(1.0, **{**where, "part": "memory"}, dtype="float32", backend="native")["extra_info"],
                           "peak": 3_000_000, "bound": 4_000_000, "seconds": 9.0},
        },
    ]  # fmt: skip
    reference, single, half = harness.rows_of(told)
    assert reference["ratio"] == pytest.approx(1.0)
    assert single["ratio"] == pytest.approx(4.0)
    assert single["share"] == pytest.approx(0.4)  # 8 GFLOP at 200 GFLOP/s take 40 of 100 ms
    assert (single["peak"], single["bound"]) == (3_000_000, 4_000_000)
    assert half["ratio"] is None
    assert half["bf16_ratio"] == pytest.approx(2.0)
    assert half["share"] == pytest.approx(0.8)  # 400 MB at 10 GB/s take 40 of 50 ms, its rate is unknown
    text = harness.table([reference, single, half])
    assert "| N9 | both | float32 | native | 90.00 / 100.00 / 120.00 | 4.00 |  | 80.0 | 40% | 3.0 | 4.0 |" in text


def test_quantiles():
    assert harness.quantiles([3.0]) == {"q20": 3.0, "q50": 3.0, "q80": 3.0}
    found = harness.quantiles([float(x) for x in range(11)])
    assert found == pytest.approx({"q20": 2.0, "q50": 5.0, "q80": 8.0})


class TestBase:
    @pytest.fixture
    def repository(self, tmp_path):
        def git(*arguments: str) -> str:
            command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
            return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

        git("init", "-q")
        (tmp_path / "code.py").write_text("old\n")
        git("add", ".")
        git("commit", "-qm", "old")
        (tmp_path / "code.py").write_text("new\n")
        git("commit", "-qam", "new")
        self.git = git
        return tmp_path

    def test_a_commit_is_checked_out_and_nothing_is_left(self, repository):
        commit = base.resolve("HEAD~1", repository)
        for error in (KeyboardInterrupt, ValueError):
            seen = []

            def use(error=error, seen=seen) -> None:
                with base.checked_out(commit, repository) as folder:
                    seen.append((folder, (folder / "code.py").read_text()))
                    raise error

            with pytest.raises(error):
                use()
            [(folder, text)] = seen
            assert text == "old\n"
            assert not folder.parent.exists()
            assert len(self.git("worktree", "list").splitlines()) == 1
        assert (repository / "code.py").read_text() == "new\n"

    @pytest.mark.parametrize("ref", ["nothing", "HEAD~9", "--all", ""])
    def test_an_unknown_commit(self, repository, ref):
        with pytest.raises(ConfigError, match=rf"--base {ref}: there is no such commit"):
            base.resolve(ref, repository)

    def test_no_checkout(self, tmp_path):
        with pytest.raises(ConfigError, match="is no git checkout"):
            base.resolve("HEAD", tmp_path)

    def test_slower_beyond_the_spread(self):
        steady = base.compared([1.1, 1.1, 1.2, 1.1, 1.1], [1.0] * 5)
        noisy = base.compared([1.5, 0.9, 1.5, 1.0, 1.6], [1.0] * 5)
        rows = [{"op": name, "base": spread} for name, spread in (("steady", steady), ("noisy", noisy))]
        rows.append({"op": "not there"})
        assert [row["op"] for row in base.regressions(rows, 0.05)] == ["steady"]
        assert base.regressions(rows, 0.15) == []

    @pytest.mark.skipif(not (base.ROOT / ".git").exists(), reason="no git checkout")
    def test_the_other_code_runs_beside(self):
        """This very commit, without its native module: the reference is timed, the native form is told as missing."""
        suite = next(suite for suite in SUITES if suite.op == "cost_volume")
        case = dataclasses.replace(suite.cases()[0], sizes=suite.tiny)
        with base.opened("HEAD", "perf_counter", lambda *_: None) as other:
            timer = other.timer(suite, case, "both", "cpu", "float32", "reference")
            assert timer is not None
            assert 0 < timer() < 10
            assert other.timer(suite, case, "both", "cpu", "float32", "native") is None
        assert ["is not built" in why for why in other.missing.values()] == [True]
        assert torch.get_num_threads() > 0
