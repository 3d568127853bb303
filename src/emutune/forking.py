"""Processes that were forked from one in which JAX was in use, where it would wait for ever.

A fork takes over what JAX's threads hold, but not the threads. Imports no JAX itself.
"""

from __future__ import annotations

import os
import sys

from emutune.errors import UsageError

_in_use = False
_forked = False


def watch_forks() -> None:
    """Look at every fork of this process and of those forked from it, once and for all."""
    # Windows has no fork.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_look, after_in_child=_note)


def refuse_fork() -> None:
    """Stop before JAX computes where it cannot.

    Raises:
        UsageError: this process, or one that it descends from, was forked while JAX was in use.
    """
    if _forked:
        raise UsageError(
            "fork: JAX was in use when this process was forked, so it would hang here; start processes with "
            'context="spawn": multiprocessing.get_context("spawn"), or '
            'vector_kwargs={"context": "spawn"} with gymnasium.make_vec'
        )


def _look() -> None:
    # In the parent, where no lock of JAX can be held by a thread that is not there.
    global _in_use
    bridge = sys.modules.get("jax._src.xla_bridge")
    _in_use = bridge is not None and bridge.backends_are_initialized()


def _note() -> None:
    global _forked
    _forked = _forked or _in_use
