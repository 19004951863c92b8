"""Score the cases of a file in a process that has no prudent: torch, transformers and numpy alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

assert "prudent" not in sys.modules
sys.modules["prudent"] = None  # from here on, `import prudent` raises


def batch_of(rows, padding, left):
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros_like(ids)
    for place, row in zip(zip(ids, mask, strict=True), rows, strict=True):
        span = slice(longest - len(row), None) if left else slice(0, len(row))
        place[0][span], place[1][span] = torch.tensor(row), 1
    return ids, mask


def client_of(folder):
    spec = importlib.util.spec_from_file_location("client", folder / "prudent_client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def scored(case):
    folder, rows = Path(case["folder"]), case["rows"]
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=case["form"] == "remote-code", output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = {
        "dtype": str(next(model.parameters()).dtype),
        "kind": type(model).__name__,
        "config": model.config.to_dict(),
    }
    if case["chat"]:
        result["chat"] = tokenizer.apply_chat_template(case["chat"], tokenize=False)
    result["text"] = tokenizer(case["text"], truncation=True)["input_ids"]
    for side in case["sides"]:
        # of the remote code, whose mask says what is padding, any id may pad
        padding = 7 if case["form"] == "remote-code" else tokenizer.pad_token_id
        ids, mask = batch_of(rows, padding, side == "left")
        options = {}
        if case["starts"] is not None:
            options["response_start"] = torch.tensor(case["starts"])
        hidden = case["form"] == "stock" and model.base_model_prefix != "bert"
        output = model(ids, attention_mask=mask, output_hidden_states=hidden, **options)
        if case["form"] == "stock":
            features = None
            if hidden:
                features = output.hidden_states[-1][torch.arange(len(rows)), mask.sum(1) - 1].float()
            found = client_of(folder).finish(folder, output.logits.float(), features)
        elif case["form"] == "linear":
            found = {"reward": output.logits[:, 0].float() + case["constant"]}
        else:
            found = {"reward": output.logits[:, 0], **{name: output[name] for name in ("mean", "std", "distance")}}
        result[side] = {name: None if value is None else value.tolist() for name, value in found.items()}
    return result


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([scored(case) for case in cases], default=str))
