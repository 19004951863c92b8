"""Compute the memory of rollout, scoring and update from a model's shape and a job's sizes.

A phase's sum is over the tensors that the loop keeps alive at the phase's peak, derived from what autograd saves for
each operation of a transformers decoder layer. `prudent plan --verify` checks the sums against the loop itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from ...kernels.linear_logprob.configs import plan as logprob_plan
from .budget_layer import Layer

Terms = dict[str, int]
PHASES = ("rollout", "scoring", "update")
TERMS = (
    "parameters", "adapters", "gradients", "optimizer", "KV cache", "activations", "logprob workspace",
    "allocator slack",
)  # fmt: skip
# reserves, not measured: the CUDA context with the libraries' workspaces, and the fragmented share of memory that the
# caching allocator cannot reuse
CONTEXT = 1 << 30
FRAGMENTS = 0.05
_LEAST = 10**6  # bytes: the smallest size that is accepted
_WORTH = 0.01  # share of the peak that a change must save to be listed


def parse_size(text: str | int) -> int:
    """Return the bytes of a number or a text such as 80GB (10^9), 80GiB (2^30), 512MB, 1.5TB. Cards are sold in GB and
    hold a little more.

    Raises:
        ValueError: for anything else, and for less than 1 MB, such as a bare 80, which was meant in another unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?\s*", str(text), re.IGNORECASE)
    if not found or (found[3] and not found[2]):
        raise ValueError(f"expected a size as 80GB (10^9), 80GiB (2^30) or a whole number of bytes, got {text!r}")
    size = float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " ")
    if size < _LEAST:
        meant = f": did you mean {found[1]}GB?" if size >= 1 and not found[2] else ""
        raise ValueError(f"expected a size of 1MB or more, got {text!r}{meant}")
    return int(size)


def logprob_workspace(
    rows: int,
    dim: int,
    vocabulary: int,
    dtype: torch.dtype,
    backward: bool,
    device: str = "gpu",
    frozen: bool = False,
    derivative: bool = False,
) -> int:
    """Scratch bytes of `linear_logprob` on `rows` hidden states; device "gpu" or "cpu"; see Memory in
    kernels/linear_logprob/README.md. Beyond it a forward that computes the derivative returns that, [rows, dim].

    backward: the slopes of some tiles, and the hidden gradient of a chunk of rows, beside the forward's tile of logits
    and the rows' vectors. frozen: the head is. derivative: the forward computes d logprob / d hidden, and the backward
    only scales it. On a CPU the exponentials take a second tile, and fp32 sums of 16-bit operands two more.
    """
    narrow = derivative or (backward and frozen)
    tile = logprob_plan(rows, dim, vocabulary, dtype, torch.float32, device, narrow)
    chunk, wide = min(tile.rows, rows), dtype == torch.float32
    sums, vectors = 4 * chunk * dim, 100 * rows
    if derivative and backward:
        return sums + vectors
    logits = chunk * min(tile.columns, vocabulary)
    tiles = 1 if device == "gpu" else 2 if wide else 4
    size = 4 * logits * tiles + vectors
    if derivative:  # powers, their products with the weight, the targets' rows of the weight and these in fp32
        return size + dtype.itemsize * logits + 2 * sums + (0 if wide else dtype.itemsize * chunk * dim)
    slopes = dtype.itemsize * chunk * min(tile.columns * tile.tiles, vocabulary)
    return size + (slopes + (0 if wide else sums) if backward else 0)


class ModelShape(NamedTuple):
    """The sizes of a decoder that decide its memory.

    parameters: all, the embeddings' included. adapted: (inputs, outputs) of each linear layer of one block,
    which LoRA adapts. head_norms: whether queries and keys are normalised, as in Qwen 3.
    """

    name: str
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    adapted: tuple[tuple[int, int], ...]
    head_norms: bool = False
    tied: bool = False

    @classmethod
    def of(cls, config: Any, name: str = "") -> ModelShape:
        """The shape of a transformers config of a causal language model, its parameters counted without weights.

        Raises:
            ValueError: for a model without hidden layers and attention heads, which this arithmetic needs.
        """
        from transformers import AutoModelForCausalLM

        config = config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        heads = getattr(config, "num_attention_heads", None)
        if not heads or not getattr(config, "num_hidden_layers", None):
            raise ValueError(f"model: expected a decoder with attention heads, got {config.model_type}")
        linears = [
            (n, m) for n, m in model.base_model.named_modules() if isinstance(m, torch.nn.Linear) or _is_conv1d(m)
        ]
        first = [(n, m) for n, m in linears if re.search(r"(^|\.)0(\.|$)", n)]
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        return cls(
            name=name or str(getattr(config, "name_or_path", "") or config.model_type),
            parameters=sum(p.numel() for p in model.parameters()),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=inner or 4 * config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=model.get_output_embeddings().weight.shape[0],
            adapted=tuple(tuple(m.weight.shape) if _is_conv1d(m) else tuple(m.weight.shape[::-1]) for _, m in first),
            head_norms=any("q_norm" in n for n, _ in model.named_modules()),
            tied=model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        )

    def lora_parameters(self, rank: int) -> int:
        """Parameters of one LoRA on every linear layer but the language-model head."""
        return self.layers * sum(rank * (i + o) for i, o in self.adapted)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values at one byte per number."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def _is_conv1d(module: Any) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's linear layer, [inputs, outputs]


@dataclass(frozen=True)
class JobShape:
    """The sizes of one step of the loop. Tokens are those of the longest prompt and the longest response.

    dtype: of the trunk. mixed: fp32 weights under bf16 autocast (mode full on a GPU). reward: None if it is not on this
    trunk; reward_bytes then counts its own model. taps: states that its heads read; captured: how many inner layers'
    states are kept for them. masked: the attention gets a mask, and with it keys and values of
    every head (packed without flash-attn, or a family that does more than mask causally). device: "gpu" or "cpu".
    """

    prompts: int = 64
    samples: int = 1
    prompt_tokens: int = 512
    response_tokens: int = 512
    batch_rows: int = 256
    mode: Literal["lora", "full"] = "lora"
    rank: int = 16
    dropout: bool = False
    critic: Literal["none", "shared", "adapter"] = "shared"
    reward: Literal["shared", "adapter"] | None = "shared"
    heads: int = 5
    reward_bytes: int = 0
    taps: int = 1
    captured: int = 0
    checkpointing: bool = False
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    dtype: torch.dtype = torch.bfloat16
    mixed: bool = False
    masked: bool = False
    eager: bool = False
    truncated_sampling: bool = False
    shared_prefix: bool = False
    device: Literal["gpu", "cpu"] = "gpu"

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.response_tokens

    @property
    def rows(self) -> int:
        """Samples that are drawn in one batch."""
        return min(self.batch_rows, self.prompts * self.samples)


class Budget(NamedTuple):
    """terms: phase -> term of `TERMS` -> bytes at the phase's highest point. limit: bytes of the card."""

    shape: ModelShape
    job: JobShape
    micro_tokens: int
    terms: dict[str, Terms]

    def total(self, phase: str) -> int:
        """Bytes of a phase, allocator slack included."""
        return sum(self.terms[phase].values())

    def tensors(self, phase: str) -> int:
        """Bytes of a phase's tensors alone: what a tracker of allocations sees."""
        return self.total(phase) - self.terms[phase]["allocator slack"]

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(self.total(phase) for phase in self.terms)


def plan(shape: ModelShape, job: JobShape, micro_tokens: int) -> Budget:
    """Every phase's terms with forward passes of `micro_tokens` tokens, or of one sample if that is longer."""
    layer = Layer(shape, job)
    fixed = _resident(shape, job)
    phases = {
        "rollout": _rollout(shape, job, layer),
        "scoring": _scoring(shape, job, layer, micro_tokens),
        "update": _update(shape, job, layer, micro_tokens),
    }
    terms = {}
    for phase, own in phases.items():
        found = {name: fixed.get(name, 0) + own.get(name, 0) for name in TERMS}
        moving = sum(own.values())
        if job.device == "gpu":
            found["allocator slack"] = CONTEXT + int(FRAGMENTS * moving)
        terms[phase] = found
    return Budget(shape, job, micro_tokens, terms)


def micro_tokens(shape: ModelShape, job: JobShape, limit: int) -> int:
    """The most tokens in one forward and backward pass with which every phase stays within `limit` bytes.

    They are whole samples of the greatest length, at most all of a step's; 0 if not even one fits.
    """
    low, high = 0, job.prompts * job.samples
    while low < high:
        middle = (low + high + 1) // 2
        if plan(shape, job, middle * job.tokens).peak <= limit:
            low = middle
        else:
            high = middle - 1
    return low * job.tokens


class Cut(NamedTuple):
    """A change of the job that helps: the setting to make, and the bytes that it takes off the peak."""

    setting: str
    saves: int
    fits: bool


def cuts(shape: ModelShape, job: JobShape, limit: int) -> list[Cut]:
    """Settings that lower the peak at one sample a forward pass, the most effective first.

    Those that save less than 1 % are left out.
    """
    options = [
        ("policy.gradient_checkpointing=true", replace(job, checkpointing=True)),
        ("policy.mode=lora", replace(job, mode="lora", mixed=False)),
        ("dtype=bfloat16", replace(job, dtype=torch.bfloat16, mixed=False)),
        ("update.optimizer=adamw_8bit", replace(job, optimizer="adamw_8bit")),
        (f"rollout.batch_rows={max(1, job.rows // 4)}", replace(job, batch_rows=max(1, job.rows // 4))),
        (f"rollout.max_new_tokens={job.response_tokens // 2}", replace(job, response_tokens=job.response_tokens // 2)),
        ("policy.critic=shared", replace(job, critic="shared" if job.critic == "adapter" else job.critic)),
    ]
    before = plan(shape, job, job.tokens).peak
    found = []
    for setting, changed in options:
        after = plan(shape, changed, changed.tokens).peak
        if changed != job and before - after >= _WORTH * before:
            found.append(Cut(setting, before - after, after <= limit))
    return sorted(found, key=lambda cut: -cut.saves)


def _trained(shape: ModelShape, job: JobShape) -> tuple[int, int]:
    """(number, bytes) of the trained parameters."""
    lora = shape.lora_parameters(job.rank) * (1 + (job.critic == "adapter"))
    head = shape.hidden + 1 if job.critic != "none" else 0
    if job.mode == "lora":
        return lora + head, 4 * (lora + head)
    extra = (shape.lora_parameters(job.rank) if job.critic == "adapter" else 0) + head
    width = 4 if job.mixed else job.dtype.itemsize
    return shape.parameters + extra, width * shape.parameters + 4 * extra


def _resident(shape: ModelShape, job: JobShape) -> Terms:
    """Bytes allocated in every phase; the optimizer's moments count, though the first step makes them."""
    numbers, size = _trained(shape, job)
    trunk = shape.parameters * job.dtype.itemsize
    heads = 4 * 2 * job.heads * (job.taps * shape.hidden + 1) if job.reward else 0
    reward_lora = 4 * shape.lora_parameters(job.rank) if job.reward == "adapter" else 0
    # a copy of each LoRA weight in the trunk's dtype, made by the first rollout and kept for the CUDA graph
    copies = job.dtype.itemsize * shape.lora_parameters(job.rank) if job.dtype.itemsize < 4 else 0
    if job.mode == "full":
        whole = (4 if job.mixed else job.dtype.itemsize) * shape.parameters
        parameters, adapters = whole + trunk, size - whole
    else:
        parameters, adapters = trunk, size + copies
    moments = {"adamw": 2 * size, "adamw_8bit": 2 * numbers, "paged_adamw_8bit": 0}[job.optimizer]
    return {"parameters": parameters + job.reward_bytes, "adapters": adapters + heads + reward_lora,
            "optimizer": moments}  # fmt: skip


def _rollout(shape: ModelShape, job: JobShape, layer: Layer) -> Terms:
    """The larger of two peaks: reading the prompts, and drawing a token with a full cache."""
    rows, prompts = job.rows, max(1, job.rows // job.samples)
    width = 4 if job.shared_prefix else job.dtype.itemsize
    read = prompts * job.prompt_tokens
    if job.shared_prefix:
        cache = width * shape.kv_bytes * (read + rows * job.response_tokens)
    else:
        length = -(-(job.tokens + 1) // 16) * 16
        cache = width * shape.kv_bytes * rows * length
    prompt_cache = job.dtype.itemsize * shape.kv_bytes * read
    # with mixed precision, sampling uses copies of the weights in bf16
    copies = job.dtype.itemsize * shape.parameters if job.mixed else 0
    layer = Layer(shape, replace(job, mixed=False))
    reading = layer.forward(read)
    # logits in the trunk's dtype, then fp32 logits, probabilities and their sum; the sorted ids too if truncated
    drawing = rows * shape.vocabulary * (job.dtype.itemsize + 4 * 3 + (12 if job.truncated_sampling else 0))
    drawing = max(drawing, layer.forward(rows))
    # while the cache is copied to its full length, one layer of the prompts' cache remains
    if prompt_cache + reading > cache + drawing:
        return {"parameters": copies, "KV cache": prompt_cache, "activations": reading}
    return {"parameters": copies, "KV cache": cache, "activations": drawing}


def _micro(job: JobShape, micro_tokens: int, extra: int) -> tuple[int, int]:
    """(tokens, response tokens) of the largest micro-batch: sequences of full length, each `extra` off its tokens."""
    length = job.tokens + extra
    rows = min(job.prompts * job.samples, max(1, micro_tokens // length))
    return rows * length, rows * job.response_tokens


def _scoring(shape: ModelShape, job: JobShape, layer: Layer, micro_tokens: int) -> Terms:
    tokens, responses = _micro(job, micro_tokens, 1 if job.reward else -1)
    width = job.dtype.itemsize
    workspace = logprob_workspace(responses, shape.hidden, shape.vocabulary, job.dtype, False, job.device)
    after = width * shape.hidden * (tokens + responses)
    if job.mixed:  # the head in bf16
        after += width * shape.vocabulary * shape.hidden
    forward = layer.forward(tokens) + job.captured * width * shape.hidden * tokens
    # the peak is inside the trunk, or at the head with the hidden states of both roles
    if forward >= after + workspace:
        return {"activations": forward}
    return {"activations": after, "logprob workspace": workspace}


def _update(shape: ModelShape, job: JobShape, layer: Layer, micro_tokens: int) -> Terms:
    tokens, responses = _micro(job, micro_tokens, -1)
    width, hidden = job.dtype.itemsize, shape.hidden
    frozen = job.mode == "lora"  # then the forward keeps the derivative of logprob by hidden
    sizes = responses, hidden, shape.vocabulary, job.dtype
    workspace = logprob_workspace(*sizes, True, job.device, frozen, frozen)
    saved = layer.saved(tokens, job.tokens)
    gradients = _trained(shape, job)[1]
    # rows taken from the final hidden states, for the head and for the critic, and its fp32 copy; then their gradients
    rows = responses * hidden * (width + (width * (width < 4) + 4 if job.critic == "shared" else 0))
    head = tokens * hidden * width + rows + 2 * responses * hidden * width
    if frozen:
        forward = logprob_workspace(*sizes, False, job.device, derivative=True)
        head += responses * hidden * width
        workspace = max(workspace, forward - 2 * responses * hidden * width)  # before the rows' gradients
    norm, inside, bottom = layer.last_norm(tokens), layer.backward(tokens, job.tokens), 0
    if job.mode == "full":  # the head's gradient of this micro-batch, beside the sum of earlier ones
        table = shape.vocabulary * hidden
        gradient = (4 if job.mixed else width) * table
        # mixed: in bf16, beside the head in bf16 and the workspace; then in fp32 too
        head += max(2 * width * table, width * table + gradient - workspace) if job.mixed else gradient
        if shape.tied:  # it is kept for the sum with the embedding's, computed after all saved tensors are freed
            norm, inside, bottom = norm + gradient, inside + gradient, 3 * gradient - saved
    top = max(head + workspace, norm, inside, bottom)
    terms = {"gradients": gradients, "activations": saved + top}
    if top == head + workspace:
        terms = {"gradients": gradients, "activations": saved + head, "logprob workspace": workspace}
    return terms
