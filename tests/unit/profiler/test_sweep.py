from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

import pytest

from hetero_sglang import cli
from hetero_sglang.errors import ConfigError
from hetero_sglang.profile import HeadRole, Thresholds
from hetero_sglang.profiler import (
    Calibration,
    CalibrationText,
    WatchedModel,
    calibration_prompts,
    observe,
)
from hetero_sglang.profiler.sweep import Sweep, sweep_profiles, to_csv
from hetero_sglang.simulation import (
    Method,
    Simulation,
    distributions,
    prefill,
)
from hetero_sglang.simulation import Profile as SimulatedProfile

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = (
    CalibrationText("words.txt", "the cat sat on the mat and the dog ran to the barn. " * 30),
    CalibrationText("digits.txt", "0123456789 " * 140),
)
JUDGE = CalibrationText("judge.txt", "she sells sea shells by the sea shore, " * 40)
# The default preset drops nothing of prompts under 1,024 tokens.
LENGTH = 1100
# Of 1,100 positions two random sets of 400 share 36 %; so do this model's heads, about.
CALIBRATION = Calibration(prompt_lengths=(LENGTH,), num_decode_steps=3, top_k=400)
GRID = Sweep(stable=(0.3, 0.5), similarity=(0.33, 0.4), top_k=(400,), ratios=(0.7, 0.9), num_fed=8)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> WatchedModel:
    return WatchedModel(tiny_model, dtype="float32")


def by_hand(
    model: WatchedModel, text: CalibrationText, profile: Any, ratio: float
) -> tuple[float, float]:
    """KL and top-1 agreement of one profile on one text, step by step."""
    ids = model.tokenize(text.text)[: LENGTH + GRID.num_fed].tolist()
    prompt = prefill(model.model, ids[:LENGTH])
    uniform = SimulatedProfile.uniform(3, 4)
    full = distributions(Simulation(model.model, uniform, Method(1.0)), prompt, ids[LENGTH:])
    method = Method(ratio, item_bits=16)
    ours = distributions(
        Simulation(model.model, SimulatedProfile.of(profile), method), prompt, ids[LENGTH:]
    )
    kls = [
        sum(p.exp().item() * (p - q).item() for p, q in zip(full[step], ours[step], strict=True))
        for step in range(1, GRID.num_fed)
    ]
    same = [bool(full[s].argmax() == ours[s].argmax()) for s in range(1, GRID.num_fed)]
    return sum(kls) / len(kls), sum(same) / len(same)


def test_each_text_judges_the_profiles_made_of_the_others(model: WatchedModel) -> None:
    points = sweep_profiles(model, TEXTS, CALIBRATION, GRID)

    assert [(p.stable, p.similarity, p.ratio) for p in points] == [
        (stable, similarity, ratio)
        for stable in GRID.stable
        for similarity in GRID.similarity
        for ratio in GRID.ratios
    ]
    run = observe(model, calibration_prompts(model, TEXTS, (LENGTH,)), CALIBRATION)
    words, digits = run.prompts
    for point in points[:2]:
        thresholds = Thresholds(stable=point.stable, similarity=point.similarity)
        together = run.profile(thresholds=thresholds)
        assert point.pivot == together.counts[HeadRole.PIVOT]
        assert point.volatile == together.counts[HeadRole.VOLATILE]
        expected = [
            by_hand(model, text, run.profile(prompts=[other], thresholds=thresholds), point.ratio)
            for text, other in ((TEXTS[0], digits), (TEXTS[1], words))
        ]
        assert point.kl == pytest.approx(sum(kl for kl, _ in expected) / 2, rel=1e-3, abs=1e-7)
        assert point.top1 == pytest.approx(sum(same for _, same in expected) / 2)


def test_texts_to_judge_by_are_never_calibrated_on(model: WatchedModel) -> None:
    one = Sweep(stable=(0.3,), similarity=(0.4,), top_k=(400,), ratios=(0.9,), num_fed=8)

    (point,) = sweep_profiles(model, TEXTS, CALIBRATION, one, judges=[JUDGE])

    run = observe(model, calibration_prompts(model, TEXTS, (LENGTH,)), CALIBRATION)
    profile = run.profile(thresholds=Thresholds(stable=0.3, similarity=0.4))
    assert (point.kl, point.top1) == pytest.approx(by_hand(model, JUDGE, profile, 0.9), rel=1e-3)


def test_a_ratio_under_the_floor_is_recorded_as_not_measured(model: WatchedModel) -> None:
    # Nobody is stable or alike: all heads are volatile, the floor is 1.
    nobody = Sweep(stable=(1.0,), similarity=(1.0,), top_k=(400,), ratios=(0.5,), num_fed=4)

    (point,) = sweep_profiles(model, TEXTS, CALIBRATION, nobody, judges=[JUDGE])

    assert point.volatile == 12
    assert point.floor == 1.0
    assert (point.kl, point.top1) == (None, None)
    row = next(csv.DictReader(io.StringIO(to_csv([point]))))
    assert (row["floor"], row["kl"], row["volatile"]) == ("1", "", "12")


def test_a_text_cannot_judge_a_profile_made_of_itself(model: WatchedModel) -> None:
    with pytest.raises(ConfigError, match=r"one calibration text \(words.txt\) cannot judge"):
        sweep_profiles(model, TEXTS[:1], CALIBRATION, GRID)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stable": (1.5,)}, r"stable must be in \[0, 1\], got 1.5"),
        ({"similarity": ()}, "at least one value of similarity"),
        ({"ratios": (0.0,)}, "ratios must be above 0 and at most 1, got 0"),
        ({"num_fed": 1}, "num_fed must be at least 2, got 1"),
    ],
)
def test_a_grid_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sweep(**changes)


def test_the_command_writes_table_and_figure(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / text.name for text in TEXTS]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text.text)
    words = [
        *("profile", "sweep", "--model", str(tiny_model), "--tokens", str(LENGTH), "--steps", "3"),
        *("--top-k", "400", "--stable", "0.3", "--similarity", "0.33,0.4", "--ratios", "0.9"),
        *("--fed", "8", "--csv", str(tmp_path / "s.csv"), "--svg", str(tmp_path / "s.svg")),
        *(word for path in paths for word in ("--text", str(path))),
    ]

    assert cli.main(words) == 0

    rows = list(csv.DictReader(io.StringIO((tmp_path / "s.csv").read_text())))
    assert [(row["stable"], row["similarity"]) for row in rows] == [("0.3", "0.33"), ("0.3", "0.4")]
    assert all(float(row["kl"]) > 0 for row in rows)
    assert (tmp_path / "s.svg").read_text().startswith("<svg")
    assert f"{float(rows[0]['kl']):.5f}" in capsys.readouterr().out
    assert cli.main([*words, "--dtype", "bfloat16"]) == 1
    assert "--dtype must be float32 for a sweep" in capsys.readouterr().err
