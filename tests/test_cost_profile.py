"""What an image may cost instead of a patch size, by what a quiet machine measured."""

import datetime
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval import machine_load, tower_speed
from retrieval.evaluation.classify import ZeroShotClassifier
from retrieval.evaluation.costs import measure_costs
from retrieval.search import cost_profile
from retrieval.search.config import Budget
from retrieval.search.cost_profile import CostProfile

MS = {48: 1.0, 24: 4.0, 16: 9.0, 8: 40.0}


Spells = Callable[..., list[list[int]]]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the machine runs while tests do."""
    monkeypatch.setattr(machine_load, "_seconds", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(machine_load, "_warned", set())


@pytest.fixture
def spells(monkeypatch: pytest.MonkeyPatch) -> Spells:
    """`spells(first, second, ...)`: what spells of rounds measure, the last ever after, as factors
    of `MS`, one or one per patch size; returns the list of what is measured."""

    def script(*factors: float | dict[int, float]) -> list[list[int]]:
        measured: list[list[int]] = []

        def measure(model: LitModel, sizes: list[int]) -> dict[int, float]:
            factor = factors[min(len(measured), len(factors) - 1)]
            measured.append(list(sizes))
            by_size = factor if isinstance(factor, dict) else dict.fromkeys(sizes, factor)
            return {s: MS[s] * by_size.get(s, 1.0) for s in sizes}

        monkeypatch.setattr(cost_profile, "measure_ms", measure)
        return measured

    return script


@pytest.fixture
def profile(tiny_model: LitModel, tmp_path: Path, spells: Spells) -> CostProfile:
    spells(1.0)
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
    with pytest.raises(
        UsageError, match=r"max_ms 0\.5 is too little: patch size 48 costs .* 1 ms"
    ) as refused:
        profile.choose(Budget(max_ms=0.5), tuple(MS))
    assert f"delete {profile.file} to measure anew" in str(refused.value)
    with pytest.raises(UsageError, match=r"max_gflops 1e-06 is too little"):
        profile.choose(Budget(max_gflops=1e-6), tuple(MS))
    for wrong in ({"max_ms": 0.0}, {"max_ms": float("nan")}, {"max_gflops": -1.0}):
        with pytest.raises(UsageError, match="above 0"):
            Budget(**wrong)
    with pytest.raises(UsageError, match="needs max_gflops or max_ms"):
        Budget()


def test_a_machine_is_measured_once(tiny_model: LitModel, tmp_path: Path, spells: Spells) -> None:
    measured = spells(1.0)
    assert CostProfile(tiny_model, tmp_path).ms((48, 24)) == {48: 1.0, 24: 4.0}
    assert measured == [[48, 24]] * 2
    assert CostProfile(tiny_model, tmp_path).ms((24,)) == {24: 4.0}
    assert len(measured) == 2
    CostProfile(tiny_model, tmp_path).ms((16,))  # with those known, so that times can be compared
    assert measured[2:] == [[48, 24, 16]] * 2
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["format"] == 1
    file.write_text("{")
    CostProfile(tiny_model, tmp_path).ms((48,))
    assert measured[4:] == [[48]] * 2


@pytest.mark.parametrize("disturbed", [30.0, {24: 30.0}], ids=["whole", "one size"])
def test_a_disturbed_spell_is_measured_again(
    tiny_model: LitModel, tmp_path: Path, spells: Spells, disturbed: float | dict[int, float]
) -> None:
    measured = spells(disturbed, 1.0)
    assert CostProfile(tiny_model, tmp_path).ms(tuple(MS)) == MS
    assert len(measured) == 3  # until two agree
    assert CostProfile(tiny_model, tmp_path).ms(tuple(MS)) == MS
    assert len(measured) == 3


def test_times_that_contradict_the_operations_are_kept_for_an_hour(
    tiny_model: LitModel, tmp_path: Path, spells: Spells
) -> None:
    measured = spells({24: 30.0})  # 120 ms, where patch 8 takes 40
    assert CostProfile(tiny_model, tmp_path).ms((24, 8)) == {24: 120.0, 8: 40.0}
    assert len(measured) == cost_profile.SPELLS
    profile = CostProfile(tiny_model, tmp_path)
    with pytest.raises(UsageError, match=r"measured .* beside other programs, delete .* anew"):
        profile.choose(Budget(max_ms=1.0), (24, 8))
    assert len(measured) == cost_profile.SPELLS
    set_age(profile.file, datetime.timedelta(hours=1))
    CostProfile(tiny_model, tmp_path).ms((24, 8))
    assert len(measured) == 2 * cost_profile.SPELLS


def test_a_loaded_machine_is_named_once_and_its_times_are_kept_for_an_hour(
    tiny_model: LitModel, tmp_path: Path, spells: Spells, monkeypatch, capsys
) -> None:
    seconds = itertools.count(0.0, 4.0)  # of two processors, half the time others'
    monkeypatch.setattr(machine_load, "_seconds", lambda: ((s := next(seconds)), s / 2, 0.0))
    spells(30.0)
    profile = CostProfile(tiny_model, tmp_path)
    profile.ms((48,))
    assert json.loads(profile.file.read_text())["spell"] == "disturbed"
    measure_costs(tiny_model, (48,), batch_size=1, repeats=1, spell_s=0.0)
    said = capsys.readouterr().err
    assert said.count("other programs took 50% of this machine's processors") == 1
    machine_load._warned.clear()
    measure_costs(tiny_model, (48,), batch_size=1, repeats=1, spell_s=0.0)
    assert "images/s may be worse" in capsys.readouterr().err


def test_what_this_process_does_is_no_load_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([(10.0, 5.0, 1.0), (14.0, 9.0, 4.8)])
    monkeypatch.setattr(machine_load, "_seconds", lambda: next(looks))
    assert machine_load.OthersLoad().share() == pytest.approx(0.05)


@pytest.mark.parametrize(("others_gib", "told"), [(0.0, 0), (0.4, 0), (6.0, 1)])
def test_programs_on_the_same_gpu_are_named_once(others_gib, told, monkeypatch, capsys) -> None:
    """Neither what torch keeps counts, nor half a GiB of CUDA's own."""
    own, context, total = 80 * 2**30, 2**29, 140 * 2**30
    free = total - own - context - int(others_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: own)
    for _ in range(2):
        shared = machine_load.warn_if_shared(torch.device("cuda", 0), "images/s")
        assert shared == bool(told)
    assert not machine_load.warn_if_shared(torch.device("cpu"), "images/s")
    said = capsys.readouterr().err
    assert said.count("other programs hold up to 6.5 GiB of this GPU's memory: images/s") == told


def set_age(file: Path, age: datetime.timedelta | None) -> None:
    """Let a kept measurement be so old; None: without a date, as 0.1.0 wrote them."""
    kept = json.loads(file.read_text())
    del kept["measured"]
    if age is not None:
        kept["measured"] = (datetime.datetime.now() - age).isoformat()
    file.write_text(json.dumps(kept))


@pytest.mark.parametrize("days", [None, 30, -1], ids=str)
def test_a_measurement_expires(
    tiny_model: LitModel, tmp_path: Path, spells: Spells, days: int | None
) -> None:
    """One of tomorrow is of a clock that was wrong."""
    measured = spells(30.0, 30.0, 1.0)
    first = CostProfile(tiny_model, tmp_path)
    assert first.ms((48,)) == {48: 30.0}
    set_age(first.file, datetime.timedelta(days=29))
    assert CostProfile(tiny_model, tmp_path).ms((48,)) == {48: 30.0}
    set_age(first.file, None if days is None else datetime.timedelta(days=days))
    assert CostProfile(tiny_model, tmp_path).ms((48,)) == {48: 1.0}
    assert len(measured) == 4


def test_load_during_most_of_a_measurement_changes_nothing(
    tiny_model: LitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of the test's own: 2 ms a forward, 50 more in four rounds of five."""
    encode, calls, now = tiny_model.encode_image, itertools.count(), [0.0]

    def under_load(pixels: torch.Tensor, patch_size: int | None = None) -> torch.Tensor:
        now[0] += 0.052 if next(calls) % 10 < 8 else 0.002
        return encode(pixels, patch_size=patch_size)

    monkeypatch.setattr(tiny_model, "encode_image", under_load)
    monkeypatch.setattr(tower_speed.time, "perf_counter", lambda: now[0])
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
