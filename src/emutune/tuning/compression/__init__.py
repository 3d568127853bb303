"""Ways to make the middle of a foundation model smaller."""
