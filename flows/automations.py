"""Install what marks a run as crashed when its worker, or its whole machine, vanished: ``python -m flows.automations``.

A run sends a heartbeat every 30 s (``PREFECT_FLOWS_HEARTBEAT_FREQUENCY`` in ``flows`` and ``deploy/prefect.yaml``).
Without this automation such a run stays ``Running`` forever, and holds the slot that the next one waits for.
"""

from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

NAME = "cache-then-train: crashed when silent"
SILENCE = timedelta(seconds=90)
"""Three heartbeats."""


def install(silence: timedelta = SILENCE) -> None:
    """Create the automation, or bring the one that is there up to date."""
    automation = AutomationCore(
        name=NAME,
        description="The run's heartbeats stopped: its worker or its machine is gone. It can be retried.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            # A run may vanish before its first heartbeat, or after it was told to stop.
            after={f"prefect.flow-run.{event}" for event in ("heartbeat", "Running", "Retrying", "Cancelling")},
            # Any event, not those of known states: states have names of their own.
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "flow", "prefect.resource.name": ["cache-then-train", "encode-share"]}
            ),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=silence,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No heartbeat for {silence.total_seconds():.0f} s: the worker or its machine is gone.",
            )
        ],
    )
    with get_client(sync_client=True) as client:
        if found := client.read_automations_by_name(NAME):
            client.update_automation(found[0].id, automation)
        else:
            client.create_automation(automation)


if __name__ == "__main__":
    install()
