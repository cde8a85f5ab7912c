"""The flow: encode the data set once, then train a LoRA from the cache.

``python -m flows.cache_then_train RUN.yaml --flag value`` runs it here, with a server of its own unless
``PREFECT_API_URL`` names one; ``diffsynth-pipe run`` does just this. A deployment calls ``cache_then_train``.
"""

import logging
import signal
import sys
import time
from typing import Annotated, Any, get_args

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import deployment, flow_run
from pydantic import Field, WithJsonSchema

from diffsynth_pipe.config import RunConfig, Stage, load_config, overrides_schema
from diffsynth_pipe.errors import USER_ERRORS, ConfigError
from diffsynth_pipe.fingerprint import run_name
from diffsynth_pipe.flags import FlagParser, add_config_flags, closed_pipe_exit, config_from_args, stages_from_flag
from diffsynth_pipe.guard import stop_with_parent
from diffsynth_pipe.launch import plan_stages, stage_config
from diffsynth_pipe.stages.explain import changes_since
from diffsynth_pipe.stages.plan import StageResult
from flows import tasks
from flows.encode_share import encode_on_workers
from flows.report import LOG, Reporter, closing_lines

STAGES: tuple[Stage, ...] = get_args(Stage)


@flow(name="cache-then-train", validate_parameters=True, persist_result=False)
def cache_then_train(
    config: RunConfig,
    overrides: Annotated[dict[str, Any], WithJsonSchema(overrides_schema())] | None = None,
    stages: tuple[Stage, ...] = (),
    force: tuple[Stage, ...] = (),
    encode_workers: Annotated[int, Field(ge=1, le=200)] = 1,  # the server lists no more runs at once
) -> list[StageResult]:
    """Encode the data set once, then train a LoRA from the cache.

    Args:
        config: The run.
        overrides: Parameters laid over ``config``: ``{"lora_rank": 8}``.
        stages: The stages to run; none given: those of ``config.task``. What is done already is not done again.
        force: Stages to run even if nothing is left to do.
        encode_workers: Shares that the encoding is cut into: this worker encodes one, others that are free the rest.

    Raises:
        ConfigError: ``encode_workers`` goes with neither ``force`` nor ``data_process_num_processes``.
    """
    if deployment.id:
        stop_with_parent()  # without its worker nobody could cancel the run, or hear how it ended
    if overrides:
        config = load_config(None, {**config.model_dump(mode="json"), **overrides})
    stages = stages or ((config.stage,) if config.stage else STAGES)
    if encode_workers > 1 and ("data_process" in force or config.data_process_num_processes > 1):
        raise ConfigError(
            "encode_workers: leave it out to force data_process, and start a worker per GPU in place of"
            " data_process_num_processes"
        )
    config = stage_config(config, *stages)
    with get_client(sync_client=True) as client:
        client.set_flow_run_name(flow_run.id, run_name(config, stages))
    results: list[StageResult] = []
    elapsed_s: list[float] = []
    with Reporter() as reporter:
        plans = plan_stages(config, stages)
        reporter.plan(plans, changes_since(config, plans))
        # Called, never submitted: a signal that stops the run is raised in the main thread only.
        upstream = []
        if "data_process" in stages:
            began = time.monotonic()
            if encode_workers > 1 and plans[0].verdict != "hit":
                encode_on_workers(config, encode_workers)
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
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_config_flags(parser)
    argv = sys.argv[1:] if argv is None else argv
    _show_only_our_lines()
    # Prefect sends its process SIGTERM once more when the flow has stopped; dying of it would leave Prefect's server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        args = parser.parse_flags(argv)
        config = config_from_args(args)
        stages, force = stages_from_flag("--stages", args.stages), stages_from_flag("--force", args.force)
        stages = stages or ((config.stage,) if config.stage else STAGES)
        for plan in plan_stages(config, stages):
            LOG.info("%s: %s, %s", plan.stage, plan.verdict, plan.why)
        results = cache_then_train(config, stages=stages, force=force)
    except USER_ERRORS as error:
        if "--debug" in argv:
            raise
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on where it can\n")
        return 130
    try:
        sys.stdout.write("\n".join(["", *closing_lines(results), ""]))
        sys.stdout.flush()
    except BrokenPipeError:
        return closed_pipe_exit()
    return 0


def _show_only_our_lines() -> None:
    """Show the lines of logger ``flows`` on stderr; Prefect's own go to its API, and its warnings to stderr too."""
    logging.getLogger("prefect").propagate = False
    LOG.propagate = False
    LOG.addHandler(logging.StreamHandler())


if __name__ == "__main__":
    sys.exit(main())
