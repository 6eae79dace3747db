"""The accuracy experiment: its runs, its files, its choices and its statistics."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
import test_train  # noqa: F401  # skips where torchvision cannot be imported

from bench.accuracy import __main__ as command
from bench.accuracy import (
    figures,
    grow,
    growth,
    language,
    repeatability,
    report,
    stages,
    thermometer,
)
from bench.accuracy.data import Data
from bench.accuracy.presets import name_of
from bench.accuracy.repeatability import judge, lag
from bench.accuracy.runs import Row, Run, execute
from bench.accuracy.stages import Experiment, Family, Job, NotReady, Plain
from bench.accuracy.statistics import holm, mean, spearman, welch
from bench.accuracy.store import Store, read
from bench.accuracy.train import Recipe
from bench.accuracy.work import Here
from bench.accuracy.work import work as run_stage

ROOT = Path(__file__).resolve().parents[2]

RECIPE = Recipe(arch="cnn", width=0.5, epochs=2, batch=32, lr=0.05)
FAMILY = Family("fake", RECIPE, 128, 64)
TINY = Experiment(
    FAMILY,
    FAMILY,
    rates=(0.02, 0.05, 0.1),
    repeat_seeds=range(2),
    tune_seeds=range(2),
    screen_seeds=range(1),
    confirm_seeds=range(100, 102),
    averagings={
        "decay 0.5": {"decay": 0.5, "min_steps": 2, "refresh": 2},
        "by epoch": {"decay": None, "min_steps": 2, "refresh": "epoch"},
    },
)
ABOUT = {"device": "none", "torch": "0", "commit": "0", "date": "never"}


@pytest.fixture(scope="module")
def easy() -> Data:
    """Four colours under a little noise: eight steps learn them."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(20, 236, (4, 1, 1, 3), generator=generator)
    labels = torch.arange(320) % 4
    noise = torch.randint(-20, 20, (320, 8, 8, 3), generator=generator)
    images = (colours[labels] + noise).to(torch.uint8)
    padded = torch.nn.functional.pad(images[:256], (0, 0, 1, 1, 1, 1))
    middle, width = torch.full((3,), 128.0), torch.full((3,), 64.0)
    return Data(
        "fake", padded, labels[:256], images[256:], labels[256:], 4, 1, False, middle, width
    )


def row_of(run: Run, **changes: Any) -> Row:
    """A made-up outcome."""
    key, seed = run.key
    cells: dict[str, Any] = {
        "stage": "stage1", "arm": "an, arm", "key": key, "seed": seed, "validation": 0.5,
        "test": None, "diverged": False, "train_loss": 1.0, "amplified": 0.0, "seconds": 1.0,
        "config": run.config, "weights": "{}", "layer_scores": "", **ABOUT,
    }  # fmt: skip
    return Row(**{**cells, **changes})


def work(stage: str, store: Store, data: Data | None, **more: Any) -> int:
    """The stage on data that is at hand; without any, nothing may be run."""

    def run(stage: str, job: Job) -> Row:
        assert data is not None
        return execute(job.run, data, {**ABOUT, "stage": stage, "arm": job.arm})

    said: list[str] = []
    wanted = partial(stages.STAGES[stage], TINY)
    left = run_stage(stage, wanted, store, run, Here(), **more, say=said.append)
    assert said
    return left


# ---- statistics ---------------------------------------------------------------------


def test_welch_by_hand() -> None:
    # Means 3 and 7; variances 2.5 and 20/3; standard error sqrt(2.5/5 + 20/12) = 1.4720;
    # (13/6)^2 / ((1/2)^2/4 + (5/3)^2/3) = 4.7482 degrees of freedom; their t is 2.6120.
    found = welch([1, 2, 3, 4, 5], [4, 6, 8, 10])
    assert found is not None
    assert found.value == pytest.approx(-4.0)
    assert found.high - found.value == pytest.approx(2.6120 * 1.47196, abs=2e-3)
    assert found.value - found.low == pytest.approx(found.half_width)
    assert found.n == 4
    assert found.p is not None
    assert 0.04 < found.p < 0.05  # t = 2.7175, just above
    assert welch([1.0], [1.0, 2.0]) is None
    assert welch([1.0, 1.0], [2.0, 2.0]) is None


def test_a_mean_by_hand() -> None:
    found = mean([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.value, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert mean([1.0]) is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.02, 0.9]) == pytest.approx([1.0, 0.06, 1.0])
    assert holm([]) == []


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 5 and 2 1 4 3 5: 1 - 6 * (1+1+1+1) / (5 * 24) = 0.8.
    assert spearman([1, 2, 3, 4, 5], [20, 10, 40, 30, 50]) == pytest.approx(0.8)
    assert spearman([1, 2, 3, 4], [-1.0, -8.0, -9.0, float("nan")]) == pytest.approx(-1.0)
    assert spearman([1, 2], [1, 2]) != spearman([1, 2], [1, 2])  # NaN
    assert spearman([1, 1, 1], [1, 2, 3]) != spearman([1, 1, 1], [1, 2, 3])


# ---- stage 0 ------------------------------------------------------------------------


def scored(tables: list[list[float]], seed: int) -> Row:
    table = {"steps": 100, "layers": ["a", "b", "c", "d"], "kernel": [True, True, True, False]}
    scores = {**table, **dict.fromkeys(("fluctuation", "direction", "variance"), tables)}
    return row_of(FAMILY.run(seed), layer_scores=json.dumps(scores))


def test_repeatability_of_made_up_scores() -> None:
    rising, swapped = [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0]  # rank correlation 0.8; 0.5
    rows = [scored([rising, rising, swapped], 0), scored([rising, swapped, swapped], 1)]
    found = judge(rows, "by epoch", None)[0]
    assert found.lag == 1
    assert found.windows == pytest.approx([0.9, 0.9])
    assert found.seeds == pytest.approx([(1 + 0.8 + 1) / 3])
    assert found.scope == "all"
    kernels = judge(rows, "by epoch", None)[1]
    assert (kernels.measure, kernels.scope) == (found.measure, "kernels")
    assert kernels.windows == pytest.approx([0.75, 0.75])
    assert found.lowest == pytest.approx(0.9)
    assert found.repeats
    assert not judge(rows[:1], "by epoch", None)[0].repeats  # seeds are not known
    backwards = scored([rising, rising[::-1], rising], 2)
    assert not judge([rows[0], backwards], "by epoch", None)[0].repeats


def test_windows_of_a_moving_average_lie_apart() -> None:
    assert lag(None, 10, 20) == 1
    assert lag(0.99, 87, 16) == 3
    assert 0.99 ** (87 * lag(0.99, 87, 16)) < 0.14
    assert lag(0.99, 10, 16) == 8  # as far as the run allows


# ---- files --------------------------------------------------------------------------


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.csv")
    rows = [
        row_of(FAMILY.run(0), weights='{"a":[1.0,2.0]}', diverged=True, train_loss=float("inf")),
        row_of(FAMILY.run(1, test=True), test=0.25),
    ]
    for row in rows:
        store.add(row)
    assert read(tmp_path / "a.csv") == rows
    assert store.rows() == {(row.key, row.seed): row for row in rows}
    (tmp_path / "b.csv").write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        store.rows()


@pytest.mark.parametrize("cut", [1, 30, 10_000])
def test_half_a_line_is_none(tmp_path: Path, cut: int) -> None:
    """What a machine that went down left behind."""
    path = tmp_path / "a.csv"
    first, second = (row_of(FAMILY.run(seed)) for seed in (0, 1))
    store = Store(path)
    store.add(first)
    store.add(second)
    content = path.read_bytes()
    header = content.index(b"\n") + 1
    kept = 0 if cut > len(content) else len(content) - cut
    path.write_bytes(content[:kept] if kept else content[: header // 2])
    left = [first] if kept else []
    assert list(store.rows().values()) == left
    store.add(second)
    assert list(store.rows().values()) == [*left, second]
    assert path.read_bytes() == (
        content if kept else content[:header] + content.splitlines(True)[2]
    )


def test_runs_differ_by_configuration_and_seed() -> None:
    run = FAMILY.run(0, Plain(0.1, 5e-4), {"measure": "variance"})
    assert run.key == FAMILY.run(0, Plain(0.1, 5e-4), {"measure": "variance", "factor": 2.0}).key
    assert run.key == replace(run, amplify={"measure": "variance", "backend": "torch"}).key
    others = [
        FAMILY.run(1, Plain(0.1, 5e-4), {"measure": "variance"}),
        FAMILY.run(0, Plain(0.1, 1e-3), {"measure": "variance"}),
        FAMILY.run(0, Plain(0.1, 5e-4), {"measure": "direction"}),
        FAMILY.run(0, Plain(0.1, 5e-4), {"measure": "variance"}, test=True),
        FAMILY.run(0, Plain(0.1, 5e-4)),
        replace(run, train=64),
    ]
    assert len({run.key, *(other.key for other in others)}) == 1 + len(others)
    assert json.loads(run.config)["recipe"]["width"] == 0.5


# ---- runs ---------------------------------------------------------------------------


class Untouchable:
    """Stands where the test images were."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("the test set was touched")

    def __len__(self) -> int:
        raise AssertionError("the test set was touched")


def without_test(data: Data) -> Data:
    return replace(data, test_images=Untouchable(), test_labels=Untouchable())  # type: ignore[arg-type]


def test_a_run_tells_what_it_did(easy: Data) -> None:
    options = {"measure": "variance", "threshold": 1e9, "min_steps": 1, "refresh": 1}
    about = {**ABOUT, "stage": "stage1", "arm": "all"}
    row = execute(FAMILY.run(0, amplify=options, scores=True), without_test(easy), about)
    assert row.amplified == pytest.approx(7 / 8)  # of eight steps all but the first
    assert row.test is None
    weights = json.loads(row.weights)
    assert len(weights) == 8
    assert all(norm > 0 for norm in weights.values())
    scores = json.loads(row.layer_scores)
    assert scores["steps"] == 4
    assert scores["kernel"] == [True, False, True, False, True]
    assert len(scores["direction"]) == 2
    assert all(-1 <= value <= 1 for value in scores["direction"][0])
    with pytest.raises(AssertionError, match="touched"):
        execute(FAMILY.run(0, test=True), without_test(easy), about)
    assert 0 < (execute(FAMILY.run(0, test=True), easy, about).test or 0) < 1


def test_everything_amplified_is_another_rate_and_decay(easy: Data) -> None:
    """The control of stage 1, to the last bit: 2 is a power of two."""
    rows = {
        job.run.key: row_of(job.run, validation=0.5 + 0.1 * (job.run.recipe.lr == 0.05))
        for job in stages.tune(FAMILY, TINY.rates, TINY.tune_seeds, {})
    }
    jobs = stages.stage1(TINY, rows)
    amplified, equal = jobs[-2:]
    assert amplified.run.amplify is not None
    assert (equal.run.recipe.lr, equal.run.recipe.weight_decay) == (0.1, 2.5e-4)
    about = {**ABOUT, "stage": "stage1", "arm": "all"}
    a, b = (execute(job.run, without_test(easy), about) for job in (amplified, equal))
    assert a.amplified == 1.0
    assert (a.validation, a.train_loss, a.weights) == (b.validation, b.train_loss, b.weights)


# ---- stages -------------------------------------------------------------------------


def finish(stage: str, experiment: Experiment, rows: dict[Any, Row], **outcomes: Any) -> None:
    """Made-up outcomes for all that a stage wants, in as many rounds as it takes."""
    while missing := [
        job for job in stages.STAGES[stage](experiment, rows) if job.run.key not in rows
    ]:
        for job in missing:
            changes = {name: make(job.run) for name, make in outcomes.items()}
            rows[job.run.key] = row_of(job.run, arm=job.arm, **changes)


def repeating(run: Run) -> str:
    layers = [1.0, 2.0, 3.0, 4.0]
    scores: dict[str, Any] = {"steps": 4, "layers": list("abcd"), "kernel": [True] * 4}
    scores |= {"fluctuation": [layers, layers], "variance": [layers, layers[::-1]]}
    return json.dumps({**scores, "direction": [layers, [2.0, 1.0, 3.0, 4.0]]})


def test_a_grid_grows_until_the_best_is_inside() -> None:
    for best, last in ((0.4, 0.8), (0.05, 0.1), (0.005, 0.0025)):
        rows: dict[Any, Row] = {}
        while missing := [
            job
            for job in stages.tune(FAMILY, TINY.rates, TINY.tune_seeds, rows)
            if job.run.key not in rows
        ]:
            for job in missing:
                distance = abs(torch.tensor(job.run.recipe.lr / best).log2().item())
                rows[job.run.key] = row_of(job.run, validation=1 - distance / 20)
        rates = {job.run.recipe.lr for job in stages.tune(FAMILY, TINY.rates, range(2), rows)}
        assert any(rate == pytest.approx(last) for rate in rates)
        jobs = stages.tune(FAMILY, TINY.rates, range(2), rows)
        assert min(rates) < stages.best_of(jobs, rows).lr < max(rates)


def test_stages_choose_on_validation_images_alone() -> None:
    rows: dict[Any, Row] = {}
    with pytest.raises(NotReady, match="stage 1"):
        stages.stage2(TINY, rows)
    finish("stage0", TINY, rows, layer_scores=repeating)
    assert [f["measure"] for f in stages.measures(TINY, rows)] == ["fluctuation", "direction"]

    def accuracy(run: Run) -> float:
        options = run.amplify or {}
        return (
            0.5
            + 0.1 * (run.recipe.lr == 0.05)
            + 0.02 * (run.recipe.weight_decay == 1e-3)
            + 0.3 * (options.get("select") == "above" and run.recipe.lr == 0.2)
            + 0.05 * (options.get("measure") == "direction")
            + 0.01 * (options.get("factor") == 1.5)
        )

    finish("stage1", TINY, rows, validation=accuracy)
    assert stages.tuned(TINY, rows) == Plain(0.05, 1e-3)
    finish("stage2", TINY, rows, validation=accuracy)
    chosen = stages.chosen(TINY, rows)
    assert chosen.times == pytest.approx(4.0)
    assert {
        "measure": "direction",
        "select": "above",
        "factor": 1.5,
    }.items() <= chosen.options.items()
    assert not any(row.test for row in rows.values())
    assert not any(json.loads(row.config)["test"] for row in rows.values())
    finish("more", TINY, rows)
    assert not any(json.loads(row.config)["test"] for row in rows.values())
    before = set(rows)
    finish("stage3", TINY, rows, validation=accuracy, test=lambda run: 0.5 if run.test else None)
    arms = stages.arms(TINY, rows)
    assert all(job.run.test and job.run.recipe.seed >= 100 for job in arms)
    assert {job.run.key for job in arms} <= set(rows) - before
    by_arm = {job.arm: job.run for job in arms}
    assert by_arm["plain"].recipe == by_arm["chosen"].recipe
    assert by_arm["plain"].recipe.lr == 0.2
    assert by_arm["plain, tuned"].recipe.lr == 0.05
    assert by_arm["inverse"].amplify == {**chosen.options, "select": "below"}
    shuffled, drawn = by_arm["shuffled"].amplify, by_arm["random"].amplify
    assert shuffled is not None
    assert drawn is not None
    assert shuffled == {**chosen.options, "shuffle": by_arm["shuffled"].recipe.seed}
    assert (drawn["measure"], drawn["quantile"]) == ("random", 0.5)
    hashes = {job.run.key[0] for job in arms}
    assert len(hashes) == 6  # the seeds of the controls are the runs'


def test_a_measure_that_ranks_kernels_alone_is_screened_on_them() -> None:
    rows: dict[Any, Row] = {}
    table = [[1.0, 2.0, 3.0, 4.0, 9.0, 8.0], [1.0, 2.0, 3.0, 4.0, -9.0, -8.0]]
    noise = [[1.0, 2.0, 3.0, 4.0, 9.0, 8.0], [4.0, 1.0, 3.0, 2.0, -9.0, -8.0]]
    scores = {"steps": 4, "layers": list("abcdef"), "kernel": [True] * 4 + [False] * 2}
    scores |= {"fluctuation": noise, "direction": table, "variance": noise}
    finish("stage0", TINY, rows, layer_scores=lambda run: json.dumps(scores))
    [found] = stages.measures(TINY, rows)
    assert (found["measure"], found["exclude_bias_and_norm"]) == ("direction", True)


def test_nothing_is_screened_that_does_not_repeat() -> None:
    rows: dict[Any, Row] = {}
    finish("stage1", TINY, rows)
    noise = [[1.0, 2.0, 3.0, 4.0], [4.0, 2.0, 3.0, 1.0]]
    scores = {"steps": 4, "layers": list("abcd"), "kernel": [True] * 4}
    scores |= dict.fromkeys(("fluctuation", "direction", "variance"), noise)
    finish("stage0", TINY, rows, layer_scores=lambda run: json.dumps(scores))
    with pytest.raises(NotReady, match="no measure"):
        stages.stage2(TINY, rows)


@pytest.mark.slow
def test_the_experiment_from_end_to_end(
    easy: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeatability, "BAR", -1.0)  # of so small a network hardly a score repeats
    store = Store(tmp_path / "fake-cpu.csv")
    for stage in ("stage0", "stage1"):
        assert work(stage, store, without_test(easy)) == 0
    before = store.path.read_bytes()
    assert work("stage1", store, None) == 0  # nothing is run twice
    assert store.path.read_bytes() == before
    assert work("stage1", Store(tmp_path / "fake-cuda.csv"), None) == 0  # on any machine
    assert work("stage2", store, without_test(easy)) == 0
    assert work("more", store, without_test(easy)) == 0
    assert not any(row.test for row in read(store.path))
    assert work("stage3", store, easy) == 0
    rows = store.rows()
    page = report.page(TINY, rows)
    assert "Not yet" not in page
    assert "| chosen |" in page
    assert f"| {stages.chosen(TINY, rows).options['measure']}" in page


def test_no_run_begins_after_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("bench.accuracy.work.time", SimpleNamespace(monotonic=lambda: now))

    def run(stage: str, job: Job) -> Row:
        nonlocal now
        now += 10.0
        return row_of(job.run)

    store, said = Store(tmp_path / "fake-cpu.csv"), []
    wanted = partial(stages.stage0, TINY)
    for budget, left in ((0.0, 4), (9.0, 3), (11.0, 1), (100.0, 0)):
        found = run_stage("stage0", wanted, store, run, Here(), budget=budget, say=said.append)
        assert found == left
    assert "stage0: 3 of 4 runs are left" in said


def test_several_at_once_and_each_once(tmp_path: Path) -> None:
    """With as many in flight as there are workers, though two arms may want one run."""
    flying, most, begun = threading.Semaphore(3), [], []

    def run(stage: str, job: Job) -> Row:
        assert flying.acquire(blocking=False)
        begun.append(job.run.key)
        time.sleep(0.01)
        flying.release()
        return row_of(job.run)

    store, wanted = Store(tmp_path / "fake-cpu.csv"), partial(stages.stage1, TINY)
    with ThreadPoolExecutor(8) as pool:
        assert run_stage("stage1", wanted, store, run, pool, workers=3, say=most.append) == 0
    assert len(begun) == len(set(begun)) == len(read(store.path))


# ---- report and command line --------------------------------------------------------


def test_the_report_is_honest_about_few_runs() -> None:
    rows: dict[Any, Row] = {}
    page = report.page(TINY, rows)
    assert page.count("Not yet: stage 1 is not finished") == 4
    finish("stage0", TINY, rows, layer_scores=repeating)
    finish("stage1", TINY, rows)
    finish("stage2", TINY, rows)
    finish(
        "stage3", TINY, rows,
        test=lambda run: 0.001 * run.recipe.seed if run.test else None,
        diverged=lambda run: run.recipe.seed == 101 and run.amplify is not None,
    )  # fmt: skip
    page = report.page(TINY, rows)
    assert "chosen - plain: too few runs for an interval." in page
    arm = next(line for line in page.splitlines() if line.startswith("| inverse |"))
    assert arm.split("|")[2:4] == [" 2 ", " 1 "]


def test_the_page_s_commands_are_understood() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "accuracy.md").read_text()
    found = re.findall(r"^python -m bench\.accuracy (.*)$", page, re.MULTILINE)
    assert len(found) > 7
    others = {"grow": grow, "growth": growth, "language": language, "thermometer": thermometer}
    names = set()
    for line in found:
        name, *rest = line.partition("#")[0].split()
        if name in others:
            others[name].arguments(rest)
        else:
            names.add(name_of(command.arguments([name, *rest, "--device=cpu"])))
    assert {"cifar10-cpu", "cifar10-cpu-on-cifar100", "cifar10-cpu-on-vgg19_bn"} <= names


@pytest.mark.slow
def test_there_is_a_report_at_any_time(tmp_path: Path) -> None:
    rows: dict[Any, Row] = {}
    for stage, make in stages.STAGES.items():
        for count in range(100):
            missing = [job for job in make(TINY, rows) if job.run.key not in rows]
            if not missing:
                break
            for job in missing[: 1 if count == 0 else None]:
                scores, test = repeating(job.run), 0.5 if job.run.test else None
                rows[job.run.key] = row_of(job.run, layer_scores=scores, test=test)
            assert report.page(TINY, rows).startswith("# fake")
            figures.draw(TINY, rows, tmp_path, stage)


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--data=fake", "--device=cpu", f"--out={tmp_path}", "--epochs=2", "--width=0.25"]
    assert command.main(["stage0", *out, "--budget-s=500"]) == 0
    assert "0 of 8 runs are left" in capsys.readouterr().out
    rows = read(tmp_path / "fake-cpu.csv")
    assert {row.torch for row in rows} == {torch.__version__}
    assert command.main(["report", *out]) == 0
    assert "8 of 8 runs" in (tmp_path / "fake-cpu-width-0.25-epochs-2.md").read_text()
    assert (tmp_path / "fake-cpu-width-0.25-epochs-2-repeat.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="stage 1 is not finished"):
        command.main(["stage2", *out])


@pytest.mark.slow
def test_workers_share_the_work(tmp_path: Path) -> None:
    out = ["--data=fake", "--device=cpu", f"--out={tmp_path}", "--epochs=2", "--width=0.25"]
    typed = [sys.executable, "-m", "bench.accuracy", "stage0", *out, "--workers=2"]
    subprocess.run(typed, cwd=ROOT, check=True)  # as a module, which spawned processes are told of
    assert len(read(tmp_path / "fake-cpu.csv")) == len(Store(tmp_path / "a.csv").rows()) == 8
