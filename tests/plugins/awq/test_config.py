"""The configuration validates itself and survives JSON."""

import json

import pytest

from pronghorn.awq import AwqConfig


@pytest.mark.parametrize(
    ("fields", "kind", "named"),
    [
        ({"bits": 5}, ValueError, "bits"),
        ({"bits": True}, ValueError, "bits"),
        ({"bits": 4.0}, ValueError, "bits"),
        ({"bits": 3}, ValueError, "version='natural'"),
        ({"search_result": 3}, TypeError, "search_result"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"group_size": -2}, ValueError, "group_size"),
        ({"group_size": 32.0}, ValueError, "group_size"),
        ({"version": "gemmm"}, ValueError, "version"),
        ({"version": "marlin"}, ValueError, "symmetric"),
        ({"method": "gptq"}, ValueError, "method"),
        ({"zero_point": 1}, TypeError, "zero_point"),
        ({"clip": None}, TypeError, "clip"),
        ({"grid": 0}, ValueError, "grid"),
        ({"n_samples": -1}, ValueError, "n_samples"),
        ({"seq_len": 1.5}, ValueError, "seq_len"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "modules_to_not_convert"),
        ({"scale_groups": [{"prev": "a"}]}, ValueError, "scale_groups"),
    ],
)
def test_bad_values_are_named(fields, kind, named):
    with pytest.raises(kind, match=named):
        AwqConfig(**fields)


@pytest.mark.parametrize(
    "fields", [{}, {"bits": 3, "version": "natural"}, {"version": "marlin", "zero_point": False}, {"group_size": -1}]
)
def test_json_round_trip(fields):
    config = AwqConfig(**fields)
    written = json.loads(config.to_json_string())
    assert written["quant_method"] == ("pronghorn_awq" if config.version == "natural" else "awq")
    assert AwqConfig.from_dict(written) == config


def test_older_names_are_read():
    config = AwqConfig.from_dict({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMV"})
    assert (config.group_size, config.bits, config.version) == (64, 4, "gemv")
    assert AwqConfig.from_dict({"quant_method": "awq", "bits": 4, "format": "llm-awq"}).layout == "gemv_fast"
    with pytest.raises(ValueError, match="quant_method"):
        AwqConfig.from_dict({"quant_method": "gptq"})
