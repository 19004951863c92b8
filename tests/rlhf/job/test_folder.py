"""An output folder is open to one process at a time, and to one run."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prudent.rlhf.job.config import JobConfig, load_config
from prudent.rlhf.job.folder import has_run_files, locked_folder, open_run_folder

RUN_FILES = ("metrics.jsonl", "checkpoints/step-*[1-9]*")


class _Inner(JobConfig):
    lr: float = 0.1
    rank: int = 4


class _Config(JobConfig):
    output: Path
    seed: int = 0
    inner: _Inner = _Inner()


class TestOneProcessAtATime:
    """`locked_folder` keeps a second process out and leaves no file behind."""

    @contextmanager
    def _other(self, folder: Path) -> Iterator[subprocess.Popen[str]]:
        """Another process that holds `folder`."""
        program = "import sys\nfrom pathlib import Path\nfrom prudent.rlhf.job.folder import locked_folder\n"
        program += "with locked_folder(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        other = subprocess.Popen([sys.executable, "-c", program, str(folder)], **pipes)  # type: ignore[call-overload]
        try:
            assert other.stdout.readline() == "held\n"
            yield other
        finally:
            other.communicate("")

    def test_the_second_is_refused_with_the_number_of_the_first(self, tmp_path: Path) -> None:
        with (
            self._other(tmp_path) as other,
            pytest.raises(ValueError, match=f"^output: {tmp_path} is being written by process {other.pid}$"),
            locked_folder(tmp_path),
        ):
            pytest.fail("two in one folder")
        with locked_folder(tmp_path):  # it has ended
            pass
        assert list(tmp_path.iterdir()) == []

    def test_a_killed_process_locks_nothing(self, tmp_path: Path) -> None:
        with self._other(tmp_path) as other:
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
        assert (tmp_path / ".lock.pid").read_text() == str(other.pid)  # it had no time to remove its files
        with (
            locked_folder(tmp_path),
            pytest.raises(ValueError, match=f"process {os.getpid()}$"),
            locked_folder(tmp_path),
        ):
            pytest.fail("two in one folder")

    def test_two_runs_of_one_process_exclude_each_other_until_the_first_is_over(self, tmp_path: Path) -> None:
        for _ in range(2):
            with (
                locked_folder(tmp_path),
                locked_folder(tmp_path / "sub"),  # another folder
                pytest.raises(ValueError, match=f"process {os.getpid()}"),
                locked_folder(tmp_path),
            ):
                pytest.fail("two in one folder")

    def test_an_error_inside_frees_the_folder(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="No space"), locked_folder(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        with locked_folder(tmp_path):
            pass

    def test_a_forked_child_does_not_keep_the_lock(self, tmp_path: Path) -> None:
        with locked_folder(tmp_path):
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
        try:
            with locked_folder(tmp_path):
                pass
        finally:
            child.terminate()
            child.join()

    def test_a_file_system_without_locks_protects_nothing_and_refuses_nobody(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fcntl = pytest.importorskip("fcntl")

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        with locked_folder(tmp_path), locked_folder(tmp_path):
            pass
        assert {path.name for path in tmp_path.iterdir()} <= {".lock"}

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_cannot_be_written_is_left_to_the_first_write(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with locked_folder(tmp_path):
            pass

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("...")
        with pytest.raises(ValueError, match="which is a file"), locked_folder(tmp_path / "thesis.tex"):
            pass


class TestOneRun:
    """`open_run_folder` takes a new folder or the run's own, and no other."""

    def test_a_folder_with_nothing_but_hidden_files_is_new(self, tmp_path: Path) -> None:
        for name in (".DS_Store", ".config.yaml.123.tmp"):
            (tmp_path / name).write_text("...")
        with locked_folder(tmp_path):
            assert not open_run_folder(_Config(output=tmp_path), RUN_FILES)
        assert load_config(_Config, tmp_path / "config.yaml").output == tmp_path

    def test_a_folder_with_other_files_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("...")
        with pytest.raises(ValueError, match="with other files"):
            open_run_folder(_Config(output=tmp_path), RUN_FILES)

    def test_a_run_has_started_once_it_wrote_a_run_file(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").touch()
        (tmp_path / "checkpoints" / "step-000000").mkdir(parents=True)
        assert not has_run_files(tmp_path, RUN_FILES)
        (tmp_path / "checkpoints" / "step-000010").mkdir()
        assert has_run_files(tmp_path, RUN_FILES)
        assert not has_run_files(tmp_path / "nowhere", RUN_FILES)

    def test_a_resumed_run_may_differ_in_its_resumable_changes_alone(self, tmp_path: Path) -> None:
        open_run_folder(_Config(output=tmp_path), RUN_FILES)
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        other = _Config(output=tmp_path, seed=3, inner=_Inner(lr=0.5, rank=8))
        assert open_run_folder(other, RUN_FILES, resumable_changes=("seed", "inner"))
        with pytest.raises(ValueError, match=r"another inner\.rank \(4 there, 8 here\): choose"):
            open_run_folder(other, RUN_FILES, resumable_changes=("seed", "inner.lr"))
        with pytest.raises(ValueError, match="continue it with --resume"):
            open_run_folder(_Config(output=tmp_path), RUN_FILES, resume=False)

    def test_half_written_files_of_a_killed_process_are_removed(self, tmp_path: Path) -> None:
        open_run_folder(_Config(output=tmp_path), RUN_FILES)
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        (tmp_path / ".git").mkdir()
        for name in (".policy.123.tmp", ".policy.123.old"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_bytes(b"half")
        (tmp_path / ".report.html.123.tmp").write_text("half")
        assert open_run_folder(_Config(output=tmp_path), RUN_FILES)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "config.yaml", "metrics.jsonl"]
