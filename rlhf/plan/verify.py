"""Run a step of the loop on tensors without data and count its allocations, to verify a plan.

Policy, static-cache decoding, scoring and the update's minibatch are the code that `prudent ppo` runs, under torch's
FakeTensorMode: shapes, dtypes and lifetimes of every tensor, no memory and no arithmetic. MemTracker adds up the
storages that are alive. Code that reads a tensor's value gets a 1.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from ...engine import EnsembleHead
from ...engine.taps import features_size, layers_of, parse_taps
from ...kernels.linear_logprob.contract import DERIVATIVE
from ..ppo import batch
from ..ppo.batch import Experience, Samples, Scored
from ..ppo.budget import logprob_workspace
from ..ppo.config import PPOConfig
from ..ppo.policy.policy import Policy, RewardOnTrunk
from ..ppo.rewards.sources import Rewards
from ..ppo.score import score
from ..ppo.update import MinibatchGradient, Tally, minibatch_step, open_optimizer
from ..sampling.engines import Static
from ..sampling.tokens import Rule, Sampling

_CPU = torch.device("cpu")  # a build of torch without CUDA makes no fake CUDA tensors
TOTAL = "Total"


class _Backward:
    """A module tracker for MemTracker that needs no hooks on modules."""

    parents: frozenset[str] = frozenset()

    @property
    def is_bw(self) -> bool:
        return bool(torch._C._current_graph_task_id() != -1)

    def register_user_hooks(self, *hooks: Any) -> None:
        """Not needed."""

    def clear_user_hooks(self) -> None:
        """Not needed."""

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, *error: object) -> None:
        """Nothing to do."""


class Tracker(MemTracker):
    """MemTracker that accepts frozen parameters and models that are called more than once, unlike torch's."""

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker: Any = _Backward()

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        def gradient(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._update_and_maybe_create_winfos(parameter.grad, _MemRefType.GRAD)

        for parameter in module.parameters():
            self._update_and_maybe_create_winfos(parameter, _MemRefType.PARAM)
            if parameter.requires_grad and parameter not in self._param_to_grad_hook_handles:
                handle = parameter.register_post_accumulate_grad_hook(gradient)
                self._param_to_grad_hook_handles[parameter] = (handle, handle)
        for buffer in module.buffers():
            self._update_and_maybe_create_winfos(buffer, _MemRefType.BUFFER)
        return 0, 0

    def restart(self) -> None:
        """Forget the peak so far."""
        self._peak_mem_snap = self.get_tracker_snapshot()
        self._peak_mem = {device: snap[TOTAL] for device, snap in self._peak_mem_snap.items()}

    def peak(self) -> dict[str, int]:
        """Bytes by category at the peak since `restart`."""
        snap = self.get_tracker_snapshot("peak")[_CPU]
        return {str(getattr(name, "value", name)): size for name, size in snap.items()}


class _Scratch(TorchDispatchMode):
    """Allocate linear_logprob's scratch memory for the length of each call, because the op's fake version does not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scratch = None
        if func.namespace == "prudent" and "linear_logprob" in func.name():
            backward = "backward" in func.name()
            hidden, weight, target, *rest = args[3:] if backward else args
            sizes = target.numel(), hidden.shape[-1], weight.shape[0], hidden.dtype
            keep, frozen = (rest[8], not rest[10]) if backward else (rest[4], False)
            size = logprob_workspace(*sizes, backward, "gpu", frozen, keep == DERIVATIVE)
            scratch = torch.empty(size, dtype=torch.uint8)
        result = func(*args, **(kwargs or {}))
        del scratch
        return result


_READS: dict[Any, Any] = {
    Tensor.item: 1.0, Tensor.__float__: 1.0, Tensor.__int__: 1, Tensor.__index__: 1, Tensor.__bool__: True,
}  # fmt: skip


class _NoReading(TorchFunctionMode):
    """Return 1 whenever the loop reads a fake tensor's value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and isinstance(args[0], FakeTensor):
            return _READS[func]
        return func(*args, **(kwargs or {}))


def _ones(shape: Any) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1


def _tolist(tensor: FakeTensor) -> Any:  # FakeTensor's own bypasses _NoReading
    return _ones(tensor.shape)


def fake_module(module: nn.Module) -> dict[int, Any]:
    """Replace a module's meta tensors by fake ones on the CPU; call under a FakeTensorMode.

    Returns the id of each tensor -> its fake.
    """
    fakes: dict[int, Any] = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    parameter = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                store[name] = fakes[id(tensor)]
    return fakes


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function`, which needs its tensors' values, on real tensors, and return fake ones of the same shapes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            real = function(*args, **kwargs)
        return pytree.tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), real)

    return call


class Traced(NamedTuple):
    """peaks: phase -> category of MemTracker -> bytes at the phase's peak, `Total` among them."""

    peaks: dict[str, dict[str, int]]


def trace(
    config: PPOConfig,
    model_config: Any,
    dtype: torch.dtype,
    prompt_tokens: int,
    heads: int | None,
    progress: bool = True,
    features: str | Sequence[str] = "last",
) -> Traced:
    """Trace a step of the loop on a model of `model_config`'s shape: full-length prompts and responses, static cache.

    Every sample is drawn; one micro-batch is scored, and one minibatch of two micro-batches is trained on, because the
    others would take the same memory. Decoding stops after 16 tokens: the cache has its full size from the first.

    Args:
        config: its `update.micro_tokens` is a number.
        dtype: of the trunk's weights.
        heads: K of a reward on the trunk's hidden states; None: no such reward.
        features: what these heads read; see `engine.taps`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    settings = config.model_copy(update={"attn": "sdpa", "packed": False})
    taps = parse_taps(features, layers_of(model_config))
    reward = None
    if heads:
        head = EnsembleHead(features_size(taps, model_config.hidden_size), heads)
        reward = RewardOnTrunk(head, taps=None if features == "last" else [str(tap) for tap in taps])
    policy = Policy(settings, model, device="meta", reward=reward)
    policy.device = _CPU
    with (
        warnings.catch_warnings(),
        FakeTensorMode(allow_non_fake_inputs=True),
        _NoReading(),
        mock.patch.object(FakeTensor, "tolist", _tolist),
        mock.patch(f"{batch.__package__}.score.token_batch", _with_values(batch.token_batch)),
        mock.patch(f"{batch.__package__}.score.response_mask", _with_values(batch.response_mask)),
        mock.patch(f"{batch.__package__}.update.token_batch", _with_values(batch.token_batch)),
        mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None),
    ):
        warnings.simplefilter("ignore")
        parts = {part: {n: id(p) for n, p in named.items()} for part, named in policy.trained.items()}
        fakes = fake_module(policy)
        policy.trained = {part: {n: fakes[key] for n, key in named.items()} for part, named in parts.items()}
        return Traced(_Loop(policy, settings, prompt_tokens, progress).run())


class _Loop:
    """Run the three phases and measure the peak of each."""

    def __init__(self, policy: Any, config: PPOConfig, prompt_tokens: int, progress: bool) -> None:
        self.policy, self.config, self.progress = policy, config, progress
        rollout = config.rollout
        self.rows = rollout.prompts_per_step * rollout.samples_per_prompt
        self.prompt, self.response = [1] * prompt_tokens, [1] * rollout.max_new_tokens
        self.micro_rows = max(1, config.micro_tokens // (prompt_tokens + rollout.max_new_tokens))

    def samples(self, rows: int) -> Samples:
        return Samples([self.prompt] * rows, [self.response] * rows, [False] * rows, [0] * rows)

    def run(self) -> dict[str, dict[str, int]]:
        optimizer = open_optimizer(self.policy, self.config)
        tracker = Tracker()
        tracker.track_external(self.policy)
        peaks = {}
        with tracker, _Scratch():  # type: ignore[no-untyped-call]
            # the update first, because the optimizer's moments exist from the first step on
            for phase, work in (("update", self.update), ("rollout", self.rollout), ("scoring", self.scoring)):
                if self.progress:
                    print(f"verify: {phase} ...", file=sys.stderr, flush=True)
                if phase == "update":
                    work(optimizer)  # makes the moments
                tracker.restart()
                work(optimizer)
                peaks[phase] = tracker.peak()
        return peaks

    def rollout(self, optimizer: Any) -> None:
        rollout = self.config.rollout
        sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p)
        sampler = Static(Rule(sampling, rollout.min_new_tokens, {0}))
        with self.policy.sampling() as model:
            for rows in _batches(self.rows, rollout.batch_rows)[:1]:
                uniform = torch.empty(rows, rollout.max_new_tokens)
                prompts = [[*self.prompt[:-1], i // rollout.samples_per_prompt] for i in range(rows)]
                sampler(model, prompts, uniform)

    def scoring(self, optimizer: Any) -> Scored:
        rows = min(self.rows, self.micro_rows)
        reward = None if self.policy.reward_kind else _NoReward()
        return score(self.policy, reward, self.samples(rows), self.config, closing=[0])

    def update(self, optimizer: Any) -> None:
        rows = min(self.rows, 2 * self.micro_rows)
        experience = self.experience(rows)
        self.policy.train()
        gradient = MinibatchGradient(self.policy, experience, self.config, self.config.kl.coef)
        minibatch_step(gradient, optimizer, list(range(rows)), Tally(1), mock.Mock())
        optimizer.zero_grad(set_to_none=True)
        self.policy.eval()

    def experience(self, rows: int) -> Experience:
        shape = (rows, len(self.response))
        table = {name: torch.zeros(shape) for name in ("logprob", "ref_logprob", "entropy", "advantage")}
        critic = None if self.policy.value_head is None else torch.zeros(shape)
        mask, numbers = torch.ones(shape, dtype=torch.bool), torch.zeros(rows)
        return Experience(
            samples=self.samples(rows),
            mask=mask,
            value=critic,
            reward=numbers,
            score=numbers,
            returns=critic,
            dropped=torch.zeros(rows, dtype=torch.bool),
            kl=numbers,
            **table,
        )


class _NoReward:
    """A reward from outside the policy, which takes none of the policy's memory."""

    name = "none"
    num_heads: int | None = None

    def __call__(self, samples: Samples, seed: int | None = None) -> Any:
        return Rewards(torch.zeros(len(samples.responses)))


def _batches(rows: int, size: int) -> list[int]:
    return [min(size, rows - start) for start in range(0, rows, size)]
