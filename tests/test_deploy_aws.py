"""The AWS file and its roles, against an AWS that is simulated: what may be done, and who may come in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config

from tests.conftest import ROOT


@pytest.fixture
def asked_of_aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of an AWS that is not there, as policies name it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps the keys that it makes
    asked: list[str] = []

    def hear(model: Any, **_: Any) -> None:
        asked.append(f"{model.service_model.service_name}:{model.name}")

    with mock_aws():
        boto3.setup_default_session()
        boto3.DEFAULT_SESSION.events.register("before-call", hear)
        yield asked
    boto3.DEFAULT_SESSION = None


def made_by_ray(file: str = "cluster.yaml") -> dict[str, Any]:
    """The AWS file as `ray up` has it when the first machine starts, with the group and the profile that it names."""
    config = prepare_config(yaml.safe_load((ROOT / file).read_text()))
    region = config["provider"]["region"]
    ec2, iam = boto3.resource("ec2", region), boto3.client("iam", region)
    group = ec2.create_security_group(GroupName="ours", Description="ours")
    for node_type in config["available_node_types"].values():
        node = node_type["node_config"]
        if "SecurityGroupIds" in node:
            node["SecurityGroupIds"] = [group.id]
    iam.create_instance_profile(InstanceProfileName="ray-sampler-worker")
    made: dict[str, Any] = bootstrap_aws(config)
    return made


def test_on_aws_no_port_is_open_to_the_world(asked_of_aws: list[str]) -> None:
    made = made_by_ray()
    groups = boto3.resource("ec2", made["provider"]["region"]).security_groups.all()
    admitted = [block for group in groups for rule in group.ip_permissions for block in rule["IpRanges"]]
    assert {"CidrIp": "0.0.0.0/0"} not in admitted


def test_on_aws_a_machine_gives_its_keys_to_holders_of_a_token_only() -> None:
    text = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for node_type in text["available_node_types"].values():
        options = node_type["node_config"]["MetadataOptions"]
        assert options == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}


def statements(file: str) -> list[dict[str, Any]]:
    found = json.loads((ROOT / "deploy" / file).read_text())["Statement"]
    return [
        {**each, "Action": [each["Action"]] if isinstance(each["Action"], str) else each["Action"]} for each in found
    ]


def test_the_heads_role_allows_what_ray_asks_of_aws_for_a_workers_life(asked_of_aws: list[str]) -> None:
    made = made_by_ray()
    asked_of_aws.clear()
    provider = AWSNodeProvider(made["provider"], made["cluster_name"])
    provider.create_node(made["available_node_types"]["gpu_spot"]["node_config"], {"ray-node-type": "worker"}, 1)
    (node,) = provider.non_terminated_nodes({})
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    assert provider.internal_ip(node)
    tags = provider.node_tags(node)
    assert tags["ray-cluster-name"] == "ray-sampler"
    provider.terminate_nodes([node])
    allowed = {action for each in statements("aws-head.json") for action in each["Action"]}
    assert {"ec2:RunInstances", "ec2:TerminateInstances"} <= set(asked_of_aws) <= allowed


def test_the_roles_allow_no_more_than_this_cluster_and_this_bucket() -> None:
    text = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    worker = text["available_node_types"]["gpu_spot"]["node_config"]
    named = {text["cluster_name"], worker["InstanceType"], worker["IamInstanceProfile"]["Arn"]}
    named |= {"required", "RunInstances"}
    for each in [*statements("aws-head.json"), *statements("aws-bucket.json")]:
        assert not any("*" in action for action in each["Action"])
        if each["Resource"] == "*":
            assert all(fnmatchcase(action, "ec2:Describe*") for action in each["Action"])
        if "ec2:TerminateInstances" in each["Action"] or str(each["Resource"]).endswith(":instance/*"):
            assert {value for test in each["Condition"].values() for value in test.values()} <= named
        if "iam:PassRole" in each["Action"]:
            assert each["Resource"].endswith(":role/ray-sampler-worker")
            assert each["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
