"""Cases of `linear_logprob`: against logits, log-softmax and entropy in plain torch and, on a GPU, the fused ops of
liger-kernel, cut-cross-entropy, QuACK and verl, each if it is installed and imports.

verl's op gives log-probability and entropy, as ours does; the others give the summed loss alone, without entropy.
With a frozen head, as in PPO with LoRA, the log-probability alone is differentiated, by hidden alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.linear_logprob import linear_logprob, reference
from ...kernels.linear_logprob.contract import Inputs, Needs, OutputGrads
from ..case import DTYPES, Case, Check, Work, compare, compiled_variants, generator, num_sets

SHAPES = {  # [T, D] against [V, D]; the first full one is 50 TFLOP forward and backward, too much for a CPU
    "smoke": ((32, 64, 500),),
    "small": ((512, 1024, 32000),),
    "full": ((16384, 4096, 128256), (4096, 4096, 128256)),
}
FORWARD, BOTH = "forward", "forward + backward"
FROZEN = "forward + backward, frozen head"
_CHUNK = 1024  # rows of the fp64 reference at a time
_OUTPUTS = ("logprob", "entropy", "lse")


def composed(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, lse) [T] from the whole [T, V] of logits."""
    logits = F.linear(hidden, weight).float()
    lse = torch.logsumexp(logits, dim=-1)
    logprob = logits.gather(1, target[:, None])[:, 0] - lse
    entropy = lse - (torch.softmax(logits, dim=-1) * logits).sum(dim=-1)
    return logprob, entropy, lse


def fused(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = linear_logprob(hidden, weight, target, ignore_index=None)
    return out.logprob, out.entropy, out.lse


def kept(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused`, with the memory for the softmax numerators of all rows, as an unfused loss has for its logits."""
    everything = weight.element_size() * len(hidden) * len(weight)
    out = linear_logprob(hidden, weight, target, ignore_index=None, keep_bytes=everything)
    return out.logprob, out.entropy, out.lse


def _trained(*tensors: Tensor) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.requires_grad]


def _gradients(
    function: Callable[..., tuple[Tensor, Tensor, Tensor]],
    upstream: Sequence[Tensor],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of what is trained. upstream: of the log-probabilities [T] and, if the loss has them, the entropies."""
    outputs = function(hidden, weight, target)[: len(upstream)]
    return torch.autograd.grad(outputs, _trained(hidden, weight), upstream)


def _liger() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return partial(liger_fused_linear_cross_entropy, reduction="sum")


def _cce(**options: Any) -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy

    return partial(linear_cross_entropy, reduction="sum", **options)


def _quack() -> Callable[..., Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return partial(chunked_linear_cross_entropy, reduction="sum")


def _verl() -> Callable[..., Any]:
    """verl's op. `import verl` needs ray and tensordict, which the op does not: enter its packages without their
    __init__.
    """
    found = find_spec("verl")
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError("No module named 'verl'", name="verl")
    roots = list(found.submodule_search_locations)
    for name in ("verl", "verl.utils", "verl.utils.kernel"):
        if name not in sys.modules:
            package = ModuleType(name)
            package.__path__ = ["/".join([root, *name.split(".")[1:]]) for root in roots]
            sys.modules[name] = package
    from verl.utils.kernel import kernels  # noqa: F401  (its op imports them only in a call)
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, target: (*linear_cross_entropy(hidden, weight, target, 1.0, "none"), None)


# name -> (package, what imports it). Of a scalar loss the upstream gradient is one number. cut-cross-entropy's filter
# skips small gradients, and on random inputs nearly all are small: "cce" is without it, "cce filtered" as it comes
PEERS: dict[str, tuple[str, Callable[[], Callable[..., Any]]]] = {
    "liger": ("liger_kernel", _liger),
    "cce": ("cut_cross_entropy", partial(_cce, filter_eps=None)),
    "cce filtered": ("cut_cross_entropy", _cce),
    "quack": ("quack", _quack),
    "verl": ("verl", _verl),
}
_WITH_ENTROPY = ("verl",)


def peers(device: torch.device, upstream: Sequence[Tensor] | None) -> tuple[dict[str, Any], list[str]]:
    """(the peers that import, as functions of (hidden, weight, target); why others are missing), on a GPU only.

    upstream: as in `_gradients`, to time forward + backward; None: the forward alone.
    """
    found: dict[str, Any] = {}
    notes = []
    for name, (package, load) in PEERS.items() if device.type == "cuda" else ():
        try:
            function = load()
        except Exception as error:  # a package of another torch's or CUDA's time may fail in any way at import
            absent = isinstance(error, ModuleNotFoundError) and error.name == package
            notes.append(f"{name}: {'not installed' if absent else f'{type(error).__name__}: {error}'[:200]}")
            continue
        if upstream is not None:
            both = name in _WITH_ENTROPY
            function = partial(_gradients, function, upstream) if both else partial(_loss_gradients, function)
        found[name] = function
    return found, notes


def _loss_gradients(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(hidden, weight, target), _trained(hidden, weight))


def _tensors(rows: int, dim: int, vocabulary: int, dtype: str, g: torch.Generator) -> tuple[Tensor, ...]:
    hidden = torch.randn(rows, dim, generator=g, device=g.device, dtype=DTYPES[dtype])
    weight = torch.randn(vocabulary, dim, generator=g, device=g.device, dtype=DTYPES[dtype]).mul_(dim**-0.5)
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=g, device=g.device)


def _make(rows: int, dim: int, vocabulary: int, dtype: str, mode: str, device: torch.device) -> Work:
    sets: list[tuple[Any, ...]] = [
        _tensors(rows, dim, vocabulary, dtype, generator(device, seed)) for seed in range(num_sets(device))
    ]
    functions: dict[str, Any] = {"ours": fused, "eager": composed, **compiled_variants(composed, device)}
    if mode == FORWARD:
        others, notes = peers(device, None)
        return Work(sets, functions | others, lambda: _check_forward(sets[0]), notes=notes)
    for hidden, weight, _ in sets:
        hidden.requires_grad_()
        weight.requires_grad_(mode == BOTH)
    g = generator(device, 99)
    upstream = [torch.randn(rows, generator=g, device=device) for _ in range(2 if mode == BOTH else 1)]
    ours = [fused]
    if mode == BOTH:
        functions["ours kept"] = kept
        ours.append(kept)
    variants = {name: partial(_gradients, function, upstream) for name, function in functions.items()}
    others, notes = peers(device, upstream)
    return Work(sets, variants | others, lambda: _check_gradients(sets[0], upstream, ours), grad=True, notes=notes)


def _chunks(tensors: tuple[Any, ...]) -> Iterator[tuple[slice, Inputs]]:
    """fp64 inputs in chunks of rows: a whole [T, V] in fp64 would not fit in memory."""
    hidden, weight, target = tensors
    wide = weight.detach().double()
    for i in range(0, len(hidden), _CHUNK):
        part = slice(i, i + _CHUNK)
        yield part, Inputs(hidden[part].detach().double(), wide, target[part], 1.0, None, None)


@torch.no_grad()
def _check_forward(tensors: tuple[Any, ...]) -> Check:
    parts = [reference.forward(inputs) for _, inputs in _chunks(tensors)]
    exact = {name: torch.cat(part) for name, part in zip(_OUTPUTS, zip(*parts, strict=True), strict=True)}
    ours, eager = (dict(zip(_OUTPUTS, f(*tensors), strict=True)) for f in (fused, composed))
    return compare(ours, eager, exact)


def _check_gradients(tensors: tuple[Any, ...], upstream: Sequence[Tensor], ours: Sequence[Any]) -> Check:
    """The worst check of `ours`, each an execution that is timed."""
    hidden, weight, _ = tensors
    exact = [torch.zeros_like(t, dtype=torch.float64, requires_grad=False) for t in _trained(hidden, weight)]
    for part, inputs in _chunks(tensors):
        _, entropy, lse = reference.forward(inputs)
        wide = [g[part].double() for g in upstream]
        grads = OutputGrads(wide[0], wide[1] if len(wide) > 1 else None, lse=None)
        needs = Needs(hidden=True, weight=weight.requires_grad)
        found = reference.backward(grads, inputs, None, entropy, lse, needs)
        assert found[0] is not None
        exact[0][part] = found[0]
        if found[1] is not None:
            exact[1] += found[1]
    names = ("gradient of hidden", "gradient of weight")
    checks = []
    for function in ours:
        sides = (_gradients(function, upstream, *tensors), _gradients(composed, upstream, *tensors), exact)
        checks.append(compare(*(dict(zip(names, side, strict=False)) for side in sides)))
    return max(checks, key=lambda check: (not check.passed, check.error / check.bound))


def pass_bytes(rows: int, dim: int, vocabulary: int, dtype: str, mode: str) -> int:
    """Forward: read hidden, weight and targets, write three numbers a row. Backward: read these, entropy, lse and two
    upstream gradients, write both gradients; with a frozen head, one upstream gradient and one gradient.
    """
    of_hidden, of_weight = (DTYPES[dtype].itemsize * dim * count for count in (rows, vocabulary))
    forward = of_hidden + of_weight + 8 * rows + 3 * 4 * rows
    if mode == FORWARD:
        return forward
    read = of_hidden + of_weight + 8 * rows
    return forward + read + (of_hidden + 3 * 4 * rows if mode == FROZEN else of_hidden + of_weight + 4 * 4 * rows)


def cases() -> Iterator[Case]:
    for size, shapes in SHAPES.items():
        for dtype in DTYPES:
            for rows, dim, vocabulary in shapes:
                shape, product = f"{rows} x {dim} x {vocabulary}", 2 * rows * dim * vocabulary
                devices = ("cuda",) if size == "full" else ("cpu", "cuda")
                # the formulas' products; one that an implementation computes twice counts once
                for mode, products in ((FORWARD, 1), (BOTH, 3), (FROZEN, 2)):
                    moved = pass_bytes(rows, dim, vocabulary, dtype, mode)
                    make = partial(_make, rows, dim, vocabulary, dtype, mode)
                    yield Case("linear_logprob", mode, shape, dtype, size, moved, products * product, make, devices)
