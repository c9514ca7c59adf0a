"""Threads beside the engine's: they read weights, encode and store files."""

import torch


def beside_the_engine() -> None:
    """Give this thread no OpenMP pool of its own.

    Where pools together have more threads than the machine has cores, libgomp no longer spins at a barrier but sleeps:
    a pass of two rows took 58 ms instead of 38 on two cores, for a pool that a loader had used once.
    """
    torch.set_num_threads(1)  # of this thread, and of those begun later; the engine's keeps its own
