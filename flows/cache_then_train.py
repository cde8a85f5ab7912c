"""The flow: encode the data set once, then train a LoRA from the cache.

``python -m flows.cache_then_train RUN.yaml --flag value`` runs it here, with a server of its own unless
``PREFECT_API_URL`` names one; ``diffsynth-pipe run`` does just this. A deployment calls ``cache_then_train``.
"""

import contextlib
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any, get_args

from prefect import flow
from prefect.runtime import flow_run

from diffsynth_pipe.config import RunConfig, Stage, load_config
from diffsynth_pipe.errors import USER_ERRORS, ConfigError
from diffsynth_pipe.flags import FlagParser, add_config_flags, config_from_args
from diffsynth_pipe.launch import plan_stages
from diffsynth_pipe.stages.explain import changes_since
from diffsynth_pipe.stages.plan import StageResult
from flows import tasks
from flows.report import LOG, Reporter, closing_lines

STAGES: tuple[Stage, ...] = get_args(Stage)


def run_name() -> str:
    """Return what the present run trains: ``qwen_image sft, LoRA rank 8 of dit, photos``."""
    parameters = flow_run.get_parameters()
    config = parameters["config"]
    if overrides := parameters.get("overrides"):
        with contextlib.suppress(ConfigError):  # the flow itself refuses them
            config = load_config(None, {**config.model_dump(mode="json"), **overrides})
    lora = [f"LoRA rank {config.lora_rank} of {config.lora_base_model}"] if config.lora_base_model else []
    full = [f"all of {config.trainable_models}"] if config.trainable_models else []
    return ", ".join([f"{config.family} {config.task_name}", *lora, *full, Path(config.dataset_base_path).name])


@flow(name="cache-then-train", flow_run_name=run_name, validate_parameters=True, persist_result=False)
def cache_then_train(
    config: RunConfig,
    overrides: dict[str, Any] | None = None,
    stages: tuple[Stage, ...] = STAGES,
    force: tuple[Stage, ...] = (),
) -> list[StageResult]:
    """Encode the data set once, then train a LoRA from the cache.

    Args:
        config: The run.
        overrides: Parameters laid over ``config``: ``{"lora_rank": 8}``.
        stages: The stages to run. What is done already is not done again.
        force: Stages to run even if nothing is left to do.
    """
    if overrides:
        config = load_config(None, {**config.model_dump(mode="json"), **overrides})
    results: list[StageResult] = []
    elapsed_s: list[float] = []
    with Reporter() as reporter:
        plans = plan_stages(config, stages)
        reporter.plan(plans, changes_since(config, plans))
        # Called, never submitted: a signal that stops the run is raised in the main thread only.
        upstream = []
        if "data_process" in stages:
            began = time.monotonic()
            state = tasks.data_process(config, "data_process" in force, return_state=True)
            results.append(state.result())
            elapsed_s.append(time.monotonic() - began)
            upstream.append(state)
        if "train" in stages:
            began = time.monotonic()
            state = tasks.train(config, "train" in force, return_state=True, wait_for=upstream)
            results.append(state.result())
            elapsed_s.append(time.monotonic() - began)
        reporter.report(results, elapsed_s)
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the flow from a command line; return the exit code."""
    parser = FlagParser(prog="diffsynth-pipe run", description="Encode the data set once, then train from the cache.")
    parser.add_argument("--stages", default="", help="stages to run [default: those of --task]")
    parser.add_argument("--force", default="", help="stages to run even if nothing is left to do")
    add_config_flags(parser)
    _show_only_our_lines()
    # Prefect sends its process SIGTERM once more when the flow has stopped; dying of it would leave Prefect's server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        args = parser.parse_flags(argv)
        config = config_from_args(args)
        stages, force = _stages("--stages", args.stages), _stages("--force", args.force)
        stages = stages or ((config.stage,) if config.stage else STAGES)
        for plan in plan_stages(config, stages):
            LOG.info("%s: %s, %s", plan.stage, plan.verdict, plan.why)
        results = cache_then_train(config, stages=stages, force=force)
    except USER_ERRORS as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on where it can\n")
        return 130
    sys.stdout.write("\n".join(["", *closing_lines(results), ""]))
    return 0


def _stages(flag: str, value: str) -> tuple[Stage, ...]:
    names = {name.strip() for name in value.split(",")} - {""}
    if unknown := sorted(names - set(STAGES)):
        message = f"{flag}: {unknown[0]!r} is not a stage; accepted: {', '.join(STAGES)}"
        raise ConfigError(message)
    return tuple(stage for stage in STAGES if stage in names)


def _show_only_our_lines() -> None:
    """Show the lines of logger ``flows`` on stderr; Prefect's own go to its API, and its warnings to stderr too."""
    logging.getLogger("prefect").propagate = False
    LOG.propagate = False
    LOG.addHandler(logging.StreamHandler())


if __name__ == "__main__":
    sys.exit(main())
