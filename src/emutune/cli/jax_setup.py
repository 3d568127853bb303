"""What JAX must be told before it is imported. Imports nothing heavy itself."""

from __future__ import annotations

import os
from pathlib import Path


def prepare_jax(programmes: int = 1) -> None:
    """One device for each of the programmes that run side by side, and a compilation cache.

    A device computes with one thread. More devices than programmes cost speed: the idle ones'
    threads take over parts of the running program. Settings that the user made stay.

    Args:
        programmes: how many training runs are waiting; as many devices as cores at most.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = max(1, min(programmes, cores))
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")
    os.environ.setdefault("NPROC", "1")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emutune" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
