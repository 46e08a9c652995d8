"""The page of the study's results, and the statistics behind its figures."""

import numpy as np
import pytest
from make_study_page import STUDIES, fill_page
from study_results import Study, crossed_mean
from test_study import ROOT

from dcod_jax.study.conditions import (
    read_results,
    to_hex,
)


def test_crossed_mean_is_the_analysis_of_variance_and_covers():
    """Against sums written out, and on data whose truth is known."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(3, 4))
    S, P = values.shape
    grand = values.mean()
    ms_s = P * sum((values[s].mean() - grand) ** 2 for s in range(S)) / (S - 1)
    ms_p = S * sum((values[:, p].mean() - grand) ** 2 for p in range(P)) / (P - 1)
    ms_e = sum(
        (values[s, p] - values[s].mean() - values[:, p].mean() + grand) ** 2
        for s in range(S)
        for p in range(P)
    ) / ((S - 1) * (P - 1))
    a, b = max(ms_s, ms_e), max(ms_p, ms_e)
    free = (a + b - ms_e) ** 2 / (a**2 / 2 + b**2 / 3 + ms_e**2 / 6)
    from scipy.stats import t

    half = t.ppf(0.975, free) * ((a + b - ms_e) / 12) ** 0.5
    found = crossed_mean(values)
    assert (found.mean, found.low, found.high) == pytest.approx((grand, grand - half, grand + half))

    inside = 0
    for _ in range(400):
        seeds, problems = generator.normal(size=(5, 1)), 2 * generator.normal(size=(1, 40))
        estimate = crossed_mean(seeds + problems + generator.normal(size=(5, 40)))
        inside += estimate.low <= 0 <= estimate.high
    assert 0.92 <= inside / 400 <= 0.995
    # Equal values: as three of them, the fewer of seeds and problems, allow.
    assert crossed_mean(np.ones((3, 4)))[1:] == pytest.approx((0.025 ** (1 / 3), 1))
    assert crossed_mean(np.zeros((3, 4)), -1.0).high == pytest.approx(1 - 0.025 ** (1 / 3))
    assert np.isnan(crossed_mean(np.ones((1, 4))).low)


def test_the_page_holds_the_results():
    """Every table of the studies' pages is what the committed results say."""
    for file, names in STUDIES.values():
        study = Study(read_results(ROOT / "docs" / "study" / file))
        for name in names:
            page = (ROOT / "docs" / name).read_text(encoding="utf-8")
            assert fill_page(page, study) == page, "run python tools/make_study_page.py"


def line_of(condition, arm, seed, correct, start):
    bits = {name: to_hex(np.array(x, bool)) for name, x in (("in", correct), ("start", start))}
    own = {"kind": "test", "condition": condition, "arm": arm, "seed": seed}
    return own | {"correct": {"in": bits["in"]}, "start": {"in": bits["start"]}}


def settings_line(condition, arm):
    settings = {"study.only": [], "loss.weights.name": arm, "study.problems": 4}
    return {"kind": "settings", "condition": condition, "arm": arm, "settings": settings}


def test_an_arm_is_compared_with_main_only_from_the_same_starts():
    own = [settings_line("main", "sft"), settings_line("variants", "sft+t3")]
    main = line_of("main", "sft", 1, [0, 1, 1, 0], [0, 0, 0, 1])
    alike = line_of("variants", "sft+t3", 1, [1, 1, 1, 0], [0, 0, 0, 1])
    assert Study([*own, main, alike]).base(("variants", "sft+t3")) == ("main", "sft")
    apart = line_of("variants", "sft+t3", 1, [1, 1, 1, 0], [0, 0, 1, 1])
    assert Study([*own, main, apart]).base(("variants", "sft+t3")) is None


def test_gains_are_paired_with_each_seeds_own_start():
    lines = [
        settings_line("main", "sft"),
        line_of("main", "sft", 1, [1, 1, 1, 0], [1, 0, 0, 0]),
        line_of("main", "sft", 2, [0, 0, 1, 0], [0, 1, 1, 0]),
    ]
    found = Study(lines)
    assert found.gain(("main", "sft"), "in").mean == pytest.approx((2 - 1) / 8)
    assert found.starts("main", "in").tolist() == [0.25, 0.5]


def test_validation_picks_an_arm_by_its_best_rate():
    """The pick against the others; a condition without a grid of its own has the one of main."""
    tuned = {"sft": (0.5, 0.2), "sft+sigmoid": (0.4, 0.3), "sft+auto": (0.1, 0.6)}
    lines = []
    for number, (arm, grid) in enumerate(tuned.items()):
        for condition in ("main", "other"):
            lines.append(settings_line(condition, arm))
            correct = [1] * (number + 1) + [0] * (3 - number)
            for seed in (1, 2):
                line = line_of(condition, arm, seed, correct, [0] * 4)
                line["correct"]["longer"] = line["correct"]["in"]
                lines.append(line)
        cost = {"train_cpu": 2.0, "eval_cpu": 0.5}
        for rate, accuracy in zip((1e-3, 3e-3), grid, strict=True):
            own = {"kind": "tune", "condition": "main", "arm": arm, "rate": rate} | cost
            lines += [own | {"accuracy": {"validation": accuracy + x}} for x in (-0.1, 0.1)]
    page = fill_page("<!-- study: picked -->\n<!-- end -->", Study(lines))
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if "`" in line]
    assert [row[:3] for row in rows] == [
        [condition, name, "`sft+auto`"]
        for condition in ("main", "other")
        for name in ("in", "longer")
    ]
    assert [row[3] for row in rows] == ["75.0"] * 4
    assert [row[4].split(" ")[0].strip("*") for row in rows] == ["+50.0"] * 4
    assert [row[5].split(" ")[0].strip("*") for row in rows] == ["+25.0"] * 4
    assert [row[6:] for row in rows] == [["30"], ["30"], [], []]
