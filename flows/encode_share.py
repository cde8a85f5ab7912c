"""Stage 1 on several workers: a flow that encodes a share of the records, and what submits it for a run.

Shares exchange nothing but the journal, so whatever becomes of one, the run's own ``data_process`` encodes the rest.
"""

import time
from typing import TYPE_CHECKING, Annotated

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.runtime import deployment
from prefect.states import Cancelling
from pydantic import Field

from diffsynth_pipe.config import RunConfig
from diffsynth_pipe.fingerprint import run_name
from diffsynth_pipe.guard import stop_with_parent
from flows import tasks
from flows.report import LOG

if TYPE_CHECKING:
    from uuid import UUID

START_S = 120.0
"""How long a share that a worker has taken may take to start; its worker or its container may never come up."""

_POLL_S = 2.0


@flow(name="encode-share", validate_parameters=True, persist_result=False)
def encode_share(config: RunConfig, index: Annotated[int, Field(ge=0)], count: Annotated[int, Field(ge=1)]) -> None:
    """Encode share ``index`` of ``count`` of the records that the cache lacks."""
    stop_with_parent()  # only workers run it; see ``cache_then_train``
    tasks.encode_share(config, index, count)


def encode_on_workers(config: RunConfig, count: int) -> None:
    """Encode share 0 here, and the others on whatever workers are free meanwhile; leave none behind.

    Waits for shares that run, and cancels those that no worker has taken. On an error or a signal it cancels them all.

    Args:
        config: The run; its folders are the same ones for all workers.
        count: Number of shares, at least 2.
    """
    name = run_name(config, ("data_process",))
    ids: list[UUID] = []
    with get_client(sync_client=True) as client:

        def shares() -> list[FlowRun]:
            return client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=ids)))

        try:
            for index in range(1, count):
                run = run_deployment(
                    f"encode-share/{deployment.name or 'local'}",
                    parameters={"config": config.model_dump(mode="json"), "index": index, "count": count},
                    flow_run_name=f"{name}, share {index} of {count}",
                    timeout=0,
                )
                ids.append(run.id)  # type: ignore[union-attr]  # no coroutine: called from sync code
            tasks.encode_share(config, 0, count)
            give_up_at = time.monotonic() + START_S
            while any(
                run.state and (run.state.is_running() or (run.state.is_pending() and time.monotonic() < give_up_at))
                for run in shares()
            ):
                time.sleep(_POLL_S)
        finally:
            for run in shares():
                LOG.info("%s: %s", run.name, run.state_name)
                if run.state and not run.state.is_final():
                    client.set_flow_run_state(run.id, Cancelling())
