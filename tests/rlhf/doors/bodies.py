"""Bodies as clients send them, recorded from their sources, for a policy with the template of `tiny_chat_folder`.

The texts of `prompts` and `query` are what the policy's tokeniser writes: template and special tokens included.
"""

from __future__ import annotations

from typing import Any

PROMPT = "<|user|> my day <|end|><|assistant|> "
COMPLETE, TRUNCATED = "good food <|end|>", "bad hotel"

# OpenRLHF 0.11.2, openrlhf/utils/agent.py, SingleTurnAgentExecutor._fetch_rewards_via_http: one rollout a request
OPENRLHF: dict[str, Any] = {"query": [PROMPT + COMPLETE], "prompts": [PROMPT], "labels": [None]}
OPENRLHF_TRUNCATED: dict[str, Any] = {"query": [PROMPT + TRUNCATED], "prompts": [PROMPT], "labels": ["42"]}
OPENRLHF_MESSAGES: dict[str, Any] = {
    "query": [PROMPT + COMPLETE],
    "prompts": [PROMPT],
    "labels": [[{"role": "user", "content": "my day"}]],
}
# ... and what its second server gets, when there are more servers than queries
OPENRLHF_EMPTY: dict[str, Any] = {"query": [], "prompts": [], "labels": []}

# slime, slime/rollout/rm_hub/__init__.py, remote_rm
SLIME: dict[str, Any] = {"prompt": PROMPT, "response": COMPLETE, "label": None}
SLIME_MESSAGES: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "my day"}],
    "response": "good food",
    "label": "42",
}

# LLaMA-Factory, src/llamafactory/train/ppo/ppo_utils.py, get_rewards_from_server
LLAMA_FACTORY: dict[str, Any] = {"model": "model", "messages": [PROMPT + COMPLETE, PROMPT + TRUNCATED]}

# NeMo-Gym, nemo_gym/base_resources_server.py, BaseVerifyRequest: OpenAI's create params and response
NEMO_GYM: dict[str, Any] = {
    "responses_create_params": {
        "input": [{"role": "user", "content": "my day", "type": "message"}],
        "temperature": 1.0,
    },
    "response": {
        "id": "resp_1",
        "created_at": 1,
        "model": "policy",
        "object": "response",
        "output": [
            {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": "be nice"}]},
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "good food", "annotations": []}],
            },
        ],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    },
}

# verl 0.9.1, verl/experimental/reward_loop/reward_loop.py, compute_score_disrm: its vLLM and its SGLang form
VERL_VLLM: dict[str, Any] = {"model": "runs/reward/model", "input": PROMPT + COMPLETE, "use_activation": False}
VERL_SGLANG: dict[str, Any] = {"model": "runs/reward/model", "input": PROMPT + COMPLETE}
