"""A PPO run that is killed, or meets a full disk or NaN: it reaches the same numbers, or says why not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file

from prudent.rlhf.job.config import load_config
from prudent.rlhf.job.log import read_metrics
from prudent.rlhf.ppo import checkpoint, loop, run, update
from prudent.rlhf.ppo.checkpoint import Checkpoints
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.policy.policy import Policy
from prudent.rlhf.ppo.watch import report
from prudent.rlhf.ppo.watch.monitor import Monitor, read_texts

PROMPTS = "the food\na hotel\nmy day\nthe train\nyour film\nthe soup\nthe room\nvery good people\n"
REWARDS = """
import math

def judge(prompts, responses):
    return [text.count("good") + 0.1 * len(text.split()) for text in responses]

def sometimes(prompts, responses):
    return [math.nan if i == 1 else math.inf if i == 2 else 1.0 * len(text) for i, text in enumerate(responses)]

def never(prompts, responses):
    return [math.nan] * len(responses)
"""


def _config(tiny: Path, tmp_path: Path, *sets: str, **given: Any) -> PPOConfig:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    (tmp_path / "rewards.py").write_text(REWARDS)
    small = ["steps=6", "save_every=2", "sample_every=2", "rollout.prompts_per_step=4", "rollout.max_new_tokens=8"]
    given = {"reward.source": f"{tmp_path / 'rewards.py'}:judge", "output": str(tmp_path / "run"), **given}
    return load_config(
        PPOConfig, None, [*small, *sets], model=str(tiny), prompts=str(tmp_path / "prompts.txt"), **given
    )


# a process that is killed from inside, at a named point


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at(point: str) -> None:
    """Arrange for SIGKILL at `point`: WHERE:NUMBER, the number being the step, or which call of it."""
    where, _, text = point.partition(":")
    number, calls = int(text or 0), []

    def before(function: Callable[..., Any], due: Callable[..., bool]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if due(*args):
                _kill()
            return function(*args, **kwargs)

        return wrapper

    if where == "rollout":
        loop.draw = before(loop.draw, lambda *args: args[5] == number)  # type: ignore[attr-defined]
    elif where == "update":  # between two of the update's own optimizer steps
        update.minibatch_step = before(update.minibatch_step, lambda *args: len(calls) == number)  # type: ignore[attr-defined]
    elif where == "logged":  # the line is written, what follows from it is not
        Monitor.state = before(Monitor.state, lambda *args: len(calls) == number)  # type: ignore[method-assign]
    elif where == "checkpoint":  # the tensors are written, the rest is not
        checkpoint.atomic_write_json = before(checkpoint.atomic_write_json, lambda *args: len(calls) == number)  # type: ignore[attr-defined]
    elif where == "prune":
        checkpoint.shutil.rmtree = before(checkpoint.shutil.rmtree, lambda path, **_: path.name.endswith(".old"))  # type: ignore[attr-defined]
    elif where == "end":  # all is there but ppo.json
        run.atomic_write_json = before(run.atomic_write_json, lambda *args: True)  # type: ignore[attr-defined]


def _serve() -> None:
    """Fork for every line of standard input, [config, point, resume], and answer with the exit code.

    A process that has computed nothing yet can be forked safely, and spares each child the seconds of its imports.
    """
    for name in ("peft", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama", "matplotlib.pyplot"):
        import_module(name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        config, point, resume = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                _kill_at(point)
                loop.run_ppo(PPOConfig.model_validate_json(config), resume=resume, progress=False)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Runs(Protocol):
    """Runs `config` in a process of its own, killed at `point` if there is one; its exit code."""

    def __call__(self, config: PPOConfig, point: str = "", resume: bool = False) -> int: ...


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """One server for all runs of this file."""
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    asked, answered = server.stdin, server.stdout

    def call(config: PPOConfig, point: str = "", resume: bool = False) -> int:
        asked.write(json.dumps([config.model_dump_json(), point, resume]) + "\n")
        asked.flush()
        return int(answered.readline())

    yield call
    asked.close()
    server.wait(60)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the machine's own numbers."""
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith(("time/", "memory/"))} for row in rows]


def _killed_again_and_again(runs: Runs, config: PPOConfig, tmp_path: Path, points: list[str]) -> None:
    whole = config.model_copy(update={"output": tmp_path / "whole"})
    assert runs(whole) == 0
    broken = config.model_copy(update={"output": tmp_path / "broken"})
    for i, point in enumerate(points):
        assert runs(broken, point, resume=i > 0) == -signal.SIGKILL, point
        assert not (broken.output / "ppo.json").exists()
    assert runs(broken, resume=True) == 0
    assert len(_metrics(whole.output)) == config.steps
    assert _metrics(broken.output) == _metrics(whole.output)  # bit for bit
    assert read_texts(broken.output) == read_texts(whole.output)
    for file in sorted((whole.output / "policy").glob("**/*.safetensors")):
        ours, theirs = load_file(file), load_file(broken.output / "policy" / file.relative_to(whole.output / "policy"))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert Checkpoints(broken.output / "checkpoints").steps() == Checkpoints(whole.output / "checkpoints").steps()


@pytest.mark.slow
def test_killed_at_every_kind_of_moment_it_reaches_the_numbers_of_an_unbroken_run(
    runs: Runs, tiny_chat_folder: Path, tmp_path: Path
) -> None:
    config = _config(
        tiny_chat_folder,
        tmp_path,
        "policy.lora_dropout=0.1",  # whatever torch drops must be dropped again
        "kl.target=0.5",
        "kl.horizon=20",
        "update.warmup=3",
        'stop_when=["length > 2x for 3", "entropy < 0"]',
    )
    points = ["rollout:1", "update:7", "checkpoint:1", "logged:1", "update:3", "prune", "rollout:5", "end"]
    _killed_again_and_again(runs, config, tmp_path, points)


@pytest.fixture
def ensemble_folder(tiny_chat_folder: Path, tmp_path: Path) -> Path:
    """Three random heads on the tiny policy's own trunk."""
    from transformers import AutoTokenizer

    from prudent import EnsembleRewardModel

    torch.manual_seed(5)
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), dtype=torch.float32, num_heads=3)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(tmp_path / "ensemble")
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(tmp_path / "ensemble")
    return tmp_path / "ensemble"


@pytest.mark.slow
def test_killed_with_the_ensemble_on_the_shared_trunk_and_preference_data_to_compare_with(
    runs: Runs, tiny_chat_folder: Path, ensemble_folder: Path, tmp_path: Path
) -> None:
    pairs = [{"prompt": "the food was", "chosen": "very good", "rejected": "very bad"} for _ in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = _config(
        tiny_chat_folder,
        tmp_path,
        "steps=4",
        'stop_when=["disagreement > 9x for 3 then rollback"]',
        data=str(tmp_path / "pairs.jsonl"),
        **{"reward.source": str(ensemble_folder)},
    )
    _killed_again_and_again(runs, config, tmp_path, ["rollout:0", "update:6", "checkpoint:2", "logged:1"])
    rows = _metrics(tmp_path / "whole")
    assert {"reward/gap", "reward/disagreement_ratio", "reward/head_std_ratio"} <= set(rows[0])
    assert rows[0]["reward/head_std_ratio"] != 1  # of the pairs, not of step 0


# what a run counts and compares with goes on where it was


@pytest.mark.usefixtures("no_pictures")
def test_a_rule_that_was_true_before_an_interruption_counts_on(tiny_chat_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_chat_folder, tmp_path, "steps=2", 'stop_when=["length > 0 for 4"]')
    assert loop.run_ppo(config, progress=False).metrics["stopped"] is None
    more = loop.run_ppo(config.model_copy(update={"steps": 9}), resume=True, progress=False)
    assert more.metrics["stopped"].startswith("'length > 0 for 4' held from step 0 to 3")


@pytest.mark.usefixtures("no_pictures")
def test_bad_steps_before_the_interruption_count(tiny_chat_folder: Path, tmp_path: Path) -> None:
    source = {"reward.source": f"{tmp_path / 'rewards.py'}:never"}
    config = _config(tiny_chat_folder, tmp_path, "steps=2", "update.max_bad_steps=3", **source)
    with pytest.raises(ValueError, match=r"no update was made in 2 steps"):
        loop.run_ppo(config, progress=False)
    with pytest.raises(ValueError, match=r"stopped at step 2: 3 steps in a row"):
        loop.run_ppo(config.model_copy(update={"steps": 9}), resume=True, progress=False)


@pytest.mark.usefixtures("no_pictures")
def test_std_is_compared_with_the_runs_first_step_and_not_with_the_first_after_resuming(
    tiny_chat_folder: Path, ensemble_folder: Path, tmp_path: Path
) -> None:
    config = _config(tiny_chat_folder, tmp_path, "steps=2", **{"reward.source": str(ensemble_folder)})
    loop.run_ppo(config, progress=False)
    loop.run_ppo(config.model_copy(update={"steps": 4}), resume=True, progress=False)
    rows = read_metrics(config.output)
    for row in rows:
        ratio = row["reward/head_std"] / rows[0]["reward/head_std"]
        assert row["reward/head_std_ratio"] == pytest.approx(ratio, rel=1e-12)
    assert rows[2]["reward/head_std_ratio"] != 1


# what goes wrong inside


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own, and seconds of pictures."""
    monkeypatch.setattr(report, "render", lambda *args: "<!doctype html>")


@pytest.mark.usefixtures("no_pictures")
def test_a_full_disk_stops_the_run_with_a_sentence_and_it_goes_on_later(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_chat_folder, tmp_path)
    saved: list[int] = []
    write = torch.save

    def fills_up(value: Any, file: Path) -> None:
        saved.append(1)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(value, file)

    monkeypatch.setattr(checkpoint.torch, "save", fills_up)
    with pytest.raises(OSError, match=r"step 4 could not be written .*No space left.*last complete one is of step 2"):
        loop.run_ppo(config, progress=False)
    assert loop.run_ppo(config, resume=True, progress=False).metrics["steps"] == 6
    assert [row["step"] for row in read_metrics(config.output)] == list(range(6))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", ["policy", "report.html"])
def test_a_disk_that_is_full_at_the_end_is_said_with_the_path_and_the_run_finished_later(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = _config(tiny_chat_folder, tmp_path, "steps=2")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if name == "policy":
            patch.setattr(Policy, "save", full)
        else:
            patch.setattr(report, "render", lambda *_: 10**6 * "page")
            write = Path.write_text
            patch.setattr(Path, "write_text", lambda p, t, **k: full() if len(t) > 10**6 else write(p, t, **k))
        with pytest.raises(OSError, match=f"could not be written .No space left on device.*{name}"):
            loop.run_ppo(config, progress=False)
    assert not (config.output / "ppo.json").exists()
    assert loop.run_ppo(config, resume=True, progress=False).metrics["steps"] == 2
    assert not [path.name for path in config.output.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("no_pictures")
def test_a_checkpoint_whose_bytes_changed_is_not_trained_on(tiny_chat_folder: Path, tmp_path: Path) -> None:
    config = _config(tiny_chat_folder, tmp_path, "steps=4", "save_every=2")
    loop.run_ppo(config, progress=False)
    file = config.output / "checkpoints" / "step-000004" / "state.pt"
    content = bytearray(file.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 400)
    content[middle] = bytes(byte ^ 255 for byte in content[middle])
    file.write_bytes(content)
    loop.run_ppo(config.model_copy(update={"steps": 6}), resume=True, progress=False)
    unbroken = config.model_copy(update={"steps": 6, "output": tmp_path / "unbroken"})
    loop.run_ppo(unbroken, progress=False)
    assert _metrics(config.output) == _metrics(unbroken.output)


@pytest.mark.usefixtures("no_pictures")
def test_samples_without_a_finite_reward_are_dropped_and_counted(tiny_chat_folder: Path, tmp_path: Path) -> None:
    config = _config(
        tiny_chat_folder,
        tmp_path,
        "steps=2",
        "update.estimator=rloo",
        "rollout.samples_per_prompt=4",
        "rollout.prompts_per_step=1",
        **{"reward.source": f"{tmp_path / 'rewards.py'}:sometimes"},
    )
    result = loop.run_ppo(config, progress=False)
    assert (result.metrics["dropped"], result.metrics["skipped"]) == (4, 0)
    assert "4 samples without a finite reward left out." in str(result)
    for row in read_metrics(config.output):
        assert row["samples/dropped"] == 2
        assert row["update/skipped"] == 0
        assert row["policy/grad_norm"] > 0  # the two that are left still learn from each other
        assert row["reward/mean"] is not None


def test_a_reward_that_is_never_finite_stops_the_run_and_moves_nothing(tiny_chat_folder: Path, tmp_path: Path) -> None:
    config = _config(
        tiny_chat_folder,
        tmp_path,
        "save_every=1",
        "update.max_bad_steps=3",
        **{"reward.source": f"{tmp_path / 'rewards.py'}:never"},
    )
    said = r"stopped at step 2: 3 steps in a row .*: no response had a finite reward from .*:never.*step-000002"
    with pytest.raises(ValueError, match=said):
        loop.run_ppo(config, progress=False)
    kept = Checkpoints(config.output / "checkpoints")
    first, second = (saved.policy for step in kept.steps() if (saved := kept.load(step)))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert read_metrics(config.output)[-1]["reward/mean"] is None


@pytest.mark.usefixtures("no_pictures")
def test_losses_that_are_not_finite_are_skipped_counted_and_forgiven(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = update.policy_loss

    def sometimes_nan(*args: Any) -> Any:
        calls.append(1)
        loss, clipped = real(*args)
        return (loss * float("nan"), clipped) if len(calls) == 2 else (loss, clipped)

    monkeypatch.setattr(update, "policy_loss", sometimes_nan)
    config = _config(tiny_chat_folder, tmp_path, "steps=3", "update.max_bad_steps=2")
    loop.run_ppo(config, progress=False)
    assert [row["update/skipped"] for row in read_metrics(config.output)] == [1, 0, 0]


if __name__ == "__main__":
    _serve()
