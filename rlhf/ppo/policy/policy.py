"""One trunk in four roles, in memory once: actor, reference, critic and reward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ....engine import EnsembleHead
from ....engine.config import position_offset
from ....engine.eval_mode import evaluating
from ....engine.likelihood import LanguageHead, response_logprob
from ....engine.logits import checked_head
from ....engine.taps import Tap, capturing, features_size, num_layers, parse_taps, read_taps, reads_logprob
from ....kernels import linear_logprob
from ....kernels.linear_logprob.contract import LogprobOutput
from ...job.log import say_once
from ...models.causal_lm import SHARING_MODELS
from ..batch import TokenBatch
from ..config import PPOConfig
from .adapters import Adapters
from .attention import FLASH, resolve
from .precision import cast, in_dtype, is_mixed
from .probe import why_not_packed

Role = Literal["actor", "critic", "reference", "reward"]


class RewardOnTrunk(NamedTuple):
    """A reward that reads the policy's own trunk.

    adapter: the folder of its LoRA; None: it reads the frozen trunk. taps: what the heads read; None: the trunk's
    output at the last token. skips: ids that the tap logprob leaves out. See `EnsembleRewardConfig`.
    """

    head: EnsembleHead
    adapter: Path | None = None
    taps: list[str] | None = None
    skips: Sequence[int] = ()


class Policy(nn.Module):
    """A causal language model with its LoRAs, value head and reward heads.

    role       mode lora                             mode full
    actor      the trunk with LoRA "actor"           the model itself
    reference  the trunk, LoRAs off                  a frozen copy of the model as it came
    critic     shared: value head on the actor's hidden states; adapter: on those of the reference's trunk with LoRA
               "critic"
    reward     shared: heads on the reference's hidden states; adapter: on those of the reference's trunk with LoRA
               "reward"

    LoRAs and heads are fp32, whatever the trunk; LoRAs are multiplied in the trunk's dtype, heads in fp32. Dropout of
    the trunk is off, because it would change the probability ratios between two forward passes. Between calls, LoRA
    "actor" is active.

    Args:
        config: see `PPOConfig`; `config.model` is only a name here, nothing is loaded.
        model: a causal language model of transformers; changed in place.
        device: of all parts.
        reward: heads that read this trunk; None if rewards come from elsewhere.

    Attributes:
        model: the causal language model that samplers call.
        attention: transformers' name of the attention in use.         packed: whether batches are to be packed
        reward_kind: "shared", "adapter" or None.                      reward_head: EnsembleHead or None
        reward_taps: what the reward's heads read.
        value_head: nn.Linear(D, 1), starting as `policy.critic_init` says, or None.
        logit_rule: scale and softcap of the logits.                   hidden_size, vocab_size, device, dtype

    Raises:
        ValueError: for a model whose logits `linear_logprob` cannot compute, heads of another width, an attention or
            packing that is not available.
    """

    def __init__(
        self, config: PPOConfig, model: Any, *, device: torch.device | str, reward: RewardOnTrunk | None = None
    ) -> None:
        super().__init__()
        self.config, self.device = config, torch.device(device)
        model = model.to(self.device)
        full = config.policy.mode == "full"
        self._autocast = is_mixed(config, model.dtype, self.device)
        self.dtype: torch.dtype = torch.bfloat16 if self._autocast else model.dtype  # of the hidden states
        self.vocab_size, self.hidden_size = model.get_output_embeddings().weight.shape
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        # a purely causal model never attends to right padding, and SDPA is faster without a mask
        self._causal = model.config.model_type in SHARING_MODELS
        with in_dtype(model, self.dtype):
            self.logit_rule = checked_head(model).rule
            self.attention, self.packed = self._choose_attention(model)
        _disable_dropout(model)
        model.requires_grad_(full)
        self.model = model
        self.frozen: Any = cast(copy.deepcopy(model), self.dtype).requires_grad_(False) if full else None
        self._adapters = Adapters(self.frozen if full else model, config.model)
        self.trained: dict[str, dict[str, nn.Parameter]] = {}
        self._add_parts(reward)
        if config.policy.gradient_checkpointing:
            for module in (model, *([self.frozen] if full and config.critic == "adapter" else [])):
                self._checkpoint(module)
        self.eval()

    def _choose_attention(self, model: Any) -> tuple[str, bool]:
        chosen = resolve(self.config.attn, self.dtype, self.device)
        try:
            model.set_attn_implementation(chosen.name)
        except (ImportError, ValueError) as error:
            if self.config.attn != "auto":
                raise ValueError(f"attn: expected one that {type(model).__name__} has, got {error}") from error
            say_once(f"attention: {model.config._attn_implementation} ({chosen.name} is not available: {error})")
        name: str = model.config._attn_implementation
        wanted = chosen.packed and name == chosen.name if self.config.packed is None else self.config.packed
        reason = why_not_packed(model, self._takes_positions) if wanted else None
        if reason is not None and self.config.packed:
            raise ValueError(f"packed: expected false, because {reason}, got true")
        if reason is not None:
            say_once(f"packing: off ({reason})")
        return name, wanted and reason is None

    def _add_parts(self, reward: RewardOnTrunk | None) -> None:
        config, width = self.config, self.hidden_size
        lora = config.policy.mode == "lora"
        if lora:
            self._adapters.add("actor", config.policy)
        if config.critic == "adapter":
            self._adapters.add("critic", config.policy)
        self.reward_kind: Literal["shared", "adapter"] | None = None
        self.reward_head: EnsembleHead | None = None
        self.reward_taps: tuple[Tap, ...] | None = None
        self.reward_skips = () if reward is None else reward.skips
        if reward is not None:
            self.reward_taps = parse_taps(reward.taps, num_layers(self.model)) if reward.taps else None
            wanted = features_size(self.reward_taps, width) if self.reward_taps else width
            if reward.head.hidden_size != wanted:
                raise ValueError(
                    f"reward.source: expected heads on hidden states of width {wanted}, got {reward.head.hidden_size}"
                )
            self.reward_kind = "shared" if reward.adapter is None else "adapter"
            self.reward_head = reward.head.to(self.device).requires_grad_(False)
            if reward.adapter is not None:
                self._adapters.load("reward", reward.adapter)
        self.value_head: nn.Linear | None = None
        if config.critic != "none":
            self.value_head = nn.Linear(width, 1, device=self.device, dtype=torch.float32)
            self._start_critic(self.value_head)
        self.trained["actor"] = self._adapters.parameters("actor") if lora else dict(self.model.named_parameters())
        if config.critic == "adapter":
            self.trained["critic"] = self._adapters.parameters("critic")
        if self.value_head is not None:
            self.trained["value_head"] = dict(self.value_head.named_parameters())
        for part in self.trained.values():
            for parameter in part.values():
                parameter.requires_grad_(True)
        self._adapters.use("actor" if lora else None)

    @torch.no_grad()
    def _start_critic(self, value_head: nn.Linear) -> None:
        """Set the value head to zero, or to the mean of the reward's heads (BRME 1.7: the critic starts as the reward).

        The critic's states are the reference's before the first update, in which heads of kind shared read. Values then
        have the unit of the calibrated means: value = mean_k (w_k x + b_k - shift_k) / scale_k. But heads are trained
        at the last token of a whole text, and may be far from the return at an earlier one: compare the first steps'
        value/explained_variance.
        """
        value_head.weight.zero_()
        value_head.bias.zero_()
        if self.config.policy.critic_init == "zero":
            return
        head = self.reward_head
        if head is None or self.reward_kind != "shared":
            raise ValueError(
                "policy.critic_init: expected zero without reward heads on the policy's own hidden states (reward.kind "
                "shared), got reward"
            )
        if self.reward_taps is not None:
            raise ValueError(
                "policy.critic_init: expected zero with a reward that reads other states than the critic, which are "
                f"{', '.join(map(str, self.reward_taps))}, got reward"
            )
        count = head.num_heads
        weight, bias = head.weight[:count], head.bias[:count]
        value_head.weight.copy_((weight / head.scale[:, None]).mean(dim=0))
        value_head.bias.copy_(((bias - head.shift) / head.scale).mean())

    def _checkpoint(self, model: Any) -> None:
        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            # the backward pass recomputes the layer, and another LoRA may be active then
            return nullcontext(), self._adapters.using(self._adapters.active)

        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        options = {"use_reentrant": False, "preserve_rng_state": self.config.policy.lora_dropout > 0}
        enable({**options, "context_fn": contexts})

    def _part(self, role: Role) -> tuple[Any, str | None]:
        """The causal language model and the LoRA of a role."""
        lora = self.config.policy.mode == "lora"
        adapter = {"actor": "actor" if lora else None, "reference": None, "critic": "critic", "reward": "reward"}[role]
        if role == "reward" and self.reward_kind != "adapter":
            adapter = None
        if role == "critic" and self.config.critic != "adapter":
            return self._part("actor")
        return (self.model if lora or role == "actor" else self.frozen), adapter

    def hidden(self, batch: TokenBatch, role: Role) -> Tensor:
        """One forward pass of the trunk -> [B * T, D] hidden states after the final norm, in `dtype`.

        A shared critic reads the actor's states and a shared reward the reference's, so one call serves both roles.
        """
        model, adapter = self._part(role)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False, "return_dict": True}
        if batch.attention_mask is not None and not self._causal:
            inputs["attention_mask"] = batch.attention_mask
        if self._takes_positions:
            inputs["position_ids"] = batch.position_ids + position_offset(model.config)
        if batch.attention_mask is None and self.attention == FLASH and self._causal:
            inputs |= _boundaries(batch)
        # without autocast's cache, which would keep the casts of all weights to the end, though each is used once
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast, cache_enabled=False)
        with autocast, self._adapters.using(adapter):
            hidden: Tensor = model.base_model(**inputs).last_hidden_state
        return hidden.flatten(0, 1).to(self.dtype)

    def read(self, batch: TokenBatch, role: Literal["reference", "reward"]) -> tuple[Tensor, Tensor]:
        """`hidden`, and of the same pass what the reward's heads read of each sequence: [B, F] in `dtype`."""
        if self.reward_taps is None:
            hidden = self.hidden(batch, role)
            return hidden, hidden.index_select(0, batch.last)
        with capturing(self._part(role)[0].base_model, [tap.layer for tap in self.reward_taps]) as states:
            hidden = self.hidden(batch, role)
        output = hidden.view(*batch.input_ids.shape, -1)
        response, logprob = batch.response(), None
        if reads_logprob(self.reward_taps):
            head = LanguageHead(self._head_weight(role), self.logit_rule, self.reward_skips)
            logprob = response_logprob(head, output, batch.input_ids, response, batch.position_ids)
        return hidden, read_taps(self.reward_taps, states, output, batch.last, response, logprob)

    def _head_weight(self, role: Role) -> Tensor:
        """[V, D]; in mode lora all roles have the same."""
        weight: Tensor = self._part(role)[0].get_output_embeddings().weight
        return weight

    def logprobs(
        self, hidden: Tensor, batch: TokenBatch, temperature: float, role: Literal["actor", "reference"] = "actor"
    ) -> LogprobOutput:
        """Log-probabilities of the batch's targets [R] at `temperature`, entropies and log-sum-exps; fp32, in nats.

        Args:
            hidden: [B * T, D] from `hidden`; the R rows are taken before the product with the head.
            role: whose head; in mode lora there is one.
        """
        return linear_logprob(
            hidden.index_select(0, batch.rows),
            self._head_weight(role).to(self.dtype),
            batch.targets,
            temperature=temperature / self.logit_rule.scale,
            softcap=self.logit_rule.softcap,
            ignore_index=None,
            # a frozen head's derivative of logprob is kept, which an entropy bonus cannot use
            keep_bytes=0 if self.config.update.entropy_coef > 0 else None,
        )

    def values(self, hidden_rows: Tensor) -> Tensor:
        """[R, D] hidden states of the critic's role -> [R] fp32 values, before the token that each predicts."""
        if self.value_head is None:
            raise ValueError("policy.critic: expected shared or adapter, got none")
        with torch.autocast(hidden_rows.device.type, enabled=False):
            values: Tensor = self.value_head(hidden_rows.float())[:, 0]
        return values

    def parameter_groups(self, config: PPOConfig) -> list[dict[str, Any]]:
        """[{name, params, lr}] for an optimizer: actor, critic (a LoRA), value_head."""
        update, full = config.update, config.policy.mode == "full"
        rates = {"actor": update.lr or (1e-6 if full else 1e-4), "critic": update.lr or 1e-4}
        rates["value_head"] = update.value_lr or 10 * (
            rates["critic"] if config.critic == "adapter" else rates["actor"]
        )
        return [{"name": n, "params": list(p.values()), "lr": rates[n]} for n, p in self.trained.items()]

    def trainable_state(self) -> dict[str, Tensor]:
        """The trained parameters themselves, detached, by part and name."""
        return {f"{part}/{name}": p.detach() for part, named in self.trained.items() for name, p in named.items()}

    @torch.no_grad()
    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Restore a `trainable_state`.

        Raises:
            ValueError: for other names or shapes; nothing is changed then.
        """
        own = self.trainable_state()
        for name in sorted(own.keys() ^ state.keys()):
            raise ValueError(
                f"trainable state: expected this policy's {len(own)} tensors, got {len(state)}: {name} is in only one"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"trainable state: {name}: expected {list(tensor.shape)}, got {list(state[name].shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    @contextmanager
    def sampling(self) -> Iterator[Any]:
        """Give `model` to a sampler: as the actor, in eval mode, without gradient, its weights and LoRA in `dtype`."""
        narrow: AbstractContextManager[Any] = in_dtype(self.model, self.dtype)
        if self.config.policy.mode == "lora":
            narrow = self._adapters.in_dtype("actor", self.dtype)
        with evaluating(self.model), narrow:
            yield self.model

    def save(self, folder: Path | str) -> None:
        """Save the trained policy: a LoRA in peft's format, or the whole model with `save_pretrained`;
        value_head.safetensors; and in critic/ the critic's LoRA if it has one."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.policy.mode == "lora":
            self._adapters.save("actor", folder)
        else:
            self.model.save_pretrained(folder)
        if "critic" in self.trained:
            (folder / "critic").mkdir(exist_ok=True)
            self._adapters.save("critic", folder / "critic")
        if self.value_head is not None:
            state = {name: tensor.cpu().contiguous() for name, tensor in self.value_head.state_dict().items()}
            save_file(state, folder / "value_head.safetensors")


def _boundaries(batch: TokenBatch) -> dict[str, Any]:
    """The boundaries of packed sequences; without them flash-attn waits for the GPU in every layer to find them."""
    ends = torch.cat([batch.last.new_zeros(1), batch.last + 1]).int()
    longest = int(batch.position_ids.max()) + 1
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, in dropout modules and in attributes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
