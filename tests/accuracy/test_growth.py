"""The experiments on growing and on the thermometer: what they run, choose and say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
import test_train  # noqa: F401  # skips where torchvision cannot be imported

from bench.accuracy import __main__ as command
from bench.accuracy import (
    growth,
    growth_findings,
    growth_report,
    growth_stages,
    optimizers,
    paper_stages,
    peer_stages,
    thermometer,
    vanishing_stages,
)
from bench.accuracy import thermometer_report as report
from bench.accuracy.data import load
from bench.accuracy.growth_stages import ARMS, CONTRASTS, Growth, name_of
from bench.accuracy.lines import append_record, read_records
from bench.accuracy.optimizers import OptimizerMissing
from bench.accuracy.runs import Row, Run, growth_of, stored_options
from bench.accuracy.stages import Family, Job, NotReady
from bench.accuracy.store import Rows, Store
from bench.accuracy.train import Recipe, train

TINY = Growth(
    Family("fake", Recipe(arch="cnn", width=0.25, epochs=2, batch=32, lr=0.1, warmup=0.0), 128, 64),
    rates=(0.05, 0.1, 0.2),
    tune_seeds=range(1),
    seeds=range(100, 103),
)


def row_of(run: Run, **changes: Any) -> Row:
    """A made-up outcome."""
    key, seed = run.key
    cells: dict[str, Any] = {
        "stage": "growth", "arm": "an arm", "key": key, "seed": seed, "validation": 0.5,
        "test": None, "diverged": False, "train_loss": 1.0, "amplified": 0.0, "seconds": 1.0,
        "device": "none", "torch": "0", "commit": "0", "date": "never", "config": run.config,
        "weights": "{}", "layer_scores": "",
    }  # fmt: skip
    return Row(**{**cells, **changes})


def tuned() -> Rows:
    """The plain runs, of which that at 0.1 is best."""
    return {
        job.run.key: row_of(job.run, validation=0.6 if job.run.recipe.lr == 0.1 else 0.5)
        for job in growth_stages.tune(TINY, {})
    }


def told(jobs: list[Job], accuracy: dict[str, float]) -> Rows:
    """Every job's outcome, by its arm, with a little that differs between the seeds."""
    return {
        job.run.key: row_of(
            job.run,
            arm=job.arm,
            test=accuracy.get(job.arm, 0.7) + job.run.recipe.seed % 100 / 1000,
        )
        for job in jobs
    }


# ---- data ---------------------------------------------------------------------------


def test_halved_images_are_means_of_four(tmp_path: Path) -> None:
    images = numpy.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=numpy.uint8)
    labels = numpy.arange(20) % 10
    numpy.savez(tmp_path / "cifar10.npz", x_train=images, y_train=labels,
                x_test=images[:10], y_test=labels[:10])  # fmt: skip
    data = load("cifar10-16", tmp_path)
    assert data.train_images.shape == (20, 20, 20, 3)
    assert data.test_images.shape == (10, 16, 16, 3)
    for row, column in ((0, 0), (5, 11), (15, 15)):
        corner = images[3, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].astype(float)
        expected = numpy.floor(corner.mean((0, 1)) + 0.5)
        assert data.test_images[3, row, column].tolist() == expected.tolist()
        assert data.train_images[3, row + 2, column + 2].tolist() == expected.tolist()


# ---- stages -------------------------------------------------------------------------


def test_contrasts_wait_for_the_tuned_rate() -> None:
    assert growth_stages.everything(TINY, {}) == growth_stages.tune(TINY, {})
    with pytest.raises(NotReady):
        growth_stages.contrasts(TINY, {})


def test_arms_at_multiples_of_the_best_rate_on_fresh_seeds_and_test_images() -> None:
    jobs = growth_stages.contrasts(TINY, tuned())
    assert [job.run.recipe.seed for job in jobs] == sorted(len(ARMS) * [100, 101, 102])
    assert all(job.run.test for job in jobs)
    assert not any(job.run.test for job in growth_stages.tune(TINY, {}))
    rates = {job.arm: job.run.recipe.lr for job in jobs}
    assert rates["growing, best/64"] == pytest.approx(0.1 / 64)
    assert rates["plain, best"] == 0.1
    assert rates["growing, 8 x best"] == pytest.approx(0.8)
    assert len({job.run.key for job in jobs}) == len(jobs)
    names = {name_of(arm, times) for arm, times, _ in ARMS}
    assert {name_of(*side) for pair in CONTRASTS for side in pair} <= names


def test_a_change_that_only_the_controls_know_is_another_run() -> None:
    assert stored_options({"grow": True}) != stored_options({"grow": True, "one_factor": True})
    assert stored_options({"dose": 0.5})["dose"] == 0.5
    assert stored_options({"shuffle": 1}) == stored_options({"shuffle": 2})


def adamw_tuned() -> Rows:
    """AdamW's plain runs, of which that at 2e-3 is best."""
    return {
        job.run.key: row_of(job.run, validation=0.6 if job.run.recipe.lr == 2e-3 else 0.5)
        for job in peer_stages.peers(TINY, {})
    }


def test_updates_grow_under_adamw() -> None:
    """Attached, and stepped once: at 1e-5 the gradients agree and the factors grow."""
    recipe = replace(TINY.family.recipe, optimizer="adamw", epochs=20, lr=1e-5)
    data = load("fake").hold_out(64, 128)
    result = train(data, recipe, {"grow": True, "min_steps": 20})
    assert result.history[-1].steps == 20 * 4
    assert growth_of(result.history)["factor"][-1] > 2
    assert result.epochs[-1].train_loss < train(data, recipe).epochs[-1].train_loss


def test_a_peer_is_another_run_and_the_plain_optimizer_the_run_that_is_stored() -> None:
    plain = TINY.family.run(0)
    assert "optimizer" not in json.loads(plain.config)["recipe"]
    rows = adamw_tuned()
    jobs = peer_stages.arms(TINY, rows)
    assert len({job.run.key for job in jobs} | {plain.key}) == len(jobs) + 1
    rates = {job.arm: job.run.recipe.lr for job in jobs}
    assert {rates[name] for name in optimizers.PEERS} == {1.0}
    assert (rates["AdamW growing from 1e-5"], rates["AdamW, best"]) == (1e-5, 2e-3)
    arms = {job.arm for job in jobs} | {name_of(arm, times) for arm, times, _ in ARMS}
    assert {name_of(*side) for pair in peer_stages.CONTRASTS for side in pair} <= arms


def test_a_peer_trains_and_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rate is scheduled as the plain one's: SGD as a peer is plain SGD."""
    recipe = replace(TINY.family.recipe, optimizer="prodigy", lr=0.05)
    data = load("fake").hold_out(64, 128)

    def made(package: Any, params: Any) -> torch.optim.Optimizer:
        return package.optim.SGD(params, lr=1.0)

    monkeypatch.setitem(optimizers.PEERS, recipe.optimizer, ("torch", "torch", made))
    plain = replace(recipe, optimizer="sgd", momentum=0.0, weight_decay=0.0)
    assert train(data, recipe).epochs == train(data, plain).epochs
    monkeypatch.setitem(optimizers.PEERS, recipe.optimizer, ("a-package", "no_such_module", made))
    with pytest.raises(OptimizerMissing, match="pip install a-package"):
        train(data, recipe)


def test_ten_layers_of_tanh_are_tuned_anew() -> None:
    here = vanishing_stages.network(TINY)
    assert {job.run.recipe.arch for job in vanishing_stages.vanishing(TINY, tuned())} == {"tanh"}
    rows = {
        job.run.key: row_of(job.run, validation=0.6 if job.run.recipe.lr == 0.1 else 0.5)
        for job in growth_stages.tune(here, {})
    }
    jobs = vanishing_stages.vanishing(TINY, rows)
    assert len(jobs) == 3 + 3 * len(vanishing_stages.ARMS)
    arms = {job.arm for job in jobs}
    assert {name_of(*side) for pair in vanishing_stages.CONTRASTS for side in pair} <= arms


def test_the_paper_s_arms_share_rates_and_seeds() -> None:
    jobs = paper_stages.paper(TINY, tuned())
    assert len({job.run.key for job in jobs}) == len(jobs) == 2 * 2 * 3 * len(paper_stages.arms(0))
    first = jobs[: len(jobs) // 2]
    assert {job.run.recipe.fall for job in first} == {"steps"}
    assert {job.run.recipe.warmup for job in jobs[len(jobs) // 2 :]} == {0.1}
    assert {job.run.recipe.lr for job in jobs} == {0.1, 0.4}
    arms = paper_stages.arms(0)
    assert {side for pair in paper_stages.CONTRASTS for side in pair} == set(arms)


# ---- report -------------------------------------------------------------------------


def test_contrasts_by_hand() -> None:
    rows = tuned()
    lifts = {"growing, best/64": 0.72, "plain, best/64": 0.5, "growing, 8 x best": 0.69}
    rows |= told(growth_stages.contrasts(TINY, rows), lifts)
    found = growth_stages.differences(TINY, rows)
    value = {pair: interval.value for pair, interval in found.items() if interval is not None}
    assert value["growing, best/64", "plain, best/64"] == pytest.approx(0.22)
    assert value["growing, best/64", "plain, best"] == pytest.approx(0.02)
    assert value["growing, 8 x best", "plain, 8 x best"] == pytest.approx(-0.01)
    page = growth_report.page(TINY, rows, Path("/dev/null"))
    assert "| growing, best/64 - plain, best/64 | +22.00 [" in page
    # Seeds differ by 0.1 points: sqrt(2/3) x 0.1 x t(4 degrees, 0.975) = 0.2267.
    assert "+22.00 [+21.77, +22.23]" in page
    assert "24 of 24 runs on fresh seeds" in page


def test_a_run_that_diverged_counts_as_it_came_out() -> None:
    rows = tuned()
    jobs = growth_stages.contrasts(TINY, rows)
    rows |= told(jobs, {})
    (job,) = (j for j in jobs if j.arm == "plain, 8 x best" and j.run.recipe.seed == 100)
    rows[job.run.key] = replace(rows[job.run.key], test=0.1, diverged=True)
    interval = growth_stages.differences(TINY, rows)["growing, 8 x best", "plain, 8 x best"]
    assert interval is not None
    assert interval.value == pytest.approx(0.2)
    assert "| plain, 8 x best | 50." in growth_report.page(TINY, rows, Path("/dev/null"))


def test_the_page_of_nothing() -> None:
    page = growth_report.page(TINY, {}, Path("/nowhere/at/all.png"))
    assert "Not yet: the plain learning rate is not tuned yet." in page
    assert "Not measured yet." in page


def test_the_findings_say_what_the_intervals_allow() -> None:
    rows = tuned()
    jobs = growth_stages.contrasts(TINY, rows)
    rows |= told(jobs, {"growing, best/64": 0.8, "plain, 8 x best": 0.704, "one factor, best": 0.6})
    text = "\n".join(growth_findings.findings(TINY, rows, measured(CURVE)))
    assert "plain 70.10 [69.85, 70.35] %: +10.00 [+9.77, +10.23] points, better." in text
    tuned_rate = "**The tuned rate, and 8 times that:** +0.00 [-0.23, +0.23] points, not worse by"
    assert f"{tuned_rate} 0.3 points." in text
    assert "In 3 of 3 seeds nothing grew, and the runs are the same." in text
    assert "8 times too high: growing 70.10 [69.85, 70.35] %, plain 70.50" in text
    assert "-0.40 [-0.63, -0.17] points, worse." in text
    assert "At the tuned rate +10.00" in text
    assert "crosses zero in 1 of 1 settings" in text
    assert "chosen layers:** not measured yet." in text
    wide = {j.run.key: row_of(j.run, test=j.run.recipe.seed % 100 / 10) for j in jobs}
    text = "\n".join(growth_findings.findings(TINY, tuned() | wide, []))
    assert "points, no difference shown." in text
    assert "**The thermometer:** not measured yet." in text


def test_the_findings_count_the_arms_of_the_published_idea() -> None:
    rows = tuned()
    jobs = paper_stages.paper(TINY, rows, ["steps"])
    rows |= told(jobs, {"all, best": 0.75, "direction above, 4 x best": 0.65})
    arms = 2 * (len(paper_stages.arms(0)) - 1)
    said = growth_findings.fixed(TINY, rows)
    assert f"1 of {arms} arms are better than plain at the same rate and 1 are worse" in said
    assert "(-5.00 to +5.00 points, 3 seeds)." in said
    assert "warm-up" not in said


def test_peers_are_shown_before_adamw_is_tuned() -> None:
    rows = tuned()
    rows |= told(growth_stages.contrasts(TINY, rows), {"growing, best/64": 0.8})
    jobs = peer_stages.arms(TINY, rows)
    assert {job.arm for job in jobs} == set(peer_stages.PEERS)
    rows |= told(jobs, {"prodigy": 0.85})
    page = "\n".join(growth_report.peers(TINY, rows))
    assert "| growing, best/64 - prodigy | -5.00 [" in page
    assert "AdamW, plain and growing, was not run." in page
    assert "AdamW growing" not in page
    text = growth_findings.peers(TINY, rows)
    assert text.startswith("growing from a rate 64 times too low minus prodigy -5.00 [")
    assert "worse; d-adapt sgd" in text
    assert growth_findings.peers(TINY, tuned()) == "not measured yet."


def test_the_document_is_filled_once(tmp_path: Path) -> None:
    document = tmp_path / "accuracy.md"
    document.write_text("by hand\n<!-- growth: contrasts -->\nold\n<!-- end -->\nby hand too\n")
    rows = tuned()
    rows |= told(growth_stages.contrasts(TINY, rows), {})
    growth_report.write(document, TINY, rows, [])
    once = document.read_text()
    assert once.startswith("by hand\n<!-- growth: contrasts -->\n\nPlain, tuned")
    assert once.endswith("<!-- end -->\nby hand too\n")
    assert "old" not in once
    growth_report.write(document, TINY, rows, [])
    assert document.read_text() == once


def test_the_command_runs_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(growth.EXPERIMENTS, "cifar10-16", replace(TINY, seeds=range(100, 101)))
    given = ["growth", "--device", "cpu", "--out", str(tmp_path), "--commit", "abc"]
    assert command.main(given) == 0
    rows = Store(tmp_path / "cifar10-16-cpu.csv").rows()
    best = growth_stages.best(TINY, rows)
    assert len(rows) == len(growth_stages.tune(TINY, rows)) + len(ARMS)
    grown = [row for row in rows.values() if row.arm == "growing, best/64"]
    stored = json.loads(grown[0].layer_scores)
    assert all(len(values) == TINY.family.recipe.epochs for values in stored.values())
    assert not (tmp_path / "cifar10-16-cpu.png").exists()  # of one seed there is no interval
    assert f"the best plain rate is {best.lr:g}" in (tmp_path / "cifar10-16-cpu.md").read_text()
    capsys.readouterr()
    assert command.main(given) == 0
    assert "0 of" in capsys.readouterr().out.partition("\n")[0]


# ---- the thermometer ----------------------------------------------------------------


def measured(curve: dict[float, tuple[float, float]], seeds: int = 2) -> list[thermometer.Row]:
    """A direction and an accuracy by rate."""
    return [
        thermometer.Row(
            "mlp", "SGD", 32, 400, rate, seed, direction + seed / 100 - 0.005, accuracy, 1.0, 1.0,
            "none", "0", "0", "never",
        )
        for rate, (direction, accuracy) in curve.items()
        for seed in range(seeds)
    ]  # fmt: skip


CURVE = {0.1: (0.4, 0.3), 0.2: (0.3, 0.5), 0.4: (0.1, 0.6), 0.8: (-0.1, 0.5), 1.6: (0.2, 0.1)}


def test_crossing_and_best_rate_by_hand() -> None:
    (curve,) = report.curves(measured(CURVE))
    assert curve.best == pytest.approx(0.4)  # neighbours are equal
    assert curve.crossing == pytest.approx(0.4 * math.sqrt(2))  # halfway between 0.1 and -0.1
    assert curve.ratio == pytest.approx(math.sqrt(2))
    assert curve.at(0.4 * math.sqrt(2), "accuracy") == pytest.approx(0.55)
    (skewed,) = report.curves(measured(CURVE | {0.8: (-0.1, 0.6)}))
    assert skewed.best == pytest.approx(0.4 * math.sqrt(2))
    (never,) = report.curves(measured({rate: (0.1, a) for rate, (_, a) in CURVE.items()}))
    assert never.crossing is None


def test_a_seed_that_a_rate_lacks_counts_nowhere() -> None:
    rows = measured(CURVE) + measured({0.1: (9.0, 0.9)}, seeds=3)[-1:]
    assert report.curves(rows) == report.curves(measured(CURVE))


def test_the_verdict_counts_the_claim(tmp_path: Path) -> None:
    far = [
        replace(row, network="cnn_bn", accuracy=0.9 if row.rate == 0.1 else 0.1)
        for row in measured(CURVE)
    ]
    rows = measured(CURVE) + far
    assert "within a factor of 2 of the best rate in 1." in report.verdict(report.curves(rows))
    page = report.page(rows, tmp_path / "thermometer.png")
    assert (tmp_path / "thermometer.png").is_file()
    assert "| mlp, SGD, 32 | 0.4 | 60.0 | +0.100 | 0.57 | 1.41 | 5.0 |" in page


def test_a_measured_run_is_a_plain_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measuring changes nothing, and a line comes back as it was written."""
    images = torch.randn(64, 3, 16, 16)
    labels = torch.arange(64) % 10
    monkeypatch.setattr(thermometer, "images", lambda root: (images, labels, images, labels))
    about = {"device": "none", "torch": "0", "commit": "0", "date": "never"}
    run = thermometer.Run("mlp", "SGD", 32, 60, 0.05, 0)
    row = thermometer.execute(run, "nowhere", about)
    assert row.run == run
    assert -1 < row.direction < 1
    assert row.direction != 0
    monkeypatch.setattr(thermometer.Amplifier, "step", lambda self: None)
    monkeypatch.setattr(thermometer, "READINGS", range(0))
    monkeypatch.setattr(thermometer, "fmean", lambda readings: 0.0)
    assert thermometer.execute(run, "nowhere", about).loss == row.loss
    append_record(tmp_path / "rows.csv", row)
    assert read_records(tmp_path / "rows.csv", thermometer.Row) == [row]


def test_every_setting_has_every_rate_and_seed() -> None:
    runs = list(thermometer.wanted())
    assert len(set(runs)) == len(runs) == 3 * 2 * 3 * 3 * 12
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
