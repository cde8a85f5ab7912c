"""The flow: encode the data set once, then train a LoRA from the cache.

``python -m flows.cache_then_train RUN.yaml --flag value`` runs it here, with a server of its own unless
``PREFECT_API_URL`` names one; ``diffsynth-pipe run`` does just this. A deployment calls ``cache_then_train``.
"""

import logging
import signal
import sys
from typing import Any, get_args

from prefect import flow

from diffsynth_pipe.config import RunConfig, Stage, load_config
from diffsynth_pipe.errors import USER_ERRORS, ConfigError
from diffsynth_pipe.flags import FlagParser, add_config_flags, config_from_args
from diffsynth_pipe.launch import plan_stages
from diffsynth_pipe.stages.plan import StageResult
from flows import tasks
from flows.report import LOG, Reporter, closing_lines

STAGES: tuple[Stage, ...] = get_args(Stage)


@flow(name="cache-then-train", validate_parameters=True, persist_result=False)
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
    with Reporter() as reporter:
        reporter.plan(plan_stages(config, stages))
        # Called, never submitted: a signal that stops the run is raised in the main thread only.
        upstream = []
        if "data_process" in stages:
            state = tasks.data_process(config, "data_process" in force, return_state=True)
            results.append(state.result())
            upstream.append(state)
        if "train" in stages:
            state = tasks.train(config, "train" in force, return_state=True, wait_for=upstream)
            results.append(state.result())
        reporter.summary(results)
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
