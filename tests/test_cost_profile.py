"""What an image may cost instead of a patch size, by what this machine measured once."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.search import cost_profile
from retrieval.search.config import Budget
from retrieval.search.cost_profile import CostProfile

MS = {48: 1.0, 24: 4.0, 16: 9.0, 8: 40.0}


@pytest.fixture
def profile(tiny_model: LitModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CostProfile:
    monkeypatch.setattr(cost_profile, "measure_ms", lambda model, sizes: {s: MS[s] for s in sizes})
    return CostProfile(tiny_model, tmp_path / "profiles")


@pytest.mark.parametrize(
    ("max_ms", "expected"), [(1.0, 48), (3.9, 48), (4.0, 24), (39.0, 16), (1e9, 8)]
)
def test_the_finest_grid_that_fits_the_time_is_taken(profile, max_ms, expected) -> None:
    assert profile.choose(Budget(max_ms=max_ms), tuple(MS)) == expected


def test_the_finest_grid_that_fits_the_operations_is_taken(profile: CostProfile) -> None:
    for size in MS:
        exactly = profile.gflops(size)
        assert profile.choose(Budget(max_gflops=exactly), tuple(MS)) == size
    both = Budget(max_gflops=profile.gflops(16), max_ms=5.0)
    assert profile.choose(both, tuple(MS)) == 24
    assert profile.choose(None, tuple(MS)) == 8
    assert profile.choose(30, tuple(MS)) == 30


def test_a_budget_that_pays_for_nothing_names_the_least_cost(profile: CostProfile) -> None:
    with pytest.raises(UsageError, match=r"max_ms 0\.5 is too little: patch size 48 costs .* 1 ms"):
        profile.choose(Budget(max_ms=0.5), tuple(MS))
    with pytest.raises(UsageError, match=r"max_gflops 1e-06 is too little"):
        profile.choose(Budget(max_gflops=1e-6), tuple(MS))
    for wrong in ({"max_ms": 0.0}, {"max_ms": float("nan")}, {"max_gflops": -1.0}):
        with pytest.raises(UsageError, match="above 0"):
            Budget(**wrong)
    with pytest.raises(UsageError, match="needs max_gflops or max_ms"):
        Budget()


def test_a_machine_is_measured_once(
    tiny_model: LitModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    measure = cost_profile.measure_ms
    monkeypatch.setattr(
        cost_profile,
        "measure_ms",
        lambda model, sizes: measured.append(sizes) or measure(model, sizes),
    )
    first = CostProfile(tiny_model, tmp_path).ms((48, 24))
    assert first.keys() == {48, 24}
    assert all(ms > 0 for ms in first.values())
    again = CostProfile(tiny_model, tmp_path).ms((48, 24, 16))
    assert again[48] == pytest.approx(first[48], abs=1e-3)
    assert measured == [[48, 24], [16]]
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["format"] == 1
    file.write_text("{")
    CostProfile(tiny_model, tmp_path).ms((48,))
    assert measured[-1] == [48]


def test_load_during_most_of_a_measurement_changes_nothing(
    tiny_model: LitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of the test's own: 2 ms a forward, 50 more in seven rounds of ten."""
    encode, calls, now = tiny_model.encode_image, itertools.count(), [0.0]

    def under_load(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
        now[0] += 0.052 if next(calls) % 20 < 14 else 0.002
        return encode(pixels, patch_size=patch_size)

    monkeypatch.setattr(tiny_model, "encode_image", under_load)
    monkeypatch.setattr(cost_profile.time, "perf_counter", lambda: now[0])
    assert cost_profile.measure_ms(tiny_model, (48, 24)) == pytest.approx({48: 2.0, 24: 2.0})


def test_a_profile_that_cannot_be_kept_is_still_measured(tiny_model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert CostProfile(tiny_model, tmp_path / "file" / "profiles").ms((48,))[48] > 0


def test_classifying_within_a_budget(tiny_model: LitModel) -> None:
    images = torch.randn(2, 3, tiny_model.image_size, tiny_model.image_size)
    classifier = ZeroShotClassifier(tiny_model, ["cat", "dog"])
    budget = Budget(max_gflops=classifier.profile.gflops(24))
    found, expected = classifier.predict(images, budget), classifier.predict(images, 24)
    assert (found[1] == expected[1]).all()
