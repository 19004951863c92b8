"""Compute the bytes that a decoder layer saves for its backward pass, and needs while it runs; see `budget`."""

from __future__ import annotations

from typing import Any


class Layer:
    """A layer of a `ModelShape` in a `JobShape`: D features, F in the feed-forward layer, A = heads * head_dim of the
    queries, G of the keys; b bytes per number of the trunk."""

    def __init__(self, shape: Any, job: Any) -> None:
        self.layers: int = shape.layers
        self.d: int = shape.hidden
        self.f: int = shape.intermediate
        self.heads: int = shape.heads
        self.a: int = shape.heads * shape.head_dim
        self.g: int = shape.kv_heads * shape.head_dim
        self.b: int = job.dtype.itemsize
        self.adapted, self.head_norms = shape.adapted, shape.head_norms
        self.job = job
        self.lora: bool = job.mode == "lora"
        sizes = [self.b * i * o for i, o in shape.adapted] if job.mixed else [0]
        self.casts, self.cast = sum(sizes), max(sizes)  # bytes of autocast's copies: of all, and of the largest

    def token(self, length: int) -> int:
        """Bytes that autograd saves for one token in one layer, in sequences of `length`."""
        b, d, f, job = self.b, self.d, self.f, self.job
        keys = self.a if job.masked or job.eager else self.g
        attention = b * (2 * self.a + 2 * keys) + 4 * self.heads
        if job.eager:  # weights in fp32 and in the trunk's dtype
            attention += self.heads * length * (4 + b)
        elif job.masked:
            attention += b * length
        norms = 2 * (4 * d + 4)
        if not self.lora:  # the norm's weight needs its normalised input
            norms += 2 * (4 if job.mixed else b) * d
        if self.head_norms:
            norms += (4 + (0 if self.lora else b)) * (self.a + self.g)
        feed_forward = 3 * b * f
        if job.mixed:  # autocast makes a copy for each product
            inputs: int = b * (5 * d + f)
        elif self.lora and job.dropout:
            inputs = sum((b + 1) * i for i, _ in self.adapted)
        else:
            inputs = b * (2 * d + f)
        middle: int = b * job.rank * len(self.adapted) if self.lora else 0
        return attention + norms + feed_forward + inputs + middle

    def saved(self, tokens: int, length: int) -> int:
        """Bytes that all layers save in a pass of `tokens`; only their inputs if checkpointed. With LoRA the first norm
        saves nothing, because its input needs no gradient; the final norm saves as much instead."""
        final = 0 if self.lora else tokens * (4 + self.b) * self.d
        if self.job.checkpointing:
            return self.layers * tokens * (4 if self.job.mixed else self.b) * self.d + final
        return self.layers * (tokens * self.token(length) + self.casts) + final

    def last_norm(self, tokens: int) -> int:
        """Bytes of the final norm's backward pass beside all saved tensors: its output, and gradients in fp32."""
        return tokens * self.d * (24 if self.b < 4 else 28)

    def backward(self, tokens: int, length: int) -> int:
        """Bytes of the last layer's backward pass; its saved tensors count only if checkpointing recomputed them."""
        inside = tokens * self.b * (2 * self.f + (3 if self.b < 4 else 2) * self.d)
        return inside + (tokens * self.token(length) + self.casts if self.job.checkpointing else 0)

    def forward(self, tokens: int) -> int:
        """Peak bytes of a pass without gradient, in the feed-forward layer: gate, up and their product, LoRA's share of
        one of them; the residual stream, the norm's fp32 copy and its output."""
        wide = (4 if self.lora else 3) * self.b * self.f
        narrow = 12 if self.job.mixed else 9 if self.b < 4 else 17
        return tokens * (wide + self.d * narrow) + self.cast
