"""The ``diffsynth-pipe`` command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth_pipe.config import RunConfig, Stage
from diffsynth_pipe.errors import USER_ERRORS, ConfigError
from diffsynth_pipe.flags import FlagParser, add_config_flags, config_from_args

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from diffsynth_pipe.stages.plan import StageResult

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2, and one line on stderr, for what the user can cure."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser().parse_flags(argv)
        args.command(args)
    except USER_ERRORS as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it can", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _parser() -> FlagParser:
    parser = FlagParser(
        prog="diffsynth-pipe",
        description="Encode a dataset once, then train a LoRA of a diffusion transformer from the cache.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="both stages, as a Prefect flow")
    run.add_argument("--stages", metavar="STAGES", help="stages to run: data_process,train")
    run.add_argument("--force", metavar="STAGES", help="stages to run even if their result is there")
    run.set_defaults(command=_run)

    data_process = commands.add_parser("data-process", help="encode the dataset into the cache")
    data_process.add_argument("--force", action="store_true", help="run even if the cache is complete")
    data_process.set_defaults(command=_data_process)

    train = commands.add_parser("train", help="train from the cache, under accelerate")
    train.add_argument("--force", action="store_true", help="train even if the run is finished")
    train.set_defaults(command=_train)

    plan = commands.add_parser("plan", help="what each stage would do, and why; changes nothing")
    plan.set_defaults(command=_plan)

    for command in (run, data_process, train, plan):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add_config_flags(command)

    schema = commands.add_parser("schema", help="JSON Schema of the run file")
    schema.set_defaults(command=_schema)

    tiny = commands.add_parser("tiny-model", help="write a tiny repository with random weights, for trials on a CPU")
    tiny.add_argument("folder", metavar="FOLDER", type=Path)
    tiny.add_argument("--family", default=RunConfig.model_fields["family"].default, help="default: %(default)s")
    tiny.set_defaults(command=_tiny_model)
    return parser


def _run(args: argparse.Namespace) -> None:
    config_from_args(args)
    # -P: the working directory may well hold another package named flows.
    command = [sys.executable, "-P", "-m", "flows.cache_then_train"]
    for name, value in vars(args).items():
        if name in ("config", "stages", "force", *RunConfig.model_fields) and value is not None:
            command.append(f"--{name}={value}")
    os.execv(sys.executable, command)  # noqa: S606 - the flow replaces this process, so signals reach it directly


def _data_process(args: argparse.Namespace) -> None:
    config = _config_with_stage(args, "data_process")
    from diffsynth_pipe.stages.data_process import data_process

    _print_result(data_process(config, force=args.force))


def _train(args: argparse.Namespace) -> None:
    config = _config_with_stage(args, "train")
    from diffsynth_pipe.launch import launch_train

    _print_result(launch_train(config, force=args.force))


def _plan(args: argparse.Namespace) -> None:
    config = config_from_args(args)
    from diffsynth_pipe.stages.plan import plan

    rows = [("stage", "verdict", "key", "why"), *((p.stage, p.verdict, p.key[:12], p.why) for p in plan(config))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _schema(_: argparse.Namespace) -> None:
    print(json.dumps(RunConfig.model_json_schema(), indent=2))


def _tiny_model(args: argparse.Namespace) -> None:
    from diffsynth_pipe.contracts import load_family

    load_family(args.family).write_tiny(args.folder)
    print(args.folder)


def _config_with_stage(args: argparse.Namespace, stage: Stage) -> RunConfig:
    config = config_from_args(args)
    if config.stage not in (None, stage):
        message = f"task: {config.task!r} has no {stage} stage; set it to {config.task_name!r} for both stages"
        raise ConfigError(message)
    return config


def _print_result(result: StageResult) -> None:
    print(f"{result.stage}: {result.state}  {result.path}")
    for name, value in result.summary.items():
        print(f"  {name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
