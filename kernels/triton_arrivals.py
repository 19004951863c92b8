"""Triton device code by which threads hand results to others through memory: within a program, and to the last program
of a launch to arrive.

A program stores its results, waits until all its threads' stores are done, and counts itself in with an atomic add that
releases them and acquires those of the others, at gpu scope. The program whose add completes the count sees all stores.
It reads them past its L1 (.cg), which may hold older lines.

STORES_DONE: what a wave of an AMD GPU executes to wait for its own stores; "" on other devices, whose barriers order
memory (arrivals.py).
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def stored(STORES_DONE: tl.constexpr):
    """Wait until the stores of all threads of this program are done."""
    if STORES_DONE != "":
        tl.inline_asm_elementwise(STORES_DONE, "=v", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def arrive(counter, STORES_DONE: tl.constexpr):
    """Count this program in at `counter`, an int32 in memory, and return how many were counted before it."""
    stored(STORES_DONE)
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
