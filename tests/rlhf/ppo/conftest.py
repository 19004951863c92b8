"""A policy, its prompts and samples of it, for the tests of rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prudent.rlhf.ppo.batch import Samples
from prudent.rlhf.sampling.prompts import Prompt
from prudent.rlhf.sampling.turn import Turn


@pytest.fixture(scope="module")
def policy(tiny_chat_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_chat_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_chat_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_chat_folder)


@pytest.fixture(scope="module")
def prompts(policy: Any, tokenizer: Any) -> list[Prompt]:
    turn = Turn(tokenizer, policy)
    return [Prompt(text, turn.prompt(text)) for text in ("the food was", "my day")]


@pytest.fixture(scope="module")
def samples(tokenizer: Any, prompts: list[Prompt]) -> Samples:
    """Two answers to the second prompt, the first ended; one, ended at once, to the first."""
    end = tokenizer.eos_token_id
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("good food", "bad hotel")]
    return Samples(
        [prompts[1].ids, prompts[1].ids, prompts[0].ids],
        [[*words[0], end], words[1], [end]],
        [True, False, True],
        [1, 1, 0],
    )
