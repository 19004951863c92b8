"""The card of a saved reward model says what its numbers mean, what they protect from, and how it was made."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from prudent.engine import EnsembleRewardConfig
from prudent.rlhf.job.config import load_config
from prudent.rlhf.report.card import is_untouched
from prudent.rlhf.reward.calibrate import CalibrateConfig, run_calibrate
from prudent.rlhf.reward.card import CALIBRATED, LOGITS, Facts, Region, distance_section, reward_card, reward_section
from prudent.rlhf.reward.train import TrainConfig, run_train

from ..sentiment import write_pairs

TRUNK = LlamaConfig(hidden_size=8, num_hidden_layers=6, num_attention_heads=2, intermediate_size=8, vocab_size=9)
HEADINGS = ["Reward", "What a reward's size means", "std", "Distance", "How it was made", "Held-out numbers", "Licence"]


def saved(**given: Any) -> EnsembleRewardConfig:
    return EnsembleRewardConfig(text_config=TRUNK, trust_directions=3, **given)


def card(base: str = "org/model", data: tuple[str, ...] = (), **given: Any) -> str:
    return reward_card(Facts(base, saved(**given), CALIBRATED, Region(40, 4), "made", "numbers", data))


def metadata(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def section(text: str, heading: str) -> str:
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0].partition("<!--")[0].strip()


def test_the_metadata_names_what_is_on_a_hub_and_leaves_the_licence_out(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = metadata(card(data=("org/pairs:train", "pairs.jsonl", "org/pairs.jsonl")))
    assert (found["library_name"], found["base_model"], found["datasets"]) == ("prudent", "org/model", ["org/pairs"])
    assert "license" not in found
    Path("org/model").mkdir(parents=True)
    assert "base_model" not in metadata(card())
    assert "base_model" not in metadata(card(base="/models/mine"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tradeoff:0.4", "0.4 times the mean of the head with the least std plus 0.6 times the lowest head."),
        ("tradeoff:0.4,nominal=head:2", "0.4 times the mean of head 2 plus"),
        ("lcb:2", "the mean of the heads less 2 times their standard deviation."),
        ("cvar:0.4", "the mean of the lowest 40 % of the heads"),
        ("trust:1", "the mean of the heads, less a price: 1 times the reward's usual spread within a prompt times "),
        ("min,trust=3,from=1,power=1", "the lowest head, less a price: 3 times the reward's usual spread within a "),
    ],
)
def test_the_aggregation_is_said_in_words(spec: str, words: str) -> None:
    text = reward_section(saved(aggregation=spec))
    assert text.startswith(f"Aggregation `{spec}`: the reward is {words}")


def test_the_prices_form_is_said_in_words() -> None:
    assert "times the square of the distance." in reward_section(saved(aggregation="trust:1"))
    hinge = reward_section(saved(aggregation="trust:3,from=1,power=1"))
    assert "times what the distance exceeds 1 by." in hinge


@pytest.mark.parametrize(
    ("taps", "heads", "distance"),
    [
        (None, "the last layer's state at the last token", "a mean over the response (`features=wide`) shows foreign"),
        ("wide", "hidden state 6 at the last token and the mean over the response's tokens of hidden state 4", "alone"),
        (["mean:4"], "the mean over the response's tokens of hidden state 4", "the same as the heads."),
        (
            ["last:6", "mean:4", "logprob"],
            "hidden state 6 at the last token, the mean over the response's tokens of hidden state 4, and the mean and "
            "the least log-probability of",
            "all but the states at the last token.",
        ),
    ],
)
def test_the_features_of_the_heads_and_of_the_distance_are_named(taps: Any, heads: str, distance: str) -> None:
    config = saved(taps=taps)
    assert f"- The heads read {heads}" in reward_section(config)
    assert distance in distance_section(config, Region(40, 4)).partition("**It reads**")[2].partition("\n")[0]


@pytest.mark.parametrize(("taps", "shows"), [(["mean:1"], False), (["mean:1", "logprob"], True)])
def test_shuffled_words_show_where_the_distance_reads_how_likely_a_response_is(taps: Any, shows: bool) -> None:
    said = distance_section(saved(taps=taps), Region(40, 4))
    assert ("such as repeated phrases, shuffled words, code" in said) is shows
    assert ("Shuffled words hardly show." in said) is not shows


def test_one_heads_std_means_nothing_and_a_model_without_a_region_has_no_distance() -> None:
    assert "means nothing" in section(card(num_heads=1, aggregation="mean"), "std")
    assert "eq. 8" in section(card(), "std")
    without = distance_section(saved(), None)
    assert without.startswith("None")
    assert "prudent calibrate" in without


def test_the_distance_says_what_it_was_fitted_to_and_whether_the_reward_pays_for_it() -> None:
    taught = distance_section(saved(), Region(40, 4))
    assert "the 40 responses to 4 prompts of the training pairs, not to those of the policy" in taught
    assert "**The reward** does not pay for it" in taught
    refitted = distance_section(saved(aggregation="trust:1"), Region(1, 1, "prudent calibrate --model a"))
    assert "1 response to 1 prompt, by\n\n      prudent calibrate --model a\n" in refitted
    assert "**The reward** pays for it." in refitted


@pytest.fixture(scope="module")
def config(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run: 54 pairs of 9 prompts trained on, 18 of 3 prompts held out."""
    folder = tmp_path_factory.mktemp("cards")
    data = write_pairs(folder / "pairs.jsonl", ("very", "not"))
    sets = ["mode=head", "eval_fraction=0.25", "brme.epochs=2", "brme.num_heads=3"]
    given = load_config(
        TrainConfig, None, sets, model=str(tiny_chat_folder), data=str(data), output=folder / "run", seed=1
    )
    run_train(given, progress=False)
    return given


def read(config: TrainConfig, name: str) -> str:
    return (config.output / name / "README.md").read_text(encoding="utf-8")


def test_train_writes_a_card_into_every_model_that_it_saves(config: TrainConfig) -> None:
    for name in ("stage1", "model"):
        text = read(config, name)
        assert is_untouched(text)
        assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == HEADINGS
    assert LOGITS in section(read(config, "stage1"), "What a reward's size means")
    assert CALIBRATED in section(read(config, "model"), "What a reward's size means")
    assert "the 108 responses to 9 prompts of the training pairs" in section(read(config, "model"), "Distance")


def test_the_card_has_the_command_the_data_and_the_held_out_numbers_of_the_run(config: TrainConfig) -> None:
    metrics = json.loads((config.output / "train.json").read_text())
    made, numbers = (section(read(config, "model"), heading) for heading in ("How it was made", "Held-out numbers"))
    command = made.partition("    prudent train")[2].partition("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[words.index("--output") + 1] == str(config.output)
    assert "brme.num_heads=3" in words
    assert "54 pairs trained on, 18 pairs of 3 prompts held out" in made
    assert json.loads((config.output / "data.json").read_text())["fingerprint"] in made
    for name, row in metrics["accuracy"].items():
        assert f"| {name} | {100 * row['value']:.1f} | {100 * row['low']:.1f} to {100 * row['high']:.1f} |" in numbers
    stage1 = section(read(config, "stage1"), "Held-out numbers")
    assert "has the least log-loss on held-out prompts" in stage1
    assert "nominal" not in stage1
    assert "tradeoff" not in stage1


def test_the_same_run_writes_the_same_card(config: TrainConfig, tmp_path: Path) -> None:
    again = config.model_copy(update={"output": tmp_path / "run"})
    run_train(again, progress=False)
    for name in ("stage1", "model"):
        ours, theirs = (section(read(one, name), "Held-out numbers") for one in (config, again))
        assert ours == theirs
        without = read(again, name).replace(str(again.output), str(config.output)).rpartition("<!--")[0]
        assert without == read(config, name).rpartition("<!--")[0]


def calibrated(config: TrainConfig, output: Path, **given: Any) -> str:
    options = {"model": str(config.output / "model"), "data": config.data, "output": output, **given}
    run_calibrate(CalibrateConfig(**options), progress=False)
    return (output / "README.md").read_text(encoding="utf-8")


def test_calibrate_updates_what_the_card_says_of_the_distance_and_the_aggregation(config, tmp_path) -> None:
    before, after = read(config, "model"), calibrated(config, tmp_path / "new", aggregation="trust:1")
    assert is_untouched(after)
    assert after.count("--aggregation trust:1") == 1
    assert "144 responses to 12 prompts, by" in section(after, "Distance")
    assert "Aggregation `trust:1`" in section(after, "Reward")
    for heading in set(HEADINGS) - {"Distance", "Reward"}:
        assert section(after, heading) == section(before, heading)


def test_calibrate_says_on_which_responses_a_new_scale_was_measured(config: TrainConfig, tmp_path: Path) -> None:
    after = calibrated(config, tmp_path / "new", scale_data=config.data)
    assert "on 144 responses to 12 prompts of" in section(after, "What a reward's size means")


def test_a_card_that_was_edited_stays_and_a_warning_says_so(config, tmp_path, caplog) -> None:
    first = tmp_path / "first"
    edited = calibrated(config, first).replace("---\n", "---\nlicense: mit\n", 1)
    (first / "README.md").write_text(edited, encoding="utf-8")
    caplog.clear()
    calibrated(config, first, model=str(first))
    assert (first / "README.md").read_text(encoding="utf-8") == edited
    assert "README.md was not written by prudent or was edited, and stays as it is" in caplog.text


def test_calibrate_gives_a_model_without_a_card_one_that_says_what_is_not_known(config, tmp_path) -> None:
    calibrated(config, tmp_path / "first")
    (tmp_path / "first" / "README.md").unlink()
    text = calibrated(config, tmp_path / "second", model=str(tmp_path / "first"))
    assert is_untouched(text)
    for heading in ("How it was made", "Held-out numbers"):
        assert "Not known to `prudent calibrate`" in section(text, heading)


def run_of(tiny: Path, folder: Path, *sets: str) -> TrainConfig:
    data = write_pairs(folder / "pairs.jsonl", ("very",))
    given = load_config(TrainConfig, None, [*sets], model=str(tiny), data=str(data), output=folder / "run")
    run_train(given, progress=False)
    return given


def test_an_adapters_card_says_how_it_is_used_and_is_calibrated_with_the_model(tiny_chat_folder, tmp_path) -> None:
    config = run_of(tiny_chat_folder, tmp_path, "mode=lora", "stage=bt", "trunk.max_steps=1", "eval_fraction=0")
    text = read(config, "adapter")
    assert metadata(text)["library_name"] == "peft"
    assert "prudent ppo --reward FOLDER" in text
    assert "a LoRA of the language model was trained" in section(text, "How it was made")
    assert section(text, "Held-out numbers") == "None: no pairs were held out (`eval_fraction`)."
    assert section(read(config, "stage1"), "Distance").startswith("None: the model has no trust region.")
    run_calibrate(CalibrateConfig(model=str(config.output / "model"), data=config.data), progress=False)
    for name in ("model", "adapter"):
        assert is_untouched(read(config, name))
        assert "72 responses to 6 prompts, by" in section(read(config, name), "Distance")


def test_the_cards_before_and_after_pet_say_which_is_which(tiny_chat_folder, tmp_path) -> None:
    sets = ("mode=head", "stage=pet", "pet.start=brme", "pet.samples=4", "pet.max_new_tokens=3", "pet.epochs=1")
    config = run_of(tiny_chat_folder, tmp_path, *sets, "brme.num_heads=3", "brme.epochs=1", "eval_fraction=0.34")
    before, after = read(config, "start"), read(config, "model")
    made = section(after, "How it was made")
    assert "PET (arXiv 2505.20556), which lowers the reward of the best of 4 samples" in made
    assert "PET" not in section(before, "How it was made").partition("- **Stages**")[2]
    assert "before PET" in section(after, "What a reward's size means")
    assert "after PET" in section(after, "Held-out numbers")
    assert "after PET" not in section(before, "Held-out numbers")
