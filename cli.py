"""The `prudent` command: parse the arguments, call one job, print its result."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal, get_args, get_origin

from . import __version__
from .commands import BENCH_ABOUT, BENCHES, JOBS, OPTIONS, Job
from .rlhf.job.config import JobConfig, config_default, config_field, config_template, flag_name, load_config
from .rlhf.job.files import explain_os_error
from .study_commands import STUDIES, STUDY_ABOUT


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with one subcommand per job; `bench` is listed, but parses its own flags."""
    parser = argparse.ArgumentParser(
        prog="prudent", description="A reward engine for RLHF that knows when it does not know."
    )
    parser.add_argument("--version", action="version", version=f"prudent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, job in JOBS.items():
        _add_job(commands, name, job)
    study = commands.add_parser(
        "study",
        help="test claims about pessimism over many seeds",
        description=STUDY_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    studies = study.add_subparsers(dest="study", required=True, metavar="STUDY")
    for name, job in STUDIES.items():
        _add_job(studies, name, job)
    commands.add_parser(
        "bench",
        help="measure the kernels: speed, machine code, bytes",
        description=BENCH_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_job(commands: Any, name: str, job: Job) -> None:
    sub = commands.add_parser(
        name, help=job.summary, description=job.about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    config = _config_class(job)
    for key in job.flags:
        _add_flag(sub, config, key)
    sub.add_argument("--config", metavar="FILE", help="YAML file of config keys.")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Set one config key; repeatable. Flags override --set, which overrides --config.",
    )
    for option in job.options:
        sub.add_argument(f"--{option}", action="store_true", help=OPTIONS[option])
    sub.add_argument("--keys", action="store_true", help="Print every config key, explained, as a YAML file, and stop.")
    sub.add_argument("--quiet", action="store_true", help="Show no progress bars.")
    sub.epilog = (
        f"keys that people set most, with --set or --config (`{sub.prog} --keys` explains all keys):\n"
        + _explained_keys(config, job.keys)
    )


def _add_flag(sub: argparse.ArgumentParser, config: type[JobConfig], key: str) -> None:
    """Add the flag of a config key, with the key's type, default and description."""
    field, default = config_field(config, key), config_default(config, key)
    kind, repeatable = field.annotation, get_origin(field.annotation) is tuple
    text = f"{field.description}" + " Repeatable." * repeatable
    if default not in (None, "null", "false", "''", "[]"):
        text += f" Default: {default}."
    options: dict[str, Any] = {"dest": key, "default": None, "help": text.replace("%", "%%")}
    if kind is bool:
        options["action"] = "store_true"
    else:
        options["action"] = "append" if repeatable else "store"
        options["type"] = int if kind is int else str
        values = get_args(kind) if get_origin(kind) is Literal else ()
        options["metavar"] = f"{{{','.join(values)}}}" if values else key.rpartition(".")[2].upper()
    sub.add_argument("--" + flag_name(key), **options)


def _explained_keys(config: type[JobConfig], keys: Sequence[str]) -> str:
    """Return aligned lines: key=default, then what the key means, wrapped to the terminal.

    The meaning of a key whose default fills more than half a line stands below it.
    """
    width = max(60, shutil.get_terminal_size().columns - 2)
    shown = {f"  {key}={config_default(config, key)}": config_field(config, key).description or "" for key in keys}
    column = max((len(key) for key in shown if len(key) <= width // 2), default=4) + 2
    lines = []
    for key, meaning in shown.items():
        first = key.ljust(column)
        if len(key) > width // 2:
            lines.append(key)
            first = " " * column
        lines.append(textwrap.fill(meaning, width, initial_indent=first, subsequent_indent=" " * column))
    return "\n".join(lines)


def _config_class(job: Job) -> type[JobConfig]:
    room = job.module.rpartition(".")[0]
    found: type[JobConfig] = getattr(import_module(f".rlhf.{room}.config", __package__), job.config)
    return found


def _job(arguments: argparse.Namespace) -> Job:
    return STUDIES[arguments.study] if arguments.command == "study" else JOBS[arguments.command]


def run(arguments: argparse.Namespace) -> Any:
    """Load the job's config from file, --set and flags, each overriding those before it, and run the job."""
    job = _job(arguments)
    config_class = _config_class(job)
    if arguments.keys:
        return config_template(config_class).rstrip()
    given = {key: value for key in job.flags if (value := getattr(arguments, key)) is not None}
    config = load_config(config_class, arguments.config, arguments.set, **given)
    options = {option: getattr(arguments, option) for option in job.options}
    module = import_module(f".rlhf.{job.module}", __package__)
    if arguments.quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # transformers shows one when it reads or writes weights
    try:
        return getattr(module, job.run)(config, progress=not arguments.quiet, **options)
    except OSError as error:
        output = getattr(config, "output", None)
        if isinstance(error, BrokenPipeError) and output == "-":
            raise
        raise OSError(explain_os_error(error, output)) from error


def bench(argv: Sequence[str]) -> int:
    """Pass the flags after `bench` to the module that the first flag selects, else to the microbenchmarks."""
    part = BENCHES.get(argv[0]) if argv else None
    module = import_module(f".bench.{part or '__main__'}", __package__)
    return int(module.main(argv[1:] if part else argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; PRUDENT_DEBUG=1 shows the traceback of an error.

    0: done. 1: a check of a benchmark or a plan failed. 2: a wrong argument, file or setting, explained in one sentence
    on stderr. 130: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    benchmarks = argv[:1] == ["bench"] and argv[1:] not in (["-h"], ["--help"])
    arguments = None if benchmarks else build_parser().parse_args(argv)
    try:
        if arguments is None:
            return bench(argv[1:])
        result = run(arguments)
    except KeyboardInterrupt:
        again = _job(arguments).again if arguments else "the same command starts over"
        print(f"\nprudent: interrupted; {again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `prudent score --output - | head`: the reader has what it wanted
        _discard_output()
        return 0
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("PRUDENT_DEBUG") == "1":
            raise
        print(f"prudent: error: {error}", file=sys.stderr)
        return 2
    try:
        # if standard output carries the scores, the summary goes to standard error
        print(result, file=sys.stderr if getattr(result, "output", None) == "-" else sys.stdout, flush=True)
    except BrokenPipeError:  # `prudent train --keys | head`
        _discard_output()
    return int(getattr(result, "failed", False))


def _discard_output() -> None:
    """Send standard output nowhere: Python would fail again when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
