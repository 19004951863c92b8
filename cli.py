"""The `prudent` command: parse, call one job, show its result. What a job does is its module's business."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from . import __version__
from .commands import BENCH_ABOUT, BENCHES, JOBS, OPTIONS, STUDIES, STUDY_ABOUT, Job


def build_parser() -> argparse.ArgumentParser:
    """The parser, with one subcommand a job; `bench` stands here for its help alone."""
    parser = argparse.ArgumentParser(
        prog="prudent", description="A reward engine for RLHF that knows when it does not know."
    )
    parser.add_argument("--version", action="version", version=f"prudent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, job in JOBS.items():
        _add_job(commands, name, job)
    study = commands.add_parser(
        "study",
        help="claims about pessimism, tried out over many seeds",
        description=STUDY_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    studies = study.add_subparsers(dest="study", required=True, metavar="STUDY")
    for name, job in STUDIES.items():
        _add_job(studies, name, job)
    commands.add_parser(
        "bench",
        help="the kernels' speed, machine code and bytes",
        description=BENCH_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_job(commands: Any, name: str, job: Job) -> None:
    sub = commands.add_parser(
        name, help=job.summary, description=job.about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in job.flags:
        metavar = flag.key.rpartition(".")[2].upper()
        if flag.type is bool:
            sub.add_argument(flag.name, dest=flag.key, action="store_true", default=None, help=flag.help)
        elif flag.type is list:
            sub.add_argument(flag.name, dest=flag.key, action="append", metavar=metavar, help=flag.help)
        else:
            sub.add_argument(flag.name, dest=flag.key, type=flag.type, metavar=metavar, help=flag.help)
    sub.add_argument("--config", metavar="FILE", help="YAML file of config keys")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one config key, repeatable; flags win over it, and it over --config",
    )
    for option in job.options:
        sub.add_argument(f"--{option}", action="store_true", help=OPTIONS[option])
    sub.add_argument("--keys", action="store_true", help="print every config key with its default, as YAML, and stop")
    sub.add_argument("--quiet", action="store_true", help="no progress bars")


def _job(arguments: argparse.Namespace) -> Job:
    return STUDIES[arguments.study] if arguments.command == "study" else JOBS[arguments.command]


def run(arguments: argparse.Namespace) -> Any:
    """Load the job's config from file, --set and flags (the last wins), and run the job."""
    job = _job(arguments)
    module = import_module(f".rlhf.{job.module}", __package__)
    from .rlhf.job.config import config_template, load_config
    from .rlhf.job.files import explain_os_error

    if arguments.keys:
        return config_template(getattr(module, job.config)).rstrip()
    given = {flag.key: value for flag in job.flags if (value := getattr(arguments, flag.key)) is not None}
    config = load_config(getattr(module, job.config), arguments.config, arguments.set, **given)
    options = {option: getattr(arguments, option) for option in job.options}
    if arguments.quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of weights that are read and written
    try:
        return getattr(module, job.run)(config, progress=not arguments.quiet, **options)
    except OSError as error:
        raise OSError(explain_os_error(error, getattr(config, "output", None))) from error


def bench(argv: Sequence[str]) -> int:
    """Hand the flags after `bench` to the module that the first of them names, or else to the microbenchmarks."""
    part = BENCHES.get(argv[0]) if argv else None
    module = import_module(f".bench.{part or '__main__'}", __package__)
    return int(module.main(argv[1:] if part else argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a benchmark's or a plan's check failed, 2 a wrong argument, file or setting (one sentence
    on stderr), 130 interrupted.

    PRUDENT_DEBUG=1 shows the traceback behind the sentence.
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
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("PRUDENT_DEBUG") == "1":
            raise
        print(f"prudent: error: {error}", file=sys.stderr)
        return 2
    # where standard output carries the scores, the summary goes beside them
    print(result, file=sys.stderr if getattr(result, "output", None) == "-" else sys.stdout)
    return int(getattr(result, "failed", False))


if __name__ == "__main__":
    sys.exit(main())
