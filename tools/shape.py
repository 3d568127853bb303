"""The shape of the code, counted: how often a concept is written, and how long files and functions are.

    python tools/shape.py

A *feature-off test* compares with None something that a scenario may leave out, or what is drawn or carried for it.
A *composition* is a place that multiplies seconds by the price of a step's delay.
"""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "emutune"
SIMULATION = ("step", "world", "policies", "learning", "bounds", "study")
# What may be off: sections and fields of a scenario, and what worlds, episodes, caches and costs have of them.
# fmt: off
FEATURES = {
    "active", "activity", "approach_m", "background_s", "budget_j", "cache_bits", "cache_gb", "chance",
    "chooses", "compute", "compute_j_per_tflop", "compute_w", "computation", "device", "devices",
    "distance_m", "downlink_gain", "each", "energy", "energy_j", "fading", "fading_quantiles", "families",
    "family", "held_ages", "held_family", "held_retention", "held_retentions", "interval_s", "j_per_tflop",
    "joules", "kind_joules", "line_of_sight", "lone", "memory", "memory_bits", "mobility", "most_layers",
    "over", "over_budget_weight_per_j", "path", "path_loss", "patience_s", "persistence",
    "previous_downlink_gain", "private", "private_ues", "rent", "room", "seconds", "server_s",
    "shadow_per_j", "shelf", "speed_mps", "spent_j", "table", "task_probability", "tflops", "trace",
    "training_s", "trained_s", "used_j", "whole",
}
# fmt: on
PRICE = {"delay_weight_per_s", "delay_weight_per_min", "per_s", "cost_per_s"}
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 60, 7


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE), ast.parse(path.read_text("utf-8"))


def last_name(node):
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def asks_for_none(node):
    """Whether a comparison asks if a feature is off."""
    return (
        isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.Is | ast.IsNot)
        and isinstance(node.comparators[0], ast.Constant)
        and node.comparators[0].value is None
        and last_name(node.left) in FEATURES
    )


def composes(node):
    """Whether an expression multiplies by the price of a second of delay."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return False
    factors = [side.operand if isinstance(side, ast.UnaryOp) else side for side in (node.left, node.right)]
    return any(last_name(factor) in PRICE for factor in factors)


def main():
    off, priced, long_files, long_functions, wide = {}, [], [], [], []
    lines = dict.fromkeys(SIMULATION, 0)
    for path, tree in modules():
        room, length = path.parts[0], len((SOURCE / path).read_text("utf-8").splitlines())
        if room in lines:
            lines[room] += length
        if length > LONGEST_FILE:
            long_files.append(f"{path} {length}")
        for node in ast.walk(tree):
            if asks_for_none(node) and room in (*SIMULATION, "fleet"):
                off.setdefault(str(path), set()).add(node.lineno)
            if composes(node) and room in SIMULATION:
                priced.append(f"{path}:{node.lineno}")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = node.args
                count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
                if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                    long_functions.append(f"{path}:{node.lineno} {node.name}")
                if count > MOST_PARAMETERS and node.name != "__init__":
                    wide.append(f"{path}:{node.lineno} {node.name} {count}")
    print(f"feature-off tests: {sum(map(len, off.values()))} lines in {len(off)} files")
    print(f"places that price a second of delay: {len(priced)}: {', '.join(priced)}")
    print(f"lines: {lines}, together {sum(lines.values())}")
    print(f"files above {LONGEST_FILE} lines: {len(long_files)}: {', '.join(long_files)}")
    print(f"functions above {LONGEST_FUNCTION} lines: {len(long_functions)}: {', '.join(long_functions)}")
    print(f"functions with more than {MOST_PARAMETERS} parameters: {len(wide)}: {', '.join(wide)}")


if __name__ == "__main__":
    main()
