"""How to load an exported folder in five places, as Markdown; a test runs the Python that it shows."""

from __future__ import annotations

import textwrap

from ...engine.export import Prepared
from ...engine.model import EnsembleRewardModel

_TEXTS = """\
texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, add_special_tokens=False)"""
_CHATS = """\
chats = [[{"role": "user", "content": "How was it?"}, {"role": "assistant", "content": "Lovely."}]]
"""
_PLAIN = """\
texts = ["How was it? Lovely."{}]  # prompt and response
batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)"""
_BEGIN = """

def begin(text, prompt, **options):  # where the response begins among the tokens that are left of `text`
    whole, opened = (tokenizer(t, **options)["input_ids"] for t in (text, prompt))
    shared = next((i for i, (a, b) in enumerate(zip(whole[:-1], opened)) if a != b), min(len(whole) - 1, len(opened)))
    lost = len(whole) - len(tokenizer(text, truncation=True, **options)["input_ids"])
    return max(shared - lost, int(whole[0] in tokenizer.all_special_ids)) if lost else shared

"""
_START = f"""{_BEGIN}
prompts = [tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True) for chat in chats]
begins = [begin(text, prompt, add_special_tokens=False) for text, prompt in zip(texts, prompts)]"""
_PLAIN_START = f"""{_BEGIN}
begins = [begin(text, prompt) for text, prompt in zip(texts, ["How was it?"])]  # the prompts alone"""
_CALLS = {
    "linear": "print(model(**batch).logits[:, 0]{})",
    "remote-code": """\
outputs = model(**batch{})
print(outputs.logits[:, 0], outputs.std, outputs.distance)""",
}


_FINISH = """\
scores = finish(folder, model(**batch).logits.float())
print(scores["reward"], scores["std"])"""
_FINISH_WITH_DISTANCE = """\
outputs = model(**batch, output_hidden_states=True)
last = batch["attention_mask"].sum(1) - 1
features = outputs.hidden_states[-1][torch.arange(len(last)), last].float()
scores = finish(folder, outputs.logits.float(), features)  # without features, the distance is None
print(scores["reward"], scores["std"], scores["distance"])"""


def loading_section(done: Prepared, reward: EnsembleRewardModel) -> str:
    """The section of the card: transformers, TRL, vLLM, OpenRLHF and verl, prudent.

    reward: the model that `done` was made from.
    """
    parts = [_transformers(done, reward), *(f"**{name}.** {text}" for name, text in _PLACES[done.form].items())]
    if done.form == "remote-code" and reward.config.reads_response:
        parts[1] = f"**TRL.** {_TRL_RESPONSE}"
    return "\n\n".join([*parts, f"**How a text ends.** {_end(done, reward)}"])


def _end(done: Prepared, reward: EnsembleRewardModel) -> str:
    if done.tokenizer.chat_template:
        template = "The chat template ends each turn, so that its output gets no other token"
    else:
        template = "There is no chat template, so that prompt and response are one plain text"
    if not reward.config.append_eos:
        return f"{template}. The heads were taught on plain texts without an end-of-sequence token: add none."
    return (
        f"{template}. The heads were taught on plain texts that end with `{done.tokenizer.eos_token}` if they are "
        "complete: add it, because no tokeniser or engine does. TRL's GRPO and RLOO strip it from plain texts."
    )


def _transformers(done: Prepared, reward: EnsembleRewardModel) -> str:
    chat, reads = bool(done.tokenizer.chat_template), reward.config.reads_response
    stock = done.form == "stock"
    lines = ["import sys\n"] if stock else []
    lines += [
        "import torch\nfrom transformers import AutoModelForSequenceClassification, AutoTokenizer\n",
        '\nfolder = "."\n',
    ]
    if stock:
        lines.append("sys.path.insert(0, folder)\nfrom prudent_client import finish\n\n")
    trust = ", trust_remote_code=True" * (done.form == "remote-code")
    lines.append(f"model = AutoModelForSequenceClassification.from_pretrained(folder{trust}).eval()\n")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n")
    lines.append(_CHATS + _TEXTS if chat else _PLAIN.format(" + tokenizer.eos_token" * reward.config.append_eos))
    if reads:
        lines.append((_START if chat else _PLAIN_START) + "\n")
    code = "".join(lines) + "\nwith torch.no_grad():\n" + textwrap.indent(_call(done, reward), "    ")
    return f"**transformers**, without prudent:\n\n```python\n{code}\n```"


def _call(done: Prepared, reward: EnsembleRewardModel) -> str:
    if done.form == "linear":
        return _CALLS["linear"].format(f" + {done.constant!r}" if done.constant else "")
    if done.form == "remote-code":
        return _CALLS["remote-code"].format(", response_start=torch.tensor(begins)" * reward.config.reads_response)
    known = reward.config.pooling == "last" and reward.config.skip_token_id is None  # where the features are
    return _FINISH_WITH_DISTANCE if known and reward.score.trust is not None else _FINISH


_TRL_RESPONSE = (
    "Its reward models get token ids alone, and the heads read where the response begins: give `reward_funcs` a "
    "function that passes `response_start` as above."
)
_VLLM = "`vllm serve FOLDER --runner pooling`; POST `/classify` with `input` answers"
_PLACES = {
    "stock": {
        "TRL": "It reads the first label alone, which is one head's mean: do not give it this folder as a path. Give "
        "`reward_funcs` a function that calls the model and `finish` as above.",
        "vLLM": f"{_VLLM} the 2K logits as `probs`, unchanged (`problem_type` is regression); `finish(FOLDER, "
        "[probs])` makes them a reward. A price on the distance needs the features, which this does not answer.",
        "OpenRLHF and verl": "They read one label. Export `--as linear` for them, or call vLLM and `finish` in a "
        "reward function of your own.",
        "prudent": "`prudent score --model MODEL` takes the model that this folder was made from, not this folder.",
    },
    "linear": {
        "TRL": '`GRPOTrainer(reward_funcs="FOLDER")`, or any trainer that takes the path of a reward model.',
        "vLLM": f"{_VLLM} the reward as `probs` (`problem_type` is regression, so it is no sigmoid of it).",
        "OpenRLHF and verl": "OpenRLHF: `--reward.model_name_or_path FOLDER`. verl: `reward.reward_model.enable=True "
        "reward.reward_model.model_path=FOLDER`.",
        "prudent": "`prudent score --model FOLDER`.",
    },
    "remote-code": {
        "TRL": '`GRPOTrainer(reward_funcs="FOLDER")` with `trust_remote_code=True` in its `GRPOConfig`, or the model, '
        "loaded as above, with `reward_processing_classes=tokenizer`.",
        "vLLM": "It does not run this folder's code: with prudent's plugin (`pip install prudent[vllm]`), `vllm serve "
        "FOLDER --runner pooling`.",
        "OpenRLHF and verl": "They build their own model around one linear layer: give them prudent's server or "
        "vLLM's, or export `--as linear`.",
        "prudent": "`prudent score --model FOLDER`; it does not run the file of code.",
    },
}
