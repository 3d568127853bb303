"""Scenarios: the shipped paper world, the text form, levels, and what a wrong file is told."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path

import pydantic
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from emutune.errors import EmutuneError, ScenarioError
from emutune.scenario import Scenario, dump_scenario, load_scenario, parse_scenario, shipped_scenarios
from emutune.scenario.sections import Curve

PAPER_TEXT = dump_scenario(load_scenario("paper"))


def refusal(*overrides: str, text: str = PAPER_TEXT) -> str:
    """The message with which a scenario is refused: one line that starts with where it came from."""
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(text, overrides=overrides, source="mine.toml")
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# --- shipped scenarios --------------------------------------------------------------------------------------


def test_paper_scenario_holds_the_numbers_of_the_paper(paper: Scenario) -> None:
    tree = paper.model_dump(exclude={"name", "description"}, exclude_none=True)
    assert tree == {
        "fleet": {
            "ues": 6,
            "tasks": 50,
            "transmit_power_w": {"min": 0.2, "max": 1.0},
            "distance_m": {"min": 50.0, "max": 500.0},
        },
        "tasks": {"data_mb": {"min": 300.0, "max": 500.0}, "complexity": {"min": 1.0, "max": 10.0}},
        "model": {"size_gb": 10.8, "layers": 32, "shared_gb": 0.0},
        "retention": {"min": 0.2, "max": 0.8, "hold_tolerance": 0.0},
        "radio": {
            "uplink_bandwidth_hz": 1e5,
            "downlink_bandwidth_hz": 1e6,
            "downlink_power_w": 60.0,
            "noise_dbm_per_hz": -174.0,
            "path_loss_exponent": 2.0,
            "fading_blocks": 100,
            "rate": "shannon",
            "sharing": "equal",
        },
        "quality": {
            "curve": {"quadratic": 25.2, "linear": -43.1, "constant": 31.9, "knots": ()},
            "complexity_weight": 10.0,
            "complexity_factor": "rising",
        },
        "reward": {"perplexity_weight": -0.092, "delay_weight_per_min": -0.015},
    }
    assert paper.level_bounds == (7, 25)


@pytest.mark.parametrize("name", shipped_scenarios())
def test_every_shipped_scenario_loads_under_its_own_name(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.description
    assert parse_scenario(dump_scenario(scenario)) == scenario


def test_a_scenario_cannot_be_changed_after_validation(paper: Scenario) -> None:
    with pytest.raises(pydantic.ValidationError):
        paper.fleet.ues = 9  # type: ignore[misc]


# --- text form ----------------------------------------------------------------------------------------------


positive = st.floats(min_value=0, max_value=1e15, exclude_min=True)
non_negative = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
weights = st.floats(max_value=0, allow_nan=False, allow_infinity=False)
counts = st.integers(1, 10**5)
ranges = st.tuples(positive, positive).map(sorted).map(lambda ends: {"min": ends[0], "max": ends[1]})


@st.composite
def retentions_and_layers(draw: st.DrawFn) -> tuple[dict[str, float], int]:
    """Bounds around at least one level of some number of layers."""
    layers = draw(st.integers(1, 200))
    levels = sorted((draw(st.integers(1, layers)), draw(st.integers(1, layers))))
    hold = draw(st.floats(0, 1, exclude_max=True))
    return {"min": levels[0] / layers, "max": levels[1] / layers, "hold_tolerance": hold}, layers


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Any valid scenario, extreme numbers and any text included."""
    retention, layers = draw(retentions_and_layers())
    curve = {"quadratic": draw(non_negative), "linear": draw(non_negative), "constant": draw(positive)}
    return Scenario.model_validate(
        {
            "name": draw(st.text(min_size=1)),
            "description": draw(st.text()),
            "fleet": {
                "ues": draw(counts),
                "tasks": draw(counts),
                "transmit_power_w": draw(ranges),
                "distance_m": draw(ranges),
            },
            "tasks": {"data_mb": draw(ranges), "complexity": draw(ranges)},
            "model": {"size_gb": draw(positive), "layers": layers},
            "retention": retention,
            "radio": {
                "uplink_bandwidth_hz": draw(positive),
                "downlink_bandwidth_hz": draw(positive),
                "downlink_power_w": draw(positive),
                "noise_dbm_per_hz": draw(st.floats(-250, 0)),
                "path_loss_exponent": draw(st.floats(0, 10, exclude_min=True)),
                "fading_blocks": draw(st.integers(2, 10**6)),
            },
            "quality": {
                "curve": curve,
                "complexity_weight": draw(positive),
                "complexity_factor": draw(st.sampled_from(["rising", "as_printed"])),
            },
            "reward": {"perplexity_weight": draw(weights), "delay_weight_per_min": draw(weights)},
        }
    )


@given(scenarios())
def test_dumped_scenarios_parse_to_equal_scenarios(scenario: Scenario) -> None:
    assert parse_scenario(dump_scenario(scenario)) == scenario


@pytest.mark.parametrize(
    "name", ['"', "\\", "\n\r\t\b\f", "\x00\x1f\x7f", "é", "\u2028", "😀", "'''", "[fleet]", "# x"]
)
def test_awkward_text_survives_the_text_form(name: str) -> None:
    scenario = load_scenario("paper").model_copy(update={"name": name, "description": name})
    assert parse_scenario(dump_scenario(scenario)) == scenario


def test_a_scenario_file_is_read_by_its_path(paper: Scenario, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(dump_scenario(paper), encoding="utf-8")
    assert load_scenario(path) == load_scenario(str(path)) == paper


# --- overrides ----------------------------------------------------------------------------------------------


def test_overrides_are_applied_before_validation() -> None:
    scenario = load_scenario(
        "paper",
        # Each bound alone would lie on the wrong side of the other.
        ["retention.min=0.9", "retention.max = 1.0", "fleet.ues=9", "tasks.data_mb={min=1, max=2}"],
    )
    assert (scenario.retention.min, scenario.retention.max) == (0.9, 1.0)
    assert scenario.fleet.ues == 9
    assert (scenario.tasks.data_mb.min, scenario.tasks.data_mb.max) == (1.0, 2.0)


def test_text_in_an_override_needs_no_quotes() -> None:
    scenario = load_scenario("paper", ["name=my world", "quality.complexity_factor=as_printed"])
    assert scenario.name == "my world"
    assert scenario.quality.complexity_factor == "as_printed"


def test_the_last_override_of_a_field_wins() -> None:
    assert load_scenario("paper", ["fleet.ues=3", "fleet.ues=4"]).fleet.ues == 4


@pytest.mark.parametrize(
    "override", ["fleet", "fleet.ues", "=3", "fleet.=3", ".ues=3", "fleet..ues=3", "", "="]
)
def test_malformed_override_is_refused_with_an_example(override: str) -> None:
    message = refusal(override)
    assert repr(override) in message
    assert "write it as section.field=value, e.g. fleet.ues=9" in message


def test_override_below_a_single_value_is_refused() -> None:
    message = refusal("fleet.ues.most=3")
    assert "fleet.ues.most=3" in message
    assert "ues is a single value" in message


# --- refusals: the field and the remedy ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "field", "remedy"),
    [
        # Unknown fields, near misses first.
        ("radio.uplink_bandwith_hz=1e5", "radio.uplink_bandwith_hz", "did you mean uplink_bandwidth_hz?"),
        ("fleet.user=3", "fleet.user", "did you mean ues?"),
        ("radoi.x=1", "radoi", "did you mean radio?"),
        ("tasks.data_mb.maximum=1", "tasks.data_mb.maximum", "did you mean max?"),
        ("quality.curve.cubic=1", "quality.curve.cubic", "the fields here are quadratic, linear, constant"),
        # Units belong to the name of a field, numbers stand bare.
        ("radio.uplink_bandwidth_hz=100 kHz", "radio.uplink_bandwidth_hz", "a number in Hz, got '100 kHz'"),
        ('radio.uplink_bandwidth_hz="1e5"', "radio.uplink_bandwidth_hz", "a number in Hz, got '1e5'"),
        ("radio.noise_dbm_per_hz=-174 dBm", "radio.noise_dbm_per_hz", "a number in dBm/Hz, got '-174 dBm'"),
        ("model.size_gb=10.8 GB", "model.size_gb", "a number in GB (1e9 bytes), got '10.8 GB'"),
        ("tasks.data_mb.min=300MB", "tasks.data_mb.min", "a number in MB (1e6 bytes), got '300MB'"),
        ("fleet.transmit_power_w.max=1W", "fleet.transmit_power_w.max", "a number in W, got '1W'"),
        ("fleet.distance_m.max=1km", "fleet.distance_m.max", "a number in m, got '1km'"),
        ("reward.delay_weight_per_min=x", "reward.delay_weight_per_min", "a number per minute, got 'x'"),
        ('fleet.ues="6"', "fleet.ues", "a whole number, got '6'"),
        ("fleet.ues=true", "fleet.ues", "a whole number, got True"),
        ("radio.downlink_power_w=true", "radio.downlink_power_w", "a number in W, got True"),
        # Numbers out of bounds.
        ("radio.uplink_bandwidth_hz=-1", "radio.uplink_bandwidth_hz", "must be positive, got -1"),
        ("radio.uplink_bandwidth_hz=0", "radio.uplink_bandwidth_hz", "must be positive, got 0"),
        ("radio.downlink_bandwidth_hz=-1", "radio.downlink_bandwidth_hz", "must be positive, got -1"),
        ("fleet.distance_m.min=0", "fleet.distance_m.min", "must be positive, got 0"),
        ("retention.min=0", "retention.min", "must be positive, got 0"),
        ("retention.min=-0.1", "retention.min", "must be positive, got -0.1"),
        ("retention.max=1.2", "retention.max", "must be at most 1, got 1.2"),
        ("retention.hold_tolerance=1", "retention.hold_tolerance", "must be below 1, got 1"),
        ("retention.hold_tolerance=-0.1", "retention.hold_tolerance", "must be at least 0, got -0.1"),
        ("radio.path_loss_exponent=11", "radio.path_loss_exponent", "must be at most 10, got 11"),
        ("radio.noise_dbm_per_hz=174", "radio.noise_dbm_per_hz", "must be at most 0, got 174"),
        ("radio.fading_blocks=1", "radio.fading_blocks", "must be at least 2, got 1"),
        ("model.layers=0", "model.layers", "must be at least 1, got 0"),
        ("fleet.ues=0", "fleet.ues", "must be at least 1, got 0"),
        ("fleet.tasks=0", "fleet.tasks", "must be at least 1, got 0"),
        ("fleet.ues=6.5", "fleet.ues", "must be a whole number, got 6.5"),
        ("reward.perplexity_weight=0.1", "reward.perplexity_weight", "must be at most 0, got 0.1"),
        ("reward.delay_weight_per_min=0.1", "reward.delay_weight_per_min", "must be at most 0, got 0.1"),
        # Reversed bounds.
        ("retention.min=0.9", "retention", "min is above max (0.9 > 0.8); swap them"),
        ("tasks.data_mb={min=500, max=300}", "tasks.data_mb", "min is above max (500 > 300); swap them"),
        # What only several fields together show.
        ("retention={min=0.3, max=0.305}", "retention", "widen the bounds or raise model.layers"),
        ("quality.curve.constant=10", "quality.curve", "must stay positive from retention.min to 1"),
        ("quality.complexity_factor=falling", "quality.complexity_factor", "'rising' or 'as_printed'"),
        # A channel that is described twice, or not at all.
        (
            "radio.path_loss.model=umi",
            "radio.path_loss",
            "there is a path_loss_exponent too; drop one of them",
        ),
        ("radio.path_loss.model=rma", "radio.path_loss.model", "must be 'umi' or 'uma', got 'rma'"),
        (
            "radio.path_loss={model='uma', ue_height_m=13}",
            "radio.path_loss.ue_height_m",
            "must be below 13, got 13",
        ),
        ("radio.rate=mean", "radio.rate", "must be 'shannon' or 'ergodic', got 'mean'"),
        ("radio.fading.interval_s=1", "radio.fading.speed_mps", "missing where UEs do not move; add it"),
        ("radio.fading.speed_mps=1", "radio.fading.interval_s", "missing where UEs do not move; add it"),
        (
            "radio.fading={speed_mps=1, interval_s=1}",
            "radio.carrier_ghz",
            "path_loss and fading need it, e.g. 3.5",
        ),
        ("radio.carrier_ghz=3.5 GHz", "radio.carrier_ghz", "a number in GHz, got '3.5 GHz'"),
        ("mobility={speed_mps={min=2, max=1}, interval_s=9}", "mobility.speed_mps", "min is above max"),
        (
            "mobility={speed_mps={min=0, max=1}, interval_s=9}",
            "mobility.speed_mps.min",
            "must be positive, got 0",
        ),
        (
            "trace={interval_s=9, downlink_mbps=[1, 2], uplink_mbps=[1, 2, 3]}",
            "trace",
            "2 downlink rates but 3 up",
        ),
        (
            "trace={interval_s=9, downlink_mbps=[1, 0], uplink_mbps=[1, 2]}",
            "trace.downlink_mbps.1",
            "must be positive",
        ),
        (
            "trace={interval_s=9, downlink_mbps=[1, 2], uplink_mbps=[1, 2]}",
            "trace",
            "50 tasks need 51; take a longer",
        ),
        # Wholly different things.
        ("fleet=3", "fleet", "must be a table of fields, got 3"),
        ("tasks.data_mb=400", "tasks.data_mb", "must be a table of fields, got 400"),
        ("name=", "name", "at least 1 character"),
        ("name=3", "name", "a valid string"),
    ],
)
def test_wrong_value_is_refused_by_field_and_remedy(override: str, field: str, remedy: str) -> None:
    message = refusal(override)
    assert message.startswith(f"mine.toml: {field}: ")
    assert remedy in message


UMI = PAPER_TEXT.replace("path_loss_exponent = 2.0", 'carrier_ghz = 3.5\npath_loss = { model = "umi" }')


@pytest.mark.parametrize(
    ("text", "overrides", "remedy"),
    [
        (
            UMI,
            ["fleet.distance_m.min=9"],
            "fleet.distance_m: path loss umi holds from 10 to 5000 m, got 9 to 500",
        ),
        (
            UMI.replace("carrier_ghz = 3.5", ""),
            [],
            "radio.carrier_ghz: missing; path_loss and fading need it",
        ),
        (
            PAPER_TEXT.replace("fading_blocks = 100", ""),
            [],
            "radio.fading_blocks: missing; add it to the scenario",
        ),
        (PAPER_TEXT.replace("path_loss_exponent = 2.0", ""), [], "or a section radio.path_loss"),
        (
            PAPER_TEXT.replace("[fleet.distance_m]\nmin = 50.0\nmax = 500.0", ""),
            [],
            "fleet.distance_m: missing",
        ),
        (
            PAPER_TEXT,
            ["radio.sharing=none", "download.multicast=true"],
            "download.multicast: links of their own share no transmission",
        ),
        (
            PAPER_TEXT,
            ["radio.rate=ergodic", "radio.fading={speed_mps=1, interval_s=1}"],
            "radio.fading: the ergodic rate is the mean over all fading",
        ),
        (
            PAPER_TEXT,
            ["fleet.tasks=1", "trace={interval_s=9, downlink_mbps=[9, 9], uplink_mbps=[9, 9]}"],
            "trace.uplink_mbps: 9 Mbit/s over 100000 Hz are 90 bit/s per Hz, more than any radio carries (50)",
        ),
        (
            UMI,
            ["fleet.tasks=1", "trace={interval_s=9, downlink_mbps=[1, 1], uplink_mbps=[1, 1]}"],
            "radio.path_loss: the rates of a trace hold all of that already",
        ),
    ],
)
def test_a_channel_is_described_once_and_whole(text: str, overrides: list[str], remedy: str) -> None:
    assert remedy in refusal(*overrides, text=text)


def test_every_radio_feature_survives_the_text_form() -> None:
    walking = parse_scenario(
        UMI,
        overrides=[
            "mobility={speed_mps={min=1, max=2}, pause_s={min=0, max=60}, interval_s=30}",
            "radio.fading={}",
        ],
    )
    assert walking.fading_interval_s == 30
    assert not walking.plain_radio
    assert parse_scenario(dump_scenario(walking)) == walking
    rates = "trace={interval_s=60, downlink_mbps=[9, 8, 7.5], uplink_mbps=[1, 2, 3]}"
    traced = parse_scenario(PAPER_TEXT, overrides=["fleet.tasks=2", rates])
    assert traced.trace is not None
    assert traced.trace.downlink_mbps == (9, 8, 7.5)
    assert parse_scenario(dump_scenario(traced)) == traced


def number_fields() -> list[str]:
    """Every field of the paper's scenario that holds a real number."""
    fields, section = [], ""
    for line in PAPER_TEXT.splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif "=" in line and '"' not in line and "." in line.partition("=")[2]:
            fields.append(section + line.partition(" =")[0])
    return fields


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("field", number_fields())
def test_numbers_are_finite(field: str, value: str) -> None:
    assert refusal(f"{field}={value}").startswith(f"mine.toml: {field}: must be a finite number, got {value}")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_counts_are_finite(value: str) -> None:
    assert "fleet.ues: must be a whole number" in refusal(f"fleet.ues={value}")


def test_missing_section_is_named() -> None:
    without_reward = PAPER_TEXT.partition("[reward]")[0]
    assert "mine.toml: reward: missing; add it to the scenario" in refusal(text=without_reward)


def test_missing_field_is_named() -> None:
    without_layers = PAPER_TEXT.replace("layers = 32\n", "")
    assert "mine.toml: model.layers: missing; add it to the scenario" in refusal(text=without_layers)


def test_all_problems_are_told_at_once() -> None:
    message = refusal("fleet.ues=0", "radio.downlink_power_w=-1", "model.size=1")
    for field in ("fleet.ues", "radio.downlink_power_w", "model.size"):
        assert f"{field}: " in message


@pytest.mark.parametrize("text", ["a = ", "[fleet", "a = 1 b = 2", "\x00", "[fleet]\n[fleet]\n"])
def test_text_that_is_not_toml_is_refused_with_its_place(text: str) -> None:
    message = refusal(text=text)
    assert message.startswith("mine.toml: not valid TOML: ")
    assert " (at " in message


def test_missing_file_is_refused_with_the_shipped_names(tmp_path: Path) -> None:
    for source in ("papr", str(tmp_path), tmp_path / "none.toml"):
        with pytest.raises(ScenarioError, match=r"no such file.*shipped: .*paper") as caught:
            load_scenario(source)
        assert repr(str(source)) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(PAPER_TEXT.replace("GPT", "\xe9").encode("latin-1"))
    with pytest.raises(ScenarioError, match=r"latin\.toml.*save it as UTF-8 TOML"):
        load_scenario(path)


@pytest.mark.skipif(sys.platform == "win32", reason="file permissions are not enforced in the same way")
def test_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The refusal comes from the file system; root may read everything, so it is staged.
    path, read = tmp_path / "locked.toml", Path.read_text

    def refuse(each: Path, *how: str, **named: str) -> str:
        if each == path:
            raise PermissionError(13, "Permission denied")
        return read(each, *how, **named)

    path.touch()
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ScenarioError, match=r"locked\.toml.*cannot be read: Permission denied"):
        load_scenario(path)


def test_scenario_errors_are_emutune_errors() -> None:
    assert issubclass(ScenarioError, EmutuneError)


# --- levels and curve ---------------------------------------------------------------------------------------


def with_retention(layers: int, lowest: str, highest: str) -> Scenario:
    return parse_scenario(
        PAPER_TEXT,
        overrides=[f"model.layers={layers}", f"retention.min={lowest}", f"retention.max={highest}"],
    )


@st.composite
def decimals(draw: st.DrawFn) -> str:
    """A retention as a person writes it: up to five decimals."""
    digits = draw(st.integers(1, 5))
    return f"{draw(st.integers(1, 10**digits)) / 10**digits:.{digits}f}"


@given(st.integers(1, 300), decimals(), decimals())
@example(10, "0.3", "0.7")
@example(32, "0.2", "0.8")
@example(1, "1.0", "1.0")
@example(3, "0.33333", "0.66667")
@example(32, "0.1", "0.11")
def test_level_bounds_are_the_levels_inside_the_bounds(layers: int, one: str, other: str) -> None:
    lowest, highest = sorted((one, other), key=Fraction)
    inside = [k for k in range(1, layers + 1) if Fraction(lowest) <= Fraction(k, layers) <= Fraction(highest)]
    if inside:
        assert with_retention(layers, lowest, highest).level_bounds == (inside[0], inside[-1])
    else:
        with pytest.raises(ScenarioError, match=f"no whole number of the {layers} layers"):
            with_retention(layers, lowest, highest)


@pytest.mark.parametrize("layers", [3, 7, 10, 12, 24, 32, 48, 96])
def test_bounds_computed_as_levels_include_these_levels(layers: int) -> None:
    # k / L as a float is rarely the fraction itself: 1/3 lies below it, and 3 * (1/3) may not be 1.
    for k in range(1, layers + 1):
        assert with_retention(layers, repr(k / layers), repr(k / layers)).level_bounds == (k, k)


small = st.floats(-100, 100)


@given(small, small, small, st.floats(0.01, 1), st.floats(0.01, 1))
def test_lowest_perplexity_of_a_curve(
    quadratic: float, linear: float, constant: float, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    assume(high - low > 1e-3)
    curve = Curve(quadratic=quadratic, linear=linear, constant=constant)
    retention, lowest = curve.lowest_between(low, high)
    assert low <= retention <= high
    assert lowest == curve(retention)
    grid = [curve(low + (high - low) * i / 500) for i in range(501)]
    # No point of the grid is lower, and the grid comes within half a step of the lowest point.
    assert lowest <= min(grid) + 1e-9
    assert min(grid) - lowest <= abs(quadratic) * ((high - low) / 1000) ** 2 + 1e-9


def test_paper_curve_is_lowest_inside_the_whole_range_but_outside_the_bounds(paper: Scenario) -> None:
    curve = paper.quality.curve
    assert curve.lowest_between(0.2, 0.8)[0] == 0.8
    retention, perplexity = curve.lowest_between(0.2, 1.0)
    assert math.isclose(retention, 43.1 / 50.4)
    assert math.isclose(perplexity, 31.9 - 43.1**2 / (4 * 25.2))


CURVE = "[curve]\nquadratic = 1\nlinear = -3.0\nconstant = 60.0\nknots = [[0.2, 90.0], [1, 52.5]]\n"


def test_a_scenario_may_name_a_curve_file_beside_it(tmp_path: Path, paper: Scenario) -> None:
    (tmp_path / "measured.toml").write_text(CURVE)
    text = dump_scenario(paper)
    start, end = text.index("[quality.curve]"), text.index("[reward]")
    named = text[:start].replace("[quality]", '[quality]\ncurve = "measured.toml"') + text[end:]
    (tmp_path / "mine.toml").write_text(named)
    loaded = load_scenario(tmp_path / "mine.toml")
    assert loaded.quality.curve.constant == 60.0
    assert loaded.quality.curve(0.6) == pytest.approx(71.25)
    assert loaded.quality.curve.lowest_between(0.3, 1.0) == (1.0, 52.5)
    assert parse_scenario(dump_scenario(loaded)) == loaded
    assert load_scenario("paper", [f"quality.curve={tmp_path / 'measured.toml'}"]).quality == loaded.quality


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("quadratic = 1\n", "no section curve"),
        (CURVE.replace("0.2", "1.0"), "must rise"),
        (CURVE.replace("90.0", "-1.0"), "must be positive"),
    ],
)
def test_a_bad_curve_file_is_named(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "measured.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ScenarioError, match=said):
        load_scenario("paper", [f"quality.curve={path}"])


# --- optional features --------------------------------------------------------------------------------------


def test_features_are_off_in_the_paper_s_world(paper: Scenario) -> None:
    assert paper.families is None
    assert paper.download is None
    assert len(paper.models) == 1
    assert not paper.delta_download
    assert "families" not in dump_scenario(paper)


def test_families_default_to_the_scenario_s_curve() -> None:
    other = "{size_gb = 4.0, layers = 12, curve = {quadratic = 0.0, linear = -1.0, constant = 9.0}}"
    scenario = load_scenario("families", [f"families.others=[{other}, {{size_gb = 2.0, layers = 8}}]"])
    first, second, third = scenario.models
    assert (first.size_gb, first.layers, first.fewest, first.most) == (10.8, 16, 3, 13)
    assert (second.size_gb, second.layers, second.fewest, second.most) == (4.0, 12, 3, 9)
    assert (third.fewest, third.most) == (2, 6)
    assert second.curve(0.5) == 8.5
    assert first.curve == third.curve == scenario.quality.curve
    assert parse_scenario(dump_scenario(scenario)) == scenario


def test_a_family_may_name_a_curve_file(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text("[curve]\nquadratic = 0.0\nlinear = -2.0\nconstant = 20.0\n")
    text = dump_scenario(load_scenario("paper"))
    text += (
        '\n[families]\npersistence = 0.5\nothers = [{ size_gb = 1.0, layers = 8, curve = "small.toml" }]\n'
    )
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert load_scenario(path).models[1].curve(0.5) == 19.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("families.persistence=1.5", r"families\.persistence: must be at most 1, got 1\.5"),
        ("families.persistance=0.5", r"families\.persistance: unknown field; did you mean persistence\?"),
        ("families.others=[]", r"families\.others: .*at least 1"),
        ("families.others=[{size_gb=1.0, layer=3}]", r"families\.others\.0\.layer: .*did you mean layers\?"),
        (
            "families.others=[{size_gb=1.0, layers=1}]",
            r"no whole number of the 1 layers lies between .*families\.others\.0\.layers",
        ),
        ("families.cache_gb=0", r"families\.cache_gb: must be positive, got 0"),
        ("families.cache_gb='two'", r"families\.cache_gb: must be a number in GB \(1e9 bytes\), got 'two'"),
        (
            "families.cache_gb=2.0",
            r"families\.cache_gb: 2 GB hold no emulator of model, the smallest of which has 2\.025 GB; "
            r"raise families\.cache_gb to at least that, lower retention\.min or leave families\.cache_gb out",
        ),
        (
            "families.others=[{size_gb=1.0, layers=8, curve={quadratic=0.0, linear=-9.0, constant=8.0}}]",
            r"families\.others\.0\.curve: perplexity falls to -1",
        ),
        ("download.delta=1", r"download\.delta: must be true or false, got 1"),
    ],
)
def test_what_is_wrong_with_a_feature_is_named(override: str, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        load_scenario("families", [override])


# --- devices ------------------------------------------------------------------------------------------------


DEVICES = {
    "computation": 'computation={device_tflops={min=0.3,max=20.0,law="log_uniform"},server_tflops=50.0,'
    "bytes_per_token=4.0}",
    "parameters": "model.parameters_billion=2.7",
    "energy": "energy={receive_w=1.0,compute_j_per_tflop={min=2.0,max=5.0},weight_per_j=-1e-4}",
    "memory": "memory={device_gb={min=3.0,max=8.0}}",
    "privacy": "privacy={share=0.5}",
    "activity": "activity={task_probability=0.7}",
}


def test_devices_are_off_where_no_section_is(paper: Scenario) -> None:
    assert not paper.has_devices
    assert paper.private_ues == 0
    assert not {"computation", "energy", "memory", "privacy", "activity"} & set(
        paper.model_dump(exclude_none=True)
    )


def test_devices_survive_the_text_form() -> None:
    scenario = load_scenario("paper", DEVICES.values())
    assert scenario.has_devices
    assert scenario.private_ues == 3
    assert scenario.computation
    assert scenario.computation.epochs == 1.0
    assert scenario.computation.device_tflops.law == "log_uniform"
    assert scenario.models[0].parameters_billion == 2.7
    assert parse_scenario(dump_scenario(scenario)) == scenario


@pytest.mark.parametrize("name", ["edge-compute", "private"])
def test_shipped_worlds_of_unequal_devices(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.has_devices
    assert len(scenario.models) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [DEVICES["computation"]],
            r"model\.parameters_billion: missing; add it.*or leave that section out",
        ),
        (
            [DEVICES["energy"]],
            r"energy\.compute_j_per_tflop: nothing computes without the section computation",
        ),
        (
            [DEVICES["computation"], DEVICES["parameters"], "energy={receive_w=1.0,weight_per_j=0.0}"],
            r"energy\.compute_j_per_tflop: missing; add it",
        ),
        (
            ["energy={receive_w=1.0,weight_per_j=0.0,budget_j=3.0}"],
            r"energy: over_budget_weight_per_j: missing; .* go together",
        ),
        (
            ["energy={receive_w=1.0,weight_per_j=0.0,over_budget_weight_per_j=0.0}"],
            r"energy: budget_j: missing; .* go together",
        ),
        (["energy={receive_w=1.0,weight_per_j=1.0}"], r"energy\.weight_per_j: must be at most 0, got 1"),
        (["privacy={share=1.5}"], r"privacy\.share: must be at most 1, got 1\.5"),
        (["activity={task_probability=0.0}"], r"activity\.task_probability: must be positive, got 0"),
        (["memory={device_gb={min=5.0,max=3.0}}"], r"memory\.device_gb: min is above max"),
        (
            ['memory={device_gb={min=3.0,max=5.0,law="normal"}}'],
            r"memory\.device_gb\.law: must be 'uniform' or 'log_uniform', got 'normal'",
        ),
        (
            ["memory={device_gb={min=2.0,max=5.0}}", DEVICES["privacy"]],
            r"memory\.device_gb\.min: a UE that may not upload and holds 2 GB can train nowhere, since the "
            r"smallest emulator of model has 2\.36.* raise memory\.device_gb\.min",
        ),
        (
            [DEVICES["computation"], DEVICES["parameters"], "computation.device_tflops.min=1 TFLOP"],
            r"computation\.device_tflops\.min: must be a number in TFLOP/s .*got '1 TFLOP'",
        ),
        (["memory={device_gib={min=2.0,max=5.0}}"], r"memory\.device_gib: .*did you mean device_gb\?"),
    ],
)
def test_what_is_wrong_with_devices_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        load_scenario("paper", overrides)


def test_a_ue_that_holds_too_little_may_upload() -> None:
    scenario = load_scenario("paper", ["memory={device_gb={min=0.5,max=5.0}}", "privacy={share=0.05}"])
    assert scenario.private_ues == 0
