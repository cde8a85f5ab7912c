"""The files of a shared installation: valid, of one mind, and without a secret."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from diffsynth_pipe.launch import GUARD_GRACE_S

DEPLOY = Path(__file__).parents[2] / "deploy"
BIN = Path(sys.executable).parent
KUBERNETES = "1.30"
IMAGE = "diffsynth-pipe:latest"
MANIFESTS = ("volumes", "server", "worker")
SECRETS = re.compile(r"PASSWORD|AUTH_STRING$|API_KEY|TOKEN")


def manifests(name):
    return list(yaml.safe_load_all((DEPLOY / "k8s" / f"{name}.yaml").read_text()))


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())


@pytest.fixture(scope="module")
def template():
    return json.loads((DEPLOY / "k8s" / "base-job-template.json").read_text())


async def rendered(template, **variables):
    """Return the job that the work pool's worker would create for a run."""
    from prefect.client.schemas.objects import FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    configuration = await KubernetesWorkerJobConfiguration.from_template_and_values(template, variables)
    configuration.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), name="a run", flow_id=uuid.uuid4()))
    return configuration


@pytest.fixture(scope="module")
def job(template):
    import asyncio

    return asyncio.run(rendered(template, memory_limit="200Gi", node_selector={"gpu": "a100"})).job_manifest


def test_compose_follows_its_schema():
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "docker-compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_clean():
    done = subprocess.run([BIN / "hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_follow_the_schemas_of_kubernetes(name):
    for manifest in manifests(name):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_the_template_is_what_its_script_writes():
    spec = importlib.util.spec_from_file_location("make_template", DEPLOY / "k8s" / "make_template.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.TEMPLATE.read_text() == script.text()


def test_a_rendered_job_follows_the_schema(job):
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == IMAGE
    assert container["resources"]["limits"] == {"memory": "200Gi", "nvidia.com/gpu": 1}
    assert pod["nodeSelector"] == {"gpu": "a100"}
    container["imagePullPolicyy"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_a_stopped_training_has_time_to_save(job, compose):
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= GUARD_GRACE_S + 60
    (minutes,) = re.fullmatch(r"(\d+)m", compose["services"]["worker"]["stop_grace_period"]).groups()
    assert int(minutes) * 60 >= GUARD_GRACE_S + 60


# Ends at SIGTERM, as Prefect's worker does, and leaves a child in a session of its own that saves after that.
WORKER = """
import os, signal, subprocess, sys
code = (
    "import os, signal, sys\\nparent = os.getppid()\\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\\n"
    "print('ready', flush=True)\\nsignal.sigwait({signal.SIGTERM})\\n"
    "while os.getppid() == parent: pass\\nopen(sys.argv[1], 'w').close()"
)
subprocess.Popen([sys.executable, "-c", code, sys.argv[1]], start_new_session=True)
signal.pause()
"""


def test_a_stopped_worker_container_ends_when_its_training_has_saved(compose, tmp_path):
    worker = compose["services"]["worker"]
    assert worker["init"]
    guard, started = map(shlex.split, worker["command"].split(" -- "))
    assert started[:3] == ["prefect", "worker", "start"]
    assert int(guard[guard.index("--grace") + 1]) > GUARD_GRACE_S
    guard[guard.index("--parent") + 1] = str(os.getpid())
    command = [sys.executable, *guard[1:], "--", sys.executable, "-c", WORKER, str(tmp_path / "saved")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists()


def test_shared_memory_and_volumes_agree(job, compose):
    pod = job["spec"]["template"]["spec"]
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"/cache", "/models", "/data", "/output", "/dev/shm"}
    assert compose["services"]["worker"]["shm_size"] == "8gb"
    assert {
        volume.split(":")[-2 if volume.endswith(":ro") else -1] for volume in compose["services"]["worker"]["volumes"]
    } == mounts - {"/dev/shm"}
    claims = {manifest["metadata"]["name"] for manifest in manifests("volumes")}
    used = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "emptyDir" not in volume}
    assert used | {"diffsynth-pipe-postgres"} == claims


def test_images_and_pools_agree(compose):
    (worker,) = (item for item in manifests("worker") if item["kind"] == "Deployment")
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    services = compose["services"]
    assert container["image"] == services["worker"]["image"] == IMAGE
    assert "--pool gpu-kubernetes --type kubernetes --limit 1" in " ".join(container["command"])
    assert "--pool local --type process --limit 1" in services["worker"]["command"]
    in_cluster = {
        item["spec"]["template"]["spec"]["containers"][0]["image"]
        for item in manifests("server")
        if item["kind"] == "Deployment"
    }
    assert in_cluster == {services["server"]["image"], services["postgres"]["image"]}
    deployments = DEPLOY / "prefect.yaml"
    if deployments.exists():
        pools = {item["work_pool"]["name"] for item in yaml.safe_load(deployments.read_text())["deployments"]}
        assert pools <= {"local", "gpu-docker", "gpu-kubernetes"}


def test_the_server_asks_for_a_password_and_listens_on_loopback(compose):
    server = compose["services"]["server"]
    assert server["environment"]["PREFECT_SERVER_API_AUTH_STRING"].startswith("${PREFECT_API_AUTH_STRING:?")
    assert [port for service in compose["services"].values() for port in service.get("ports", [])] == [
        "127.0.0.1:4200:4200"
    ]
    assert {item["spec"].get("type", "ClusterIP") for item in manifests("server") if item["kind"] == "Service"} == {
        "ClusterIP"
    }


def test_secrets_have_no_default(compose):
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if SECRETS.search(name):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
    for manifest in [*manifests("server"), *manifests("worker")]:
        pod = manifest.get("spec", {}).get("template", {}).get("spec", {"containers": []})
        for variable in (variable for container in pod["containers"] for variable in container["env"]):
            if SECRETS.search(variable["name"]):
                assert variable["valueFrom"]["secretKeyRef"]["name"] == "diffsynth-pipe", variable["name"]
    assert not any(manifest["kind"] == "Secret" for name in MANIFESTS for manifest in manifests(name))


def test_a_job_refers_to_the_password_and_does_not_hold_it(template, monkeypatch):
    """The worker copies its settings into a job; told by its manifest, it puts a reference in the password's place."""
    import asyncio

    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings
    from prefect_kubernetes.worker import KubernetesWorker

    (worker,) = (item for item in manifests("worker") if item["kind"] == "Deployment")
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "user:hunter2"))
    created = []

    class Created(Exception):
        pass

    class Api:
        def __init__(self, client):
            pass

        async def create_namespaced_job(self, _namespace, manifest):
            created.append(manifest)
            raise Created

    async def create():
        configuration = await rendered(template)
        worker = KubernetesWorker(work_pool_name="gpu-kubernetes")
        await worker._create_job(configuration, client=None)

    monkeypatch.setattr("prefect_kubernetes.worker.BatchV1Api", Api)
    with temporary_settings({PREFECT_API_AUTH_STRING: "user:hunter2"}), pytest.raises(Created):
        asyncio.run(create())
    environment = {item["name"]: item for item in created[0]["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["PREFECT_API_AUTH_STRING"]["valueFrom"] == {
        "secretKeyRef": {"name": "diffsynth-pipe", "key": "auth-string"}
    }
    assert "hunter2" not in json.dumps(created)


def test_the_database_settings_are_prefects(compose, monkeypatch):
    from prefect.settings import Settings

    for name, value in compose["services"]["server"]["environment"].items():
        monkeypatch.setenv(name, "p@ss:word" if SECRETS.search(name) else value)
    url = Settings().server.database.connection_url.get_secret_value()
    assert url == "postgresql+asyncpg://prefect:p%40ss%3Aword@postgres:5432/prefect"
