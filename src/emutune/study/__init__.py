"""Measuring policies on common held-out episodes."""
