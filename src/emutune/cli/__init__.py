"""The ``emutune`` command."""
