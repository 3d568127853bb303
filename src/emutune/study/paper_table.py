"""Table I of the paper, as far as its text can be recovered, for comparison by ratios (D5, D7)."""

from __future__ import annotations

from typing import NamedTuple


class PaperRow(NamedTuple):
    """One policy at one fleet size; None where the paper's text is illegible or uncertain."""

    episode_return: float | None
    delay_min: float | None
    perplexity: float | None


TABLE_I: dict[int, dict[str, PaperRow]] = {
    6: {
        "hmppo": PaperRow(-57.32, 23.25, 12.78),
        "ippo": PaperRow(-78.98, 66.88, 16.01),
        "random": PaperRow(-175.57, 775.97, 23.96),
    },
    7: {
        "hmppo": PaperRow(None, None, None),
        "ippo": PaperRow(-86.35, 92.33, 17.33),
        "random": PaperRow(-193.40, 924.89, 24.477),
    },
    8: {
        # From the margins over IPPO that the text states: 33.79, 80.49 and 23.53 %.
        "hmppo": PaperRow(-63.24, 32.14, 13.63),
        "ippo": PaperRow(-95.52, 164.73, 17.82),
        "random": PaperRow(-200.63, 1172.45, 25.33),
    },
    9: {
        "hmppo": PaperRow(None, 39.04, None),
        "ippo": PaperRow(-113.74, 195.32, 18.93),
        "random": PaperRow(-240.11, 1553.73, 24.64),
    },
}


def paper_ratio(ues: int, policy: str, field: str) -> float | None:
    """A figure of Table I relative to the random policy's at the same fleet size."""
    value, reference = (getattr(TABLE_I[ues][name], field) for name in (policy, "random"))
    return None if value is None or reference is None else value / reference
