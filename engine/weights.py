"""Read model weights; refuse a checkpoint that lacks tensors."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError


def refuse_missing(where: str, name: object, missing: Iterable[str]) -> None:
    """Raise ValueError if a checkpoint lacks tensors; transformers only warns and fills them with random numbers."""
    lost = sorted(missing)
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise ValueError(
            f"{where}: {str(name)!r}: expected every tensor of the model in the checkpoint, got none for {shown}"
        )


@contextmanager
def reading_weights(name: object) -> Iterator[None]:
    """Turn the errors that a truncated file or tensors of another shape cause into one ValueError."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
            raise  # the message is clear already; for a truncated file, torch's reader gives only a number
        lines = [*(str(error) or "the file ends early").splitlines(), ""]
        # torch lists all tensors that do not fit under a heading; keep the first
        reason = (lines[0] if not lines[0].endswith(":") else lines[1].strip()).partition(". ")[0]
        if "ignore_mismatched_sizes" in reason:
            reason = "their shapes differ from those of its config.json"
        raise ValueError(f"{name}: its weights cannot be read ({reason})") from error
