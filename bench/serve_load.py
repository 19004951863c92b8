"""Load `prudent serve` with many clients, check every reply against the direct score, and try to break it.

    python -m prudent.bench.serve_load [--clients 1 16 128 512] [--requests 2000] [--out FILE]
    python -m prudent.bench.serve_load --faults [--out FILE]
    python -m prudent.bench.serve_load --passes
    python -m prudent.bench.serve_load --model runs/reward/model

Each client keeps one connection and asks for one text a request, as trainers do; the load and the server are two
processes on this machine and share its cores. Requests per second, the server's CPU time, p50 and p99 are of

    serve          `prudent serve` with its default token budget and wait
    one a request  the same server with a budget of one token and no wait: one forward pass a request

Every reply is compared with `Scorer.score` of all texts in one call: the table shows the largest difference, and how
many replies are lost or wrong (further than --tolerance from their own score).

--faults runs instead: more requests than the queue takes; clients that send half a request; clients that leave; random
and broken JSON (schemathesis, if it is installed, on the OpenAPI page); kill -9 and a restart while clients wait. After
each, the server must answer right. --passes prints, without a server, the CPU time of a text when 8 random ones are
scored together in forward passes of so many tokens. The model is a random Llama unless --model names another; the texts
are random.
`--out FILE` writes FILE.json and FILE.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..engine import EnsembleRewardModel
from ..rlhf.models.loading import load_reward
from .machine import cpu_name, revision
from .serve_client import load
from .serve_faults import run_faults
from .serve_process import Process, Texts, serving

MODES = {"serve": [], "one a request": ["--set", "batch_tokens=1", "--set", "wait_ms=0"]}
_COLUMNS = "server|clients|requests/s|CPU a request, ms|p50, ms|p99, ms|items a batch|lost|wrong|largest difference"
_HOLDS = {True: "yes", False: "NO", None: "not run"}
HEADER = "# `prudent serve` under load\n\nMade by `python -m prudent.bench.serve_load{flags}`; see its docstring.\n"


def make_model(folder: Path) -> None:
    """Save a random Llama (4 layers, width 128) with 5 heads and a tokeniser of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["</s>", *alphabet])}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder / "trunk")
    model = EnsembleRewardModel.from_trunk(str(folder / "trunk"), num_heads=5)
    torch.nn.init.normal_(model.score.weight, std=0.3)  # fresh heads give nearly the same reward to every text
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>").save_pretrained(folder)


def measure(server: Process, texts: Texts, clients: int, requests: int, tolerance: float) -> dict[str, Any]:
    """Requests a second, quantiles in seconds, and how the replies compare with the direct scores."""
    asyncio.run(load(server.port, texts.body, clients, min(requests, clients)))  # warm
    batches, items = server.metric("batch_items_count"), server.metric("items_total")
    began, cpu = time.perf_counter(), server.cpu_seconds
    replies = asyncio.run(load(server.port, texts.body, clients, requests))
    wall, cpu = time.perf_counter() - began, server.cpu_seconds - cpu
    differences = [texts.difference(index, reply) for index, reply in enumerate(replies)]
    seconds = [reply.seconds for reply in replies]
    cuts = statistics.quantiles(seconds, n=100)
    passes = server.metric("batch_items_count") - batches
    return {
        "clients": clients, "requests": requests, "rate": requests / wall, "cpu": cpu / requests,
        "p50": cuts[49], "p99": cuts[98],
        "items_a_batch": (server.metric("items_total") - items) / passes,
        "lost": sum(reply.status != 200 for reply in replies),
        "wrong": sum(tolerance < difference < float("inf") for difference in differences),
        "largest_difference": max((d for d in differences if d < float("inf")), default=float("inf")),
    }  # fmt: skip


def run_load(model: str, texts: Texts, given: argparse.Namespace) -> dict[str, Any]:
    """Every number of clients, the modes in turns, so that both see the same machine."""
    rows: dict[str, Any] = {}
    with ExitStack() as stack:
        room = ["--set", f"max_queue={10 * max(given.clients)}"]
        servers = {mode: stack.enter_context(serving(model, [*flags, *room])) for mode, flags in MODES.items()}
        for clients in given.clients:
            for mode, server in servers.items():
                rows[f"{mode}, {clients}"] = measure(server, texts, clients, given.requests, given.tolerance)
                print(mode, rows[f"{mode}, {clients}"], flush=True)
    return rows


def run_passes(model: str, texts: Sequence[str]) -> None:
    """Print the CPU time of a text in batches of 8, by the tokens of a forward pass."""
    reward = load_reward("model", model)
    for tokens in (1, 256, 512, 1024, 4096):
        scorer, seconds = reward.scorer(tokens), []
        read = [scorer.read(text) for text in texts]
        for _ in range(3):
            began = time.process_time()
            for start in range(0, len(read), 8):
                scorer.heads(read[start : start + 8])
            seconds.append(time.process_time() - began)
        print(f"passes of {tokens} tokens: {min(seconds) / len(read) * 1e3:.2f} ms of CPU a text", flush=True)


def table(record: dict[str, Any]) -> str:
    """The record as markdown."""
    where = f"{record['machine']}, {record['cores']} cores shared with other work, commit {record['commit']}."
    lines = [where, f"Model: {record['model']}.", ""]
    if record["load"]:
        lines += [f"| {_COLUMNS.replace('|', ' | ')} |", "|---" * (_COLUMNS.count("|") + 1) + "|"]
    for name, row in record["load"].items():
        cells = [name.rpartition(", ")[0], row["clients"], f"{row['rate']:.0f}", f"{row['cpu'] * 1e3:.1f}"]
        cells += [f"{row[quantile] * 1e3:.1f}" for quantile in ("p50", "p99")] + [f"{row['items_a_batch']:.1f}"]
        cells += [row["lost"], row["wrong"], f"{row['largest_difference']:.1e}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if record["faults"]:
        lines += ["| fault | what happened | holds |", "|---|---|---|"]
        lines += [f"| {f['name']} | {f['found']} | {_HOLDS[f['holds']]} |" for f in record["faults"]]
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 if a reply was wrong or lost, or a fault broke the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="reward model's folder (default: a random Llama of 4 layers, width 128)")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 16, 128, 512])
    parser.add_argument("--requests", type=int, default=2000, help="for each number of clients (default %(default)s)")
    parser.add_argument("--texts", type=int, default=1000, help="different texts (default %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a reward (default %(default)s)")
    parser.add_argument("--faults", action="store_true", help="try to break the server instead of timing it")
    parser.add_argument("--passes", action="store_true", help="time forward passes of several sizes, without a server")
    parser.add_argument("--out", type=Path, help="FILE: writes FILE.json and FILE.md")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        if given.model is None:
            make_model(Path(temporary))
        model = given.model or temporary
        texts = Texts(load_reward("model", model).scorer(), given.texts)
        if given.passes:
            run_passes(model, texts.texts)
            return 0
        record: dict[str, Any] = {"machine": cpu_name(), "cores": os.cpu_count()}
        record |= {"commit": revision()[0], "model": given.model or "a random Llama of 4 layers, width 128, 5 heads"}
        if given.faults:
            record |= {"load": {}, "faults": run_faults(model, texts, given.tolerance)}
        else:
            record |= {"load": run_load(model, texts, given), "faults": []}
    print(table(record))
    if given.out:
        flags = " --faults" if given.faults else ""
        given.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        given.out.with_suffix(".md").write_text(HEADER.format(flags=flags) + "\n" + table(record))
    broken = any(row["lost"] or row["wrong"] for row in record["load"].values())
    return int(broken or any(fault["holds"] is False for fault in record["faults"]))


if __name__ == "__main__":
    sys.exit(main())
