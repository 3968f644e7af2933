"""The limits of single settings: each refusal names the key as the user writes it, the limit and the value."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from conf import methods, model, partitions, schema

OUT_OF_RANGE = [
    (model.UpcycleConfig, "model.upcycle.num_experts", 1, "0 or >= 2"),
    (model.UpcycleConfig, "model.upcycle.num_experts", -2, "0 or >= 2"),
    (model.UpcycleConfig, "model.upcycle.experts_per_token", 0, ">= 1"),
    (model.UpcycleConfig, "model.upcycle.steps", 0, ">= 1"),
    (model.LoraConfig, "lora.rank", 0, ">= 1"),
    (model.LoraConfig, "lora.alpha", 0.0, "> 0"),
    (model.LoraConfig, "lora.alpha", math.inf, "> 0"),
    (schema.DataConfig, "data.held_out_fraction", 0.0, "in (0, 1)"),
    (schema.DataConfig, "data.held_out_fraction", 1.0, "in (0, 1)"),
    (schema.DataConfig, "data.max_length", 7, ">= 8"),
    (schema.DataConfig, "data.num_examples", 1, "null or >= 2"),
    (partitions.Iid, "partition.num_sites", 0, ">= 1"),
    (partitions.Dirichlet, "partition.num_sites", 0, ">= 1"),
    (partitions.Dirichlet, "partition.alpha", 0.0, "> 0"),
    (partitions.Dirichlet, "partition.alpha", math.nan, "> 0"),
    (partitions.Dirichlet, "partition.min_examples", 1, ">= 2"),
    (partitions.Pathological, "partition.classes_per_site", 0, ">= 1"),
    (partitions.Shard, "partition.shards_per_site", 0, ">= 1"),
    (methods.RetentionConfig, "method.retention.strength", -0.1, "in [0, 1]"),
    (methods.RetentionConfig, "method.retention.strength", 1.1, "in [0, 1]"),
    (methods.RetentionConfig, "method.retention.norm_guard", 0.9, "null or >= 1"),
    (schema.TrainConfig, "train.max_steps", 0, "null or >= 1"),
    (schema.TrainConfig, "train.learning_rate", 0.0, "> 0"),
    (schema.TrainConfig, "train.learning_rate", math.inf, "> 0"),
    (schema.TrainConfig, "train.batch_size", 0, ">= 1"),
    (schema.TrainConfig, "train.micro_batch", 0, "null, auto, or from 1 to train.batch_size=8"),
    (schema.TrainConfig, "train.micro_batch", 9, "null, auto, or from 1 to train.batch_size=8"),
    (schema.TrainConfig, "train.micro_batch", "all", "null, auto, or from 1 to train.batch_size=8"),
    (schema.TrainConfig, "train.weight_decay", -1.0, ">= 0"),
    (schema.TrainConfig, "train.weight_decay", math.inf, ">= 0"),
    (schema.TrainConfig, "train.max_grad_norm", 0.0, "> 0"),
    (schema.TrainConfig, "train.proximal_mu", -1.0, ">= 0"),
    (schema.TrainConfig, "train.proximal_mu", math.inf, ">= 0"),
    (schema.TrainConfig, "train.num_threads", 0, ">= 1"),
    (methods.GraftConfig, "method.graft.num_experts", 0, "in [1, 3]"),
    (methods.GraftConfig, "method.graft.num_experts", 4, "in [1, 3]"),
    (methods.GraftConfig, "method.graft.rank", -1, ">= 0"),
    (methods.GraftConfig, "method.graft.calibration_examples", 0, ">= 1"),
    (schema.EvalConfig, "eval.every", 0, ">= 1"),
    (schema.EvalConfig, "eval.max_examples", 0, "null or >= 1"),
    (schema.EvalConfig, "eval.batch_size", 0, ">= 1"),
    (schema.EvalConfig, "eval.num_answers", -1, ">= 0"),
    (schema.EvalConfig, "eval.max_new_tokens", 0, ">= 1"),
    (schema.EvalConfig, "eval.options", ["yes"], "empty or at least two texts"),
    (schema.EvalConfig, "eval.options", ["yes", ""], "texts that are not empty"),
    (schema.ChoicesConfig, "eval.choices.max_questions", 0, "null or >= 1"),
    (schema.FederationConfig, "federation.min_sites", 0, ">= 1"),
    (schema.FederationConfig, "federation.fraction", 0.0, "in (0, 1]"),
    (schema.FederationConfig, "federation.fraction", 1.01, "in (0, 1]"),
    (schema.FederationConfig, "federation.cpus_per_site", 0, ">= 1"),
    (schema.FederationConfig, "federation.gpus_per_site", -0.5, "null or >= 0"),
    (schema.FederationConfig, "federation.join_timeout_seconds", 0.0, "> 0"),
    (schema.FederationConfig, "federation.round_timeout_seconds", 0.0, "> 0"),
    (schema.WorkerConfig, "worker.idle_minutes", 0.0, "in (0, 1440]"),
    (schema.WorkerConfig, "worker.idle_minutes", 1441.0, "in (0, 1440]"),
]


@pytest.mark.parametrize(("group", "key", "value", "limit"), OUT_OF_RANGE)
def test_value_out_of_range_is_refused_by_key_limit_and_value(group, key, value, limit):
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{key} must be {limit}, got {value!r}')}$"):
        group(**{key.rpartition(".")[2]: value})


def test_every_number_has_a_limit_tested_here():
    """So that a new setting without a check does not go unnoticed; seeds and rounds are checked with the whole."""
    tested = {(group, key.rpartition(".")[2]) for group, key, _, _ in OUT_OF_RANGE}
    for group in {group for group, _ in tested}:
        for field in dataclasses.fields(group):
            if str(field.type).removesuffix(" | None") in ("int", "float"):
                inherited = any((base, field.name) in tested for base in group.__mro__)
                counted = (partitions.Iid, field.name) in tested
                assert inherited or counted, f"{group.__name__}.{field.name}"


def test_more_experts_a_token_than_experts_are_refused():
    with pytest.raises(
        ValueError, match=r"model.upcycle.experts_per_token must be <= model.upcycle.num_experts=4, got 5"
    ):
        model.UpcycleConfig(num_experts=4, experts_per_token=5)


@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_limits_themselves_are_allowed(limit):
    assert schema.FederationConfig(fraction=limit).fraction == limit
    assert methods.RetentionConfig(strength=limit).strength == limit
