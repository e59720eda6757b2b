"""A run's identity is all that decides a sample's content, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from ray_sampler.config import RunConfig
from ray_sampler.storage.record import fingerprint
from tests.resolving import NO_HEADS, SMALL, resolve, resolved


def identity(brought: Mapping[str, Any] | None = None, **flags: Any) -> dict[str, Any]:
    return resolve(brought, **flags).identity("hash")


HEUN_WITH_CHURN: dict[str, Any] = {"s_churn": 1.0}
ONESTEP: dict[str, Any] = {"sampler": "onestep"}
CONSISTENCY: dict[str, Any] = {"training_mode": "consistency_distillation"}
CONDITIONAL: dict[str, Any] = {"class_cond": True}

UNUSED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"s_noise": 1.1}),
    ({}, {"s_tmin": 1.0}),
    ({}, {"s_tmax": 10.0}),
    ({"sampler": "euler"}, HEUN_WITH_CHURN),
    ({"sampler": "ancestral"}, HEUN_WITH_CHURN | {"s_noise": 1.1}),
    ({}, {"ts": "0,22,39"}),
    (ONESTEP, {"steps": 6}),
    (ONESTEP, {"sigma_min": 0.01}),
    (ONESTEP, {"ts": "0,3"}),
    ({}, {"num_heads": 8}),
    ({}, {"num_heads_upsample": 2}),
    ({}, {"num_classes": 10}),
    ({}, {"attention_resolutions": "16,16"}),
    ({}, {"attention_resolutions": "16,2"}),
    ({}, {"attention_resolutions": "64,16"}),
    ({}, {"channel_mult": "1.0,2"}),
    ({}, {"sigma_max": 80}),
    (HEUN_WITH_CHURN, {"s_churn": 1}),
    ({}, {"s_churn": 0}),
    (HEUN_WITH_CHURN | {"s_tmax": 50.0}, {"s_tmax": 50}),
    (CONSISTENCY, {"training_mode": "consistency_training"}),
    ({}, {"training_mode": "progdist"}),
    ({}, {"use_checkpoint": True}),
    ({}, {"use_new_attention_order": True}),
    ({}, {"weight_schedule": "uniform"}),
    ({}, {"dropout": 0.5}),
    ({}, {"batch_size": 7}),
    ({}, {"shard_size": 7}),
    ({}, {"fragment_format": "npz"}),
    ({}, {"min_actors": 4}),
    ({}, {"max_actors": 4}),
    ({}, {"gpus_per_actor": 1.0}),
    ({}, {"compile": "on"}),
    ({}, {"address": "auto"}),
    ({}, {"output": "s3://bucket/run"}),
    ({}, {"progress": "none"}),
    ({}, {"overwrite": True}),
    ({}, {"num_samples": 50000}),
]


@pytest.mark.parametrize(("flags", "unused"), UNUSED)
def test_what_decides_no_sample_leaves_the_identity_alone(flags: dict[str, Any], unused: dict[str, Any]) -> None:
    assert fingerprint(identity(**flags | unused)) == fingerprint(identity(**flags))


USED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"seed": 43}),
    ({}, {"generator": "determ"}),
    ({}, {"sampler": "dpm"}),
    ({}, {"steps": 41}),
    ({}, {"sigma_min": 0.003}),
    ({}, {"sigma_max": 70.0}),
    (ONESTEP, {"sigma_max": 70.0}),
    (ONESTEP | CONSISTENCY, {"sigma_min": 0.003}),
    ({}, HEUN_WITH_CHURN),
    ({"sampler": "dpm"}, HEUN_WITH_CHURN),
    (HEUN_WITH_CHURN, {"s_noise": 1.1}),
    (HEUN_WITH_CHURN, {"s_tmin": 1.0}),
    (HEUN_WITH_CHURN, {"s_tmax": 10.0}),
    ({"sampler": "multistep", "ts": "0,22,39"}, {"ts": "0,17,39"}),
    ({"sampler": "multistep", "ts": "0,22,39"}, {"steps": 41}),
    ({}, {"clip_denoised": False}),
    ({}, {"rounding": "nearest"}),
    ({}, CONSISTENCY),
    ({}, {"precision": "bf16"}),
    ({"precision": "fp32"}, {"precision": "fp16"}),
    ({}, {"num_channels": 64}),
    ({}, {"num_res_blocks": 2}),
    ({}, {"channel_mult": "1,1"}),
    ({}, {"attention_resolutions": "32,16"}),
    ({}, {"attention_resolutions": ""}),
    ({}, {"num_head_channels": 16}),
    (NO_HEADS, {"num_heads": 2}),
    (NO_HEADS, {"num_heads_upsample": 2}),
    ({}, {"use_scale_shift_norm": False}),
    ({}, {"resblock_updown": True}),
    ({}, CONDITIONAL),
    (CONDITIONAL, {"num_classes": 10}),
]


@pytest.mark.parametrize(("flags", "used"), USED)
def test_what_decides_samples_is_in_the_identity(flags: dict[str, Any], used: dict[str, Any]) -> None:
    assert fingerprint(identity(**flags | used)) != fingerprint(identity(**flags))


@pytest.mark.parametrize(
    ("generator", "depends"), [("philox", False), ("determ", True), ("determ-indiv", True), ("dummy", True)]
)
def test_num_samples_counts_for_the_generators_that_depend_on_it_only(generator: str, depends: bool) -> None:
    few, many = (identity(generator=generator, num_samples=n) for n in (100, 200))
    assert ("num_samples" in few) == depends
    assert (fingerprint(few) != fingerprint(many)) == depends


def test_an_explicit_value_has_the_identity_of_the_brought_one() -> None:
    assert identity(SMALL | {"steps": 18}) == identity(steps=18)
    assert identity(NO_HEADS | SMALL | NO_HEADS, num_heads_upsample=4) == identity(SMALL | NO_HEADS)
    assert identity({}, channel_mult="1,2,3,4") == identity({})


def test_weights_and_labels_are_in_the_identity() -> None:
    requests = [
        RunConfig(class_cond=True, num_classes=10, labels=labels)
        for labels in (None, "balanced", "1,2", "2,1", "1,2,1")
    ]
    runs = [resolved(request, "digits", SMALL, gpus=0) for request in requests] + [resolve(class_cond=False)]
    identities = [run.identity(weights) for weights in ("one", "two") for run in runs]
    assert len({fingerprint(each) for each in identities}) == len(identities)


def test_the_fingerprint_depends_on_content_alone() -> None:
    one = identity()
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(one))
    assert fingerprint(dict(reversed(one.items()))) == fingerprint(one)
    assert fingerprint(json.loads(json.dumps(one))) == fingerprint(one)
