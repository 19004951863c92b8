"""Compute features of a frozen trunk once per distinct text, and cache them as safetensors shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ...engine import Scorer
from ...engine.text import Encoded
from ..job.files import atomic_file

_SHARD_TOKENS = 16384  # a killed job loses at most one shard: 8 s of SmolLM2-135M on two cores
_SAMPLE = 4096  # elements of each tensor that enter the fingerprint


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint a trunk in 16 hex digits: name, shape, dtype and a sample of every tensor, and which states are read.

    A sample is enough, because a fine-tuned trunk differs in every matrix; to hash an 8B trunk whole takes a minute.
    The reward head is left out, because features do not depend on it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith("score."):
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous()
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    config: Any = model.config  # says which hidden states are read
    reading = str(getattr(config, "pooling", ""))
    if getattr(config, "skip_token_id", None) is not None:
        reading += f" before {config.skip_token_id}"
    if getattr(config, "taps", None) is not None:
        reading += f" {' '.join(config.taps)}"
    if getattr(config, "logprob_skips", None) is not None:
        reading += f" without {config.logprob_skips}"
    return hashlib.sha256(digest.digest() + reading.encode()).hexdigest()[:16]


class FeatureStore:
    """A folder of safetensors shards: `features` [n, F] in the trunk's dtype, `keys` [n, 32] SHA-256 of the token ids,
    and of where the response begins if the model reads it.

    Each trunk fingerprint has a sub-folder, so that one folder may serve many models and data sets. Shards appear whole
    or not at all; a damaged one is computed again.
    """

    def __init__(self, folder: Path | str, model: nn.Module) -> None:
        self.folder = Path(folder) / model_fingerprint(model)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._where: dict[bytes, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def add(self, keys: Sequence[bytes], features: Tensor) -> None:
        """Store features [n, F] of n keys as one shard."""
        packed = torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32).copy())
        path = self.folder / f"{hashlib.sha256(packed.numpy().tobytes()).hexdigest()[:16]}.safetensors"
        with atomic_file(path) as temporary:
            save_file({"features": features.contiguous(), "keys": packed}, temporary)
        self._index(path)

    def get(self, keys: Sequence[bytes]) -> Tensor:
        """Return features [N, F] of N keys, all of which must be stored; keys may repeat."""
        rows: dict[Path, list[tuple[int, int]]] = {}
        for position, key in enumerate(keys):
            path, row = self._where[key]
            rows.setdefault(path, []).append((position, row))
        result: Tensor | None = None
        for path, places in rows.items():
            with safe_open(path, "pt") as shard:
                stored = shard.get_tensor("features")
            if result is None:
                result = stored.new_empty(len(keys), stored.shape[1])
            positions, found = (torch.tensor(column) for column in zip(*places, strict=True))
            result[positions] = stored[found]
        if result is None:
            raise ValueError("features: expected at least one text, got none")
        return result

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as shard:
                keys = shard.get_tensor("keys").numpy()
                if shard.get_slice("features").get_shape()[0] != len(keys):
                    raise SafetensorError("as many features as keys")
        except (SafetensorError, OSError):
            return
        for row, key in enumerate(keys):
            self._where[key.tobytes()] = (path, row)


class TextFeatures(NamedTuple):
    """features [N, F] of N texts, on the CPU in the trunk's dtype; truncated [N] bool: which lost their beginning."""

    features: Tensor
    truncated: Tensor


def compute_features(
    scorer: Scorer, items: Sequence[Any], folder: Path | str, progress: bool = True, names: Sequence[str] | None = None
) -> TextFeatures:
    """Compute the features of N items (as `Scorer` takes them).

    Each distinct text (after tokenising) is computed once, longest first, in shards of about 16,000 tokens in `folder`;
    features stored there are read. Shards are cut from the whole sorted list, not from the missing texts, so a killed
    and resumed job pads the same batches and gets the same bits as an uninterrupted one.

    `names`: the items' names in errors; None: their indices.

    Raises:
        ValueError: for no items; for the first item that cannot be encoded or whose features are not finite, by name.
    """
    store = FeatureStore(folder, scorer.model)
    names = [f"item {i}" for i in range(len(items))] if names is None else names
    bar = tqdm(items, desc="tokenising", unit="text", delay=1, disable=not progress)
    encoded = [scorer.read(item, name) for item, name in zip(bar, names, strict=True)]
    reads_response = scorer.model.config.reads_response
    keys = [_key(each, reads_response) for each in encoded]
    unique = dict(zip(keys, encoded, strict=True))
    order = sorted(unique, key=lambda key: (-len(unique[key].ids), key))
    ends = accumulate(len(unique[key].ids) for key in order)
    shards: dict[int, list[bytes]] = {}
    for key, end in zip(order, ends, strict=True):
        shards.setdefault((end - 1) // _SHARD_TOKENS, []).append(key)
    missing = [[key for key in shard if key not in store] for shard in shards.values()]
    total = sum(len(unique[key].ids) for shard in missing for key in shard)
    with tqdm(total=total, desc="features", unit="token", unit_scale=True, disable=not progress or not total) as bar:
        for shard in missing:
            if shard:
                store.add(shard, scorer.features([unique[key] for key in shard]))
                bar.update(sum(len(unique[key].ids) for key in shard))
    features = store.get(keys)
    bad = (~features.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise ValueError(
            f"features: expected finite hidden states, got NaN or infinity for {names[int(bad[0])]} "
            f"({len(bad)} of {len(keys)}); a wider dtype of the trunk may help"
        )
    return TextFeatures(features, torch.tensor([each.truncated for each in encoded]))


def _key(encoded: Encoded, reads_response: bool) -> bytes:
    start = [encoded.start] if reads_response else []
    return hashlib.sha256(np.asarray([*start, *encoded.ids], dtype=np.int64).tobytes()).digest()
