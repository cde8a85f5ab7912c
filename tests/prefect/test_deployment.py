"""The deployments on a real server and worker."""


def test_a_deployment_run_caches_and_trains(stack, run_parameters):
    run = stack.submit(run_parameters)
    assert stack.wait_for_state(run.id).state_name == "Completed"
    assert stack.task_states(run.id) == {"data_process": "Completed", "train": "Completed"}
