"""Read scenarios from TOML, apply overrides, and say in one line what is wrong with one."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from emutune.errors import ScenarioError, TraceError
from emutune.plugins import entry_names, load_entry
from emutune.scenario.schema import Scenario
from emutune.scenario.trace import mean_rates, read_trace


def shipped_scenarios() -> list[str]:
    """Names of the scenarios that come with emutune."""
    library = resources.files("emutune.scenario") / "library"
    return sorted(
        entry.name.removesuffix(".toml") for entry in library.iterdir() if entry.name.endswith(".toml")
    )


def load_scenario(source: str | Path, overrides: Iterable[str] = ()) -> Scenario:
    """Load a shipped scenario by name, one that an installed package offers, or a scenario file by path.

    Args:
        source: the name of a shipped scenario (``"paper"``) or of one that a package offers under the entry points
            ``emutune.scenarios``, as a ``Scenario`` or a file's path; or the path of a TOML file.
        overrides: assignments such as ``"fleet.ues=9"``, applied before validation.

    Raises:
        ScenarioError: the file is missing or unreadable, or a value is invalid.
    """
    text, place = scenario_text(source)
    return parse_scenario(text, overrides=overrides, source=place)


def parse_scenario(text: str, *, overrides: Iterable[str] = (), source: str = "scenario") -> Scenario:
    """Validate a scenario given as TOML text; see ``load_scenario``.

    ``quality.curve`` may be the path of a curve file, as ``emutune calibrate`` writes it, seen from the
    scenario's file or from the working directory; so may ``trace.file`` be that of a trace.
    """
    tree = _tree(text, source)
    for override in overrides:
        _apply(tree, override)
    for holder in _curve_holders(tree):
        if isinstance(holder, dict) and isinstance(holder.get("curve"), str):
            holder["curve"] = _read_curve(holder["curve"], Path(source).parent)
    if isinstance(tree.get("trace"), dict) and "file" in tree["trace"]:
        tree["trace"] = _read_trace(tree["trace"], source)
    try:
        return Scenario.model_validate(tree)
    except ValidationError as error:
        raise ScenarioError(f"{source}: {_explain(error)}") from error


def dump_scenario(scenario: Scenario) -> str:
    """A scenario as TOML text that ``parse_scenario`` reads back to an equal scenario."""
    return "\n".join(_toml_lines(scenario.model_dump(exclude_none=True), ())).strip() + "\n"


def scenario_text(source: str | Path) -> tuple[str, str]:
    """A scenario as TOML text, and where it stands: by its name, or by its path.

    Raises:
        ScenarioError: there is none, or it cannot be read.
    """
    name = str(source)
    if name in shipped_scenarios():
        return (resources.files("emutune.scenario") / "library" / f"{name}.toml").read_text("utf-8"), name
    if name in entry_names("emutune.scenarios"):
        offered = load_entry("emutune.scenarios", name)
        if isinstance(offered, Scenario):
            return dump_scenario(offered), name
        if not isinstance(offered, str | Path):
            raise ScenarioError(f"scenario {name!r}: its package offers {offered!r}, no Scenario and no path")
        source = offered
    return _file_text(source), str(source)


def _file_text(source: str | Path) -> str:
    name = str(source)
    try:
        return Path(source).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScenarioError(f"scenario {name!r}: not UTF-8 text; save it as UTF-8 TOML") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        raise ScenarioError(
            f"scenario {name!r}: no such file, and no shipped scenario of that name; "
            f"shipped: {', '.join(shipped_scenarios())}"
        ) from error
    except OSError as error:
        raise ScenarioError(f"scenario {name!r}: cannot be read: {error.strerror}") from error


def _tree(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{source}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise ScenarioError(f"{source}: nested too deeply; a scenario has two levels") from error


def _read_curve(name: str, beside: Path) -> Any:
    path = beside / name if (beside / name).is_file() else Path(name)
    try:
        content = _tree(path.read_text("utf-8"), name)
    except (OSError, ValueError) as error:
        raise ScenarioError(
            f"quality.curve: {name!r} cannot be read; write a curve file with emutune calibrate, or a table of "
            "quadratic, linear and constant"
        ) from error
    if "curve" not in content:
        raise ScenarioError(f"quality.curve: {name!r} has no section curve; write one with emutune calibrate")
    return content["curve"]


def _read_trace(section: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The section with the rates of its file, in its intervals, instead of the file."""
    name, interval_s = section["file"], section.get("interval_s")
    if not isinstance(name, str):
        raise ScenarioError(f"{source}: trace.file: must be the path of a trace, got {name!r}")
    rest = {key: value for key, value in section.items() if key != "file"}
    if isinstance(interval_s, bool) or not isinstance(interval_s, int | float) or not interval_s > 0:
        # Validation says what is wrong with the interval; the rates are of no account.
        return rest | {"downlink_mbps": [1.0, 1.0], "uplink_mbps": [1.0, 1.0]}
    try:
        rates = mean_rates(read_trace(_trace_path(name, source)), float(interval_s))
    except TraceError as error:
        raise ScenarioError(f"{source}: trace.file: {error}") from error
    return rest | {"downlink_mbps": list(rates.downlink_mbps), "uplink_mbps": list(rates.uplink_mbps)}


def _trace_path(name: str, source: str) -> Path:
    """Beside the scenario, in the library where the scenario is a shipped one, or from the working directory."""
    shipped = source in shipped_scenarios()
    beside = Path(str(resources.files("emutune.scenario") / "library")) if shipped else Path(source).parent
    return beside / name if (beside / name).is_file() else Path(name)


def _curve_holders(tree: Mapping[str, Any]) -> Iterable[Any]:
    """Every table of a scenario that has a curve, or may have one."""
    yield tree.get("quality")
    families = tree.get("families")
    others = families.get("others") if isinstance(families, dict) else None
    yield from others if isinstance(others, list) else ()


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ScenarioError(f"override {override!r}: write it as section.field=value, e.g. fleet.ues=9")
    node: Any = tree
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ScenarioError(f"override {override!r}: {key} is a single value and has no fields")
    node[keys[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    """A TOML value, or the text itself where it is a bare word (``--set name=mine``)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _explain(error: ValidationError) -> str:
    """All problems of a scenario in one line, each with its field and what to do."""
    return "; ".join(_brief(_explain_one(problem)) for problem in error.errors())


def _brief(text: str, limit: int = 300) -> str:
    """Whoever pastes a novel into a field is told its beginning."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _explain_one(problem: Mapping[str, Any]) -> str:
    location, kind, value = problem["loc"], problem["type"], problem["input"]
    field = ".".join(str(part) for part in location)
    context = problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{field}: unknown field{_suggestion(location)}"
    if kind == "missing":
        return f"{field}: missing; add it to the scenario"
    if kind == "value_error":
        return ": ".join(part for part in (field, str(context["error"])) if part)
    if kind == "finite_number":
        return f"{field}: must be a finite number, got {value}"
    if kind == "greater_than" and context.get("gt") == 0:
        return f"{field}: must be positive, got {value}"
    if kind in _LIMITS:
        return f"{field}: must be {_LIMITS[kind]} {context[_LIMIT_KEYS[kind]]:g}, got {value}"
    if kind in ("float_parsing", "float_type", "int_parsing", "int_type", "int_from_float"):
        wanted = "a whole number" if kind.startswith("int") else "a number"
        return f"{field}: must be {wanted}{_unit(field)}, got {value!r}"
    if kind == "bool_type":
        return f"{field}: must be true or false, got {value!r}"
    if kind == "literal_error":
        return f"{field}: must be {context['expected']}, got {value!r}"
    if kind == "model_type":
        return f"{field}: must be a table of fields, got {value!r}"
    return f"{field}: {problem['msg']}"


_LIMITS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}
_LIMIT_KEYS = {
    "greater_than": "gt",
    "greater_than_equal": "ge",
    "less_than": "lt",
    "less_than_equal": "le",
}
_UNITS = {
    "_per_min": " per minute",
    "_dbm_per_hz": " in dBm/Hz",
    "_hz": " in Hz",
    "_mb": " in MB (1e6 bytes)",
    "_gb": " in GB (1e9 bytes)",
    "_tflops": " in TFLOP/s (1e12 operations a second)",
    "_per_j": " per joule",
    "_j": " in J",
    "_j_per_tflop": " in J per 1e12 operations",
    "_ghz": " in GHz",
    "_mps": " in m/s",
    "_mbps": " in Mbit/s",
    "_s": " in s",
    "_w": " in W",
    "_m": " in m",
}


def _unit(field: str) -> str:
    for part in reversed(field.split(".")):
        for suffix, words in _UNITS.items():
            if part.endswith(suffix):
                return words
    return ""


def _suggestion(location: tuple[Any, ...]) -> str:
    section: type[BaseModel] = Scenario
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        section = _model_of(section.model_fields[str(part)].annotation)
    fields = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), fields, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; the fields here are {', '.join(fields)}"


def _model_of(annotation: Any) -> type[BaseModel]:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    raise TypeError(f"{annotation} holds no section")


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterable[str]:
    for key, value in table.items():
        if value is not None and not isinstance(value, dict):
            yield f"{key} = {_toml_value(value)}"
    for key, value in table.items():
        if isinstance(value, dict):
            yield ""
            yield f"[{'.'.join((*path, key))}]"
            yield from _toml_lines(value, (*path, key))


def _toml_value(value: str | float | Sequence[Any] | Mapping[str, Any]) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml_value(part)}' for key, part in value.items())} }}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for two things: TOML wants the delete character escaped
        # too, and knows no surrogate pairs, into which JSON's ASCII form splits characters such as emoji.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
