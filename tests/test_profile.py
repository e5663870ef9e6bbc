"""The profile: its format, its refusals, and the store that keeps it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_core import host
from maestro_core.host import Elsewhere, Host
from maestro_core.profile import Latency, Profile, ProfileError, ProfileKey
from maestro_core.profile_store import ProfileStore, StoreError

KEY = ProfileKey(
    artifact="ab" * 32,
    host=Host("EPYC", ("avx2", "avx512f"), cores=2, memory_gib=23, accelerator=None),
    provider="cpu",
    intra_op_threads=1,
    compute_threads=1,
    workers=1,
    runtime=(("onnxruntime", "1.32.0"),),
)


def latency(point: int, batch: int, p50_ms: float) -> Latency:
    return Latency(
        point,
        batch,
        p50_ms,
        p90_ms=p50_ms * 1.1,
        p95_ms=p50_ms * 1.2,
        p99_ms=p50_ms * 1.5,
        n=100,
        p50_low_ms=p50_ms * 0.99,
        p50_high_ms=p50_ms * 1.01,
    )


PROFILE = Profile(
    key=KEY,
    measured_at="2026-01-02T03:04:05+00:00",
    kind="quick",
    stopped_on="precision",
    overhead_ms=0.25,
    latencies=tuple(
        latency(point, batch, p50_ms=(point + 1) * (1 + batch / 4))
        for point in range(3)
        for batch in (1, 4, 8)
    ),
    dominated=(1,),
)


def edited(**fields: object) -> str:
    return json.dumps({**json.loads(PROFILE.to_json()), **fields})


def test_a_profile_reads_back_equal() -> None:
    assert Profile.from_json(PROFILE.to_json()) == PROFILE


def test_this_host_reads_back_equal_and_has_cores() -> None:
    here = Host.here()
    key = replace(KEY, host=here)

    assert here.cores >= 1
    assert here.cpu
    assert Profile.from_json(replace(PROFILE, key=key).to_json()).key.host == here


@pytest.mark.parametrize(
    ("line", "computes"),
    [
        ("flags : fpu avx512_bf16 sse", True),
        ("Features : fp asimd bf16", True),
        ("flags : fpu avx2 fma", False),
        ("", False),
    ],
)
def test_a_host_says_whether_it_computes_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, line: str, computes: bool
) -> None:
    monkeypatch.setattr(host, "_text", lambda _: line)

    assert host.computes_bfloat16.__wrapped__() is computes


def test_others_use_a_share_of_the_host() -> None:
    elsewhere = Elsewhere()

    sum(i * i for i in range(300_000))  # what this process computes is not others' work

    assert 0 <= elsewhere.share() <= 1


def test_quantile_between_profiled_batches_is_linear() -> None:
    assert PROFILE.quantile_ms(0, 4, 50) == 2.0
    assert PROFILE.quantile_ms(0, 6, 50) == 2.5
    assert PROFILE.median_interval_ms(0, 6) == pytest.approx((2.5 * 0.99, 2.5 * 1.01))
    assert PROFILE.quantile_ms(2, 1, 95) == pytest.approx(3.75 * 1.2)


@given(st.integers(1, 8), st.integers(0, 2))
def test_quantiles_are_ordered_at_every_batch(batch: int, point: int) -> None:
    quantiles = [PROFILE.quantile_ms(point, batch, q) for q in (50, 90, 95, 99)]

    assert quantiles == sorted(quantiles)


@pytest.mark.parametrize("batch", [0, 9])
def test_a_batch_outside_the_profiled_sizes_is_refused(batch: int) -> None:
    with pytest.raises(ProfileError, match=rf"batch {batch} is not profiled; sizes are 1\.\.8"):
        PROFILE.quantile_ms(0, batch, 50)


def test_a_dominated_point_does_not_slow_those_after_it() -> None:
    slow = tuple(
        latency(x.point, x.batch, 9.0 + x.batch) if x.point == 1 else x for x in PROFILE.latencies
    )

    table = replace(PROFILE, latencies=slow).table(50)

    assert table == ((1.25, 2.0, 3.0), (3.75, 6.0, 9.0), (3.75, 6.0, 9.0))


def test_a_point_that_is_not_there_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"point 3 is not profiled; points are 0\.\.2"):
        PROFILE.quantile_ms(3, 1, 50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "format: 'list' is not 1"),
        (edited(format=2), "format: 2 is not 1"),
        ('{"format": 1}', "'key' is missing"),
        (edited(kind="best"), "kind: 'best' is not one of quick, full"),
        (edited(overhead_ms="slow"), "overhead_ms: 'slow' is not of type float"),
        (edited(overhead_ms=-1.0), "overhead_ms: -1.0"),
        (edited(cores_used_by_others=1.5), "cores_used_by_others: 1.5 is not a share"),
        (edited(latencies=[]), "latencies"),
        (edited(latencies=7), "wrong type"),
        (edited(dominated=[9]), "dominated"),
        (edited(dominated=["one"]), "wrong type"),
        (PROFILE.to_json()[:200], "not JSON"),
        (PROFILE.to_json().replace("1.25", "-1.25", 1), "quantiles must be"),
        (PROFILE.to_json().replace("1.25", "NaN", 1), "quantiles must be"),
    ],
)
def test_a_damaged_profile_is_refused_by_field(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        Profile.from_json(text)


def test_an_incomplete_grid_is_refused() -> None:
    with pytest.raises(ProfileError, match="latencies"):
        replace(PROFILE, latencies=PROFILE.latencies[:-1])


def test_store_finds_what_was_saved(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)

    assert store.find(KEY) == (None, None)
    store.save(PROFILE)
    assert store.find(KEY) == (PROFILE, None)
    assert [p.name for p in store.path(KEY).parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, artifact="cd" * 32),
        replace(KEY, host=replace(KEY.host, cpu="Xeon")),
        replace(KEY, provider="cuda"),
        replace(KEY, intra_op_threads=2),
        replace(KEY, compute_threads=2),
        replace(KEY, workers=4),
        replace(KEY, runtime=(("onnxruntime", "1.33.0"),)),
    ],
)
def test_store_does_not_find_a_profile_of_another_key(tmp_path: Path, other: ProfileKey) -> None:
    store = ProfileStore(tmp_path)
    store.save(PROFILE)

    assert store.find(other).profile is None


@pytest.mark.parametrize("damage", ["{", PROFILE.to_json()[:-40], "\xff"])
def test_a_corrupt_file_is_reported_set_aside_and_replaced(tmp_path: Path, damage: str) -> None:
    store = ProfileStore(tmp_path)
    path = store.save(PROFILE)
    path.write_text(damage, encoding="latin-1")

    profile, reason = store.find(KEY)

    assert profile is None
    assert reason is not None
    assert "profile.json" in reason
    assert "set aside" in reason
    assert path.with_name("profile.json.unusable").read_text(encoding="latin-1") == damage
    store.save(PROFILE)
    assert store.find(KEY).profile == PROFILE


def test_a_foreign_file_is_set_aside_and_says_what_differs(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    foreign = replace(PROFILE, key=replace(KEY, host=replace(KEY.host, cores=64)))
    store.save(PROFILE).write_text(foreign.to_json())

    profile, reason = store.find(KEY)

    assert profile is None
    assert reason is not None
    assert "made for another host" in reason


def test_a_profile_of_fewer_points_is_set_aside(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    store.save(PROFILE)
    points = len(PROFILE.points)

    assert store.find(KEY, points).profile == PROFILE
    profile, reason = store.find(KEY, points + 1)

    assert profile is None
    assert reason is not None
    assert f"of {points} points, where there are {points + 1}; set aside" in reason


def test_a_state_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    blocked = tmp_path / "state"
    blocked.write_text("a file where the directory should be")

    with pytest.raises(StoreError, match="profile not stored"):
        ProfileStore(blocked).save(PROFILE)
