"""The cluster files: what Ray's launcher, KubeRay and Grafana say of them, as far as it shows without a cloud."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from ray_sampler import cli
from ray_sampler.commands import request_of
from ray_sampler.resolve import dry_run

ROOT = Path(__file__).parent.parent
LAUNCHER_FILES = ("cluster.yaml", "deploy/gcp.yaml")
METRICS = {
    "ray_sampler_samples_total",
    "ray_sampler_shards_total",
    "ray_sampler_compute_seconds_total",
    "ray_sampler_wait_seconds_total",
    "ray_sampler_upload_seconds_total",
    "ray_sampler_retries_total",
    "ray_sampler_actors",
}


@pytest.fixture(params=LAUNCHER_FILES)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A launcher file as `ray up` has it before it talks to a cloud: with Ray's defaults filled in."""
    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / request.param).read_text()))
    return config


def machine(node_type: dict[str, Any]) -> str:
    node = node_type["node_config"]
    return str(node.get("InstanceType") or node.get("machineType"))


def is_spot(node_type: dict[str, Any]) -> bool:
    node = node_type["node_config"]
    market = node.get("InstanceMarketOptions", {}).get("MarketType")
    return bool(market == "spot" or node.get("scheduling", {}).get("provisioningModel") == "SPOT")


def launched(cluster: dict[str, Any], actors: int, unavailable: tuple[str, ...] = ()) -> dict[str, int]:
    """Nodes that Ray's own scheduler would start for this number of waiting GPU actors, by type."""
    cluster = copy.deepcopy(cluster)
    for name, node_type in cluster["available_node_types"].items():
        # On AWS Ray asks EC2 what a machine has.
        node_type["resources"] = node_type["resources"] or ({"CPU": 2} if name == "head" else {"CPU": 4, "GPU": 1})
    config = AutoscalingConfig(cluster, skip_content_hash=True)
    demand = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1, "CPU": 1})] * actors)

    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_worker_nodes(),
            resource_requests=demand,
            recoverable_resource_availabilities=dict.fromkeys(unavailable, 0.0),
        )
    )
    return {request.instance_type: request.count for request in reply.to_launch}


def test_ray_accepts_the_launcher_file(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def test_without_work_only_the_head_runs(cluster: dict[str, Any]) -> None:
    workers = [node for name, node in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    assert [worker["min_workers"] for worker in workers] == [0, 0]
    assert cluster["available_node_types"][cluster["head_node_type"]]["max_workers"] == 0
    assert launched(cluster, actors=0) == {}


def test_the_head_is_on_demand_as_the_driver_lives_there(cluster: dict[str, Any]) -> None:
    assert not is_spot(cluster["available_node_types"][cluster["head_node_type"]])


def test_actors_bring_spot_nodes(cluster: dict[str, Any]) -> None:
    assert launched(cluster, actors=5) == {"gpu_spot": 5}
    assert is_spot(cluster["available_node_types"]["gpu_spot"])


def test_without_spot_capacity_nodes_come_on_demand_up_to_a_limit(cluster: dict[str, Any]) -> None:
    on_demand = launched(cluster, actors=5, unavailable=("gpu_spot",))["gpu_on_demand"]
    assert on_demand == cluster["available_node_types"]["gpu_on_demand"]["max_workers"] == 2
    assert not is_spot(cluster["available_node_types"]["gpu_on_demand"])


def test_both_worker_types_have_the_same_device_so_that_samples_have_the_same_bytes(cluster: dict[str, Any]) -> None:
    spot, on_demand = (cluster["available_node_types"][name] for name in ("gpu_spot", "gpu_on_demand"))
    assert machine(spot) == machine(on_demand)
    assert spot["resources"] == on_demand["resources"]
    for key in ("ImageId", "disks"):
        assert spot["node_config"].get(key) == on_demand["node_config"].get(key)


def test_a_fleet_never_exceeds_its_limit(cluster: dict[str, Any]) -> None:
    assert sum(launched(cluster, actors=1000).values()) == cluster["max_workers"]


def test_nodes_get_this_package_and_the_pinned_torch(cluster: dict[str, Any]) -> None:
    remote = "/home/ubuntu/ray-sampler/"
    mounted = {target: source for target, source in cluster["file_mounts"].items() if target.startswith(remote)}
    assert all((ROOT / source).exists() for source in mounted.values())
    assert {target.removeprefix(remote) for target in mounted} == set(mounted.values())
    assert {"pyproject.toml", "constraints.txt", "ray_sampler"} <= set(mounted.values())
    for commands in (cluster["head_setup_commands"], cluster["worker_setup_commands"]):
        assert any(
            "--constraint ~/ray-sampler/constraints.txt" in command and "ray-sampler[" in command
            for command in commands
        )


def test_what_the_package_needs_to_be_built_is_mounted() -> None:
    """setuptools fails where a file that pyproject.toml names is missing."""
    mounted = set(yaml.safe_load((ROOT / "cluster.yaml").read_text())["file_mounts"].values())
    assert {"README.md", "LICENSE"} <= mounted


def test_only_holders_of_the_token_reach_the_cluster(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in cluster["initialization_commands"])
    assert not any("--dashboard-host=0.0.0.0" in command for command in cluster["head_start_ray_commands"])


def test_workers_on_google_cloud_have_an_account_with_fewer_rights_than_the_heads() -> None:
    types = yaml.safe_load((ROOT / "deploy" / "gcp.yaml").read_text())["available_node_types"]
    accounts = {
        account["email"].partition("@")[0]
        for name, kind in types.items()
        if name != "head"
        for account in kind["node_config"]["serviceAccounts"]
    }
    (account,) = accounts
    assert account != "ray-autoscaler-sa-v1"
    assert f"gcloud iam service-accounts create {account}" in (ROOT / "docs" / "cluster.md").read_text()


def test_the_watcher_for_spot_notices_runs_on_the_workers_beside_what_was_installed(cluster: dict[str, Any]) -> None:
    """One at a time, and after the shell that starts it has ended."""
    *_, ray, spot = cluster["worker_start_ray_commands"]
    assert "ray start --address=$RAY_HEAD_IP:6379" in ray
    cloud = {"aws": "aws", "gcp": "gcp"}[cluster["provider"]["type"]]
    assert spot.startswith(f"setsid nohup flock -n ~/.ray-sampler-spot ray-sampler spot {cloud} < /dev/null")
    assert spot.rstrip().endswith("2>&1 &")
    assert cli.parse(["spot", cloud])[1].when == cloud
    assert 'ray-sampler = "ray_sampler.cli:entry"' in (ROOT / "pyproject.toml").read_text()
    assert not any("spot" in command for command in cluster["head_start_ray_commands"])


# The part of the published definition of ray.io/v1 RayJob (KubeRay 1.5.1 and newer) that the file uses: the required
# fields, their types and their choices. Other fields exist; here they would be typing errors.


def fields(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = required | (optional or {})
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


STRING, COUNT, BOOLEAN = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": STRING}
WORDS = {"type": "array", "minItems": 1, "items": STRING}
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
POD_TEMPLATE = fields(
    {
        "spec": fields(
            {
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": fields(
                        {"name": STRING, "image": STRING},
                        {
                            "ports": {"type": "array", "items": fields({"containerPort": COUNT}, {"name": STRING})},
                            "resources": fields({}, {"requests": QUANTITIES, "limits": QUANTITIES}),
                            "lifecycle": fields({"preStop": fields({"exec": fields({"command": WORDS})})}),
                        },
                    ),
                }
            },
            {
                "restartPolicy": {"enum": ["Never", "Always", "OnFailure"]},
                "serviceAccountName": STRING,
                "terminationGracePeriodSeconds": COUNT,
                "nodeSelector": STRINGS,
                "tolerations": {"type": "array", "items": STRINGS},
            },
        )
    }
)
RAY_CLUSTER = fields(
    {"headGroupSpec": fields({"rayStartParams": STRINGS, "template": POD_TEMPLATE})},
    {
        "rayVersion": STRING,
        "authOptions": fields({}, {"mode": {"enum": ["token", "disabled"]}}),
        "enableInTreeAutoscaling": BOOLEAN,
        "autoscalerOptions": fields(
            {},
            {
                "version": {"enum": ["v1", "v2"]},
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "idleTimeoutSeconds": COUNT,
            },
        ),
        "workerGroupSpecs": {
            "type": "array",
            "items": fields(
                {
                    "groupName": STRING,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": STRINGS,
                    "template": POD_TEMPLATE,
                },
                {"replicas": COUNT},
            ),
        },
    },
)
RAY_JOB = fields(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": fields({"name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?$"}}),
        "spec": fields(
            {"entrypoint": STRING, "rayClusterSpec": RAY_CLUSTER},
            {
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "backoffLimit": COUNT,
                "shutdownAfterJobFinishes": BOOLEAN,
                "ttlSecondsAfterFinished": COUNT,
            },
        ),
    }
)


@pytest.fixture
def ray_job() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((ROOT / "deploy/kuberay-rayjob.yaml").read_text())
    return job


def test_the_ray_job_has_the_published_structure(ray_job: dict[str, Any]) -> None:
    jsonschema.validate(ray_job, RAY_JOB)


def test_a_lost_driver_is_started_again_and_a_finished_one_frees_its_nodes(ray_job: dict[str, Any]) -> None:
    assert ray_job["spec"]["backoffLimit"] > 0
    assert ray_job["spec"]["shutdownAfterJobFinishes"] is True


def test_the_ray_jobs_command_is_one_that_finds_its_output_again_and_waits_for_gpus(ray_job: dict[str, Any]) -> None:
    shell, flag, line = shlex.split(ray_job["spec"]["entrypoint"])
    program, *argv = shlex.split(line.partition("||")[0])
    assert (shell, flag, program) == ("sh", "-c", "ray-sampler")
    config = request_of(cli.parse(argv)[1])
    assert str(config.output).startswith("s3://")
    assert config.gpus_per_actor == 1
    dry_run(config)


@pytest.mark.parametrize(("code", "repeated"), [(0, False), (2, False), (1, True), (137, True), (143, True)])
def test_the_ray_job_repeats_a_run_that_failed_but_no_wrong_request(
    code: int, repeated: bool, ray_job: dict[str, Any], tmp_path: Path
) -> None:
    """KubeRay repeats whatever fails. Its submitter puts the entrypoint into a separate shell line, and Ray does."""
    program = tmp_path / "ray-sampler"
    program.write_text(f"#!/bin/sh\nexit {code}\n")
    program.chmod(0o755)
    entrypoint = shlex.join(shlex.split(ray_job["spec"]["entrypoint"]))
    done = subprocess.run(entrypoint, shell=True, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (done.returncode != 0) == repeated


def test_a_pod_that_is_to_end_is_drained_first_and_has_the_time(ray_job: dict[str, Any]) -> None:
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    program, *argv = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    arguments = cli.parse(argv)[1]
    assert (program, arguments.when) == ("ray-sampler", "now")
    assert 0 < float(arguments.seconds) < pod["terminationGracePeriodSeconds"] <= 120  # what AWS gives


def test_the_ray_jobs_gpu_workers_scale_from_zero(ray_job: dict[str, Any]) -> None:
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert group["template"]["spec"]["restartPolicy"] == "Never"


def test_the_ray_job_has_the_pinned_ray(ray_job: dict[str, Any]) -> None:
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert f"rayproject/ray:{cluster['rayVersion']}-" in (ROOT / "deploy/kuberay-rayjob.yaml").read_text()
    images = {
        container["image"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
        for container in group["template"]["spec"]["containers"]
    }
    assert len(images) == 1


def test_the_dashboard_asks_for_each_metric_and_for_no_other() -> None:
    """Ray puts ray_ before the name that a program gives its metric."""
    dashboard = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert {name for query in queries for name in re.findall(r"ray_\w+", query)} == {f"ray_{name}" for name in METRICS}


def test_the_dashboards_panels_fit_on_its_grid_without_overlap() -> None:
    panels = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())["panels"]
    cells = [
        (column, row)
        for panel in panels
        for grid in (panel["gridPos"],)
        for column in range(grid["x"], grid["x"] + grid["w"])
        for row in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(column for column, _ in cells) == 23
    assert len({panel["id"] for panel in panels}) == len(panels)
