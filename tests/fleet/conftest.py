"""A fleet is tested with the tiny models of tests/tuning."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tuning"))
