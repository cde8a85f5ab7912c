"""The ``diffsynth-pipe`` command."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cache_store.backends import backend_names
from cache_store.contract import CacheCorrupt, CacheNotFound
from cache_store.object_path import root_of
from diffsynth_pipe.config import RunConfig, Stage, load_config
from diffsynth_pipe.errors import USER_ERRORS, ConfigError, ModelFileMissing
from diffsynth_pipe.flags import FlagParser, add_config_flags, closed_pipe_exit, config_from_args, stages_from_flag

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffsynth_pipe.stages.plan import StageResult

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2, and one line on stderr, for what the user can cure."""
    try:
        try:
            return _main(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        return closed_pipe_exit()


def _main(argv: Sequence[str]) -> int:
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
    run.set_defaults(command=_run)

    resume = commands.add_parser("resume", help="go on with a stage from its folder")
    resume.add_argument("folder", metavar="RUN_DIR", type=Path, help="run directory of a training, or a cache")
    resume.add_argument("--debug", action="store_true", help="show the traceback of an error")
    resume.set_defaults(command=_resume)

    submit = commands.add_parser("submit", help="a run of a Prefect deployment, unless everything is done")
    submit.add_argument("--deployment", metavar="NAME", default="cache-then-train/local", help="default: %(default)s")
    submit.add_argument("--watch", action="store_true", help="follow the run; exit code 1 if it does not complete")
    submit.add_argument("--encode_workers", metavar="N", type=int, default=1, help="workers that encode; default: 1")
    submit.set_defaults(command=_submit)

    for command in (run, submit):
        command.add_argument("--stages", metavar="STAGES", default="", help="stages to run: data_process,train")
        command.add_argument(
            "--force", metavar="STAGES", default="", help="stages to run even if their result is there"
        )

    data_process = commands.add_parser("data-process", help="encode the dataset into the cache")
    data_process.add_argument("--force", action="store_true", help="run even if the cache is complete")
    data_process.set_defaults(command=_data_process)

    train = commands.add_parser("train", help="train from the cache, under accelerate")
    train.add_argument("--force", action="store_true", help="train even if the run is finished")
    train.set_defaults(command=_train)

    plan = commands.add_parser("plan", help="what each stage would do, and why; changes nothing")
    plan.set_defaults(command=_plan)

    for command in (run, submit, data_process, train, plan):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add_config_flags(command)

    _add_cache_commands(commands.add_parser("cache", help="look into caches, and keep them whole and small"))

    schema = commands.add_parser("schema", help="JSON Schema of the run file")
    schema.set_defaults(command=_schema)

    tiny = commands.add_parser("tiny-model", help="write a tiny repository with random weights, for trials on a CPU")
    tiny.add_argument("folder", metavar="FOLDER", type=Path)
    _add_family(tiny)
    tiny.set_defaults(command=_tiny_model)

    convert = commands.add_parser(
        "convert-wan-s2v", help="write the published denoiser of Wan2.2-S2V as a run loads it"
    )
    convert.add_argument("source", metavar="SOURCE", type=Path, help="its folder: Wan-AI/Wan2.2-S2V-14B")
    convert.add_argument("folder", metavar="FOLDER", type=Path, help="a new folder, called transformer")
    convert.add_argument("--debug", action="store_true", help="show the traceback of an error")
    convert.set_defaults(command=_convert_wan_s2v)
    return parser


def _add_cache_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=summary)
        added.add_argument("root", metavar="FOLDER" if name == "ls" else "CACHE", type=root_of)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(command=command)
        return added

    add("ls", _cache_ls, "the caches below a folder")
    add("info", _cache_info, "what a cache holds")
    verify = add("verify", _cache_verify, "whether every byte is what was written; exit code 2 if not")
    depth = verify.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="only whether all files are there and of the right size")
    depth.add_argument("--full", action="store_true", help="read every byte; the default")
    repair = add("repair", _cache_repair, "rescue what is whole; with the run file, encode again what is lost")
    gc = add("gc", _cache_gc, "delete what no kept snapshot and no writer may need")
    gc.add_argument("--keep", metavar="N", type=_positive, default=2, help="newest snapshots to keep; default: 2")
    gc.add_argument("--grace-hours", metavar="H", type=_hours, default=24.0, help="keep what is younger; default: 24")
    gc.add_argument("--unsealed", action="store_true", help="also records that no snapshot ever named")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    add("compact", _cache_compact, "copy the records of many small segments into few large ones")
    exported = add("export", _cache_export, "copy the newest snapshot into a new cache, of the same or another backend")
    exported.add_argument(
        "target", metavar="TARGET", type=root_of, help="a new folder, or an export that was interrupted"
    )
    exported.add_argument("--backend", required=True, choices=backend_names(), help="file format of the new cache")
    imported = add("import-diffsynth", _cache_import, "fill a new cache from the .pth records of DiffSynth-Studio")
    imported.add_argument("source", metavar="SOURCE", type=Path, help="output_path of its sft:data_process")
    _add_family(imported)
    explain = add("explain", _cache_explain, "what the samples were made of; with a run file, what changed since")
    explain.add_argument("--sample", metavar="ID", help="the first digits of an id; default: all samples")
    for with_run in (repair, explain):
        add_config_flags(with_run)
        with_run.usage = "%(prog)s CACHE [RUN.yaml] [--flag value ...]"


def _add_family(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", default=RunConfig.model_fields["family"].default, help="default: %(default)s")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        message = f"must be a whole number from 1 on, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not hours >= 0:
        message = f"must be a number from 0 on, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return hours


def _run(args: argparse.Namespace) -> None:
    config_from_args(args)
    # -P: the working directory may well hold another package named flows.
    command = [sys.executable, "-P", "-m", "flows.cache_then_train"]
    for name, value in vars(args).items():
        if name in ("config", "stages", "force", *RunConfig.model_fields) and value is not None:
            command.append(f"--{name}={value}")
    if args.debug:
        command.append("--debug")
    os.execv(sys.executable, command)  # noqa: S606 - the flow replaces this process, so signals reach it directly


def _resume(args: argparse.Namespace) -> None:
    folder = args.folder.resolve()
    logs = folder.with_name(f"{folder.name}-logs")
    candidates = (folder / "config.yaml", folder / "data_process.yaml", logs / "data_process.yaml")
    saved = next((path for path in candidates if path.is_file()), None)
    if saved is None:
        message = (
            f"{args.folder} holds no run: name the train-<key> folder of a training, or the cache of a run; a cache"
            " that data-process fills by itself goes on by the same command"
        )
        raise ConfigError(message)
    config = load_config(saved, {})
    from diffsynth_pipe.launch import data_process_log_dir
    from diffsynth_pipe.stages.plan import plan_train

    place = plan_train(config).path if config.stage == "train" else data_process_log_dir(config)
    if place.resolve() != saved.parent:
        raise ConfigError(
            f"{args.folder}: its samples, its models or the folder's own place have changed, so the run would start in "
            f"{place}; if that is wanted: `diffsynth-pipe run {saved}`"
        )
    args.config = str(saved)
    _run(args)


def _submit(args: argparse.Namespace) -> None:
    config = config_from_args(args).with_absolute_paths()
    stages, force = stages_from_flag("--stages", args.stages), stages_from_flag("--force", args.force)
    stages = stages or ((config.stage,) if config.stage else get_args(Stage))
    if _is_done(config, stages) and not force:
        print("nothing to do; --force does a stage again")
        return
    from diffsynth_pipe.fingerprint import run_name

    parameters = {
        "config": config.model_dump(mode="json", exclude_defaults=True),
        "stages": stages,
        "force": force,
        "encode_workers": args.encode_workers,
    }
    # Prefect fills {parameters} into the names that it is given.
    name = run_name(config, stages).replace("{", "{{").replace("}", "}}")
    command = [sys.executable, "-P", "-m", "prefect", "deployment", "run", args.deployment]
    command += ["--params", json.dumps(parameters), "--flow-run-name", name, *(["--watch"] if args.watch else [])]
    os.execv(sys.executable, command)  # noqa: S606 - the exit code of --watch is Prefect's


def _is_done(config: RunConfig, stages: Sequence[Stage]) -> bool:
    """Print the plan of a run that another process will do, as far as its files are on this machine too."""
    from diffsynth_pipe.launch import plan_stages

    os.environ["DIFFSYNTH_SKIP_DOWNLOAD"] = "True"
    if not Path(config.dataset_base_path).exists():
        print(f"dataset_base_path: {config.dataset_base_path} is not on this machine; the worker will plan the run")
        return False
    try:
        plans = plan_stages(config, stages)
    except (ModelFileMissing, CacheNotFound) as error:
        print(f"{error}\nThe worker will plan the run")
        return False
    for plan in plans:
        print(f"{plan.stage}: {plan.verdict}, {plan.why}")
    return all(plan.verdict == "hit" for plan in plans)


def _data_process(args: argparse.Namespace) -> None:
    config = _config_with_stage(args, "data_process")
    rank = os.environ.get("RANK")
    if rank is None and config.data_process_num_processes > 1:
        from diffsynth_pipe.launch import launch_data_process

        result = launch_data_process(config, force=args.force)
    else:
        from diffsynth_pipe.stages.data_process import data_process

        result = data_process(config, force=args.force)
    if rank in (None, "0") or result.summary["encoded"]:
        _print_result(result)


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
    from diffsynth_pipe.training.run_dir import disk_errors

    family = load_family(args.family)
    with disk_errors(args.folder):
        family.write_tiny(args.folder)
    print(args.folder)


def _convert_wan_s2v(args: argparse.Namespace) -> None:
    from diffsynth_pipe.modeling.wan_s2v_conversion import convert
    from diffsynth_pipe.training.run_dir import disk_errors

    with disk_errors(args.folder):
        convert(args.source, args.folder)
    print(args.folder)


def _cache_ls(args: argparse.Namespace) -> None:
    from cache_store.describe import list_caches

    for line in list_caches(args.root):
        print(line)


def _cache_info(args: argparse.Namespace) -> None:
    from cache_store.describe import describe

    print(*describe(args.root), sep="\n")


def _cache_verify(args: argparse.Namespace) -> None:
    from cache_store.verify import verify

    damage = verify(args.root, full=not args.quick)
    if damage:
        print(*damage, sep="\n")
        raise CacheCorrupt(f"cache {args.root} is damaged; run `diffsynth-pipe cache repair {args.root}`")
    print(f"{args.root}: {'all files are there' if args.quick else 'every byte is what was written'}")


def _cache_repair(args: argparse.Namespace) -> None:
    from diffsynth_pipe.stages.repair import repair_cache

    for line in repair_cache(args.root, _config_of_cache(args)):
        print(line)


def _cache_gc(args: argparse.Namespace) -> None:
    from cache_store.maintain import collect_garbage

    garbage = collect_garbage(
        args.root,
        keep=args.keep,
        grace_s=args.grace_hours * 3600,
        unsealed=args.unsealed,
        dry_run=args.dry_run,
    )
    for name in garbage.names():
        print(name)
    print(f"{'would delete' if args.dry_run else 'deleted'} {garbage.num_bytes / 1e6:.2f} MB")


def _cache_compact(args: argparse.Namespace) -> None:
    from cache_store.maintain import compact
    from cache_store.store import Cache

    before, after = compact(Cache.open(args.root))
    print(f"segments: {before} before, {after} now; `diffsynth-pipe cache gc {args.root}` deletes the old ones in time")


def _cache_export(args: argparse.Namespace) -> None:
    from cache_store.export import export

    done = export(args.root, args.target, args.backend)
    num_records = sum(done.snapshot.num_records.values())
    if done.was_complete:
        print(f"{args.target}: complete already, {len(done.snapshot)} samples, {num_records} records")
    else:
        print(f"{args.target}: {len(done.snapshot)} samples, {done.num_copied} of {num_records} records copied")


def _cache_import(args: argparse.Namespace) -> None:
    from diffsynth_pipe.stages.import_diffsynth import import_diffsynth

    _print_result(import_diffsynth(args.source, args.root, args.family))


def _cache_explain(args: argparse.Namespace) -> None:
    config = _config_of_cache(args)
    from cache_store.describe import explain

    for line in explain(args.root, args.sample):
        print(line)
    if config is not None:
        from diffsynth_pipe.stages.explain import explain_changes

        for line in explain_changes(args.root, config):
            print(line)


def _config_of_cache(args: argparse.Namespace) -> RunConfig | None:
    """Return the run that was given beside a cache, if any."""
    if vars(args).keys().isdisjoint({"config", *RunConfig.model_fields}):
        return None
    config = config_from_args(args)
    if config.cache_dir.resolve() != args.root.resolve():
        message = f"cache_path: the run's cache is {config.cache_dir}, not {args.root}; name the run file of this cache"
        raise ConfigError(message)
    return config


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
