"""The settings: the paper's defaults, what they refuse, JSON."""

import json

import pytest

from pronghorn.vcpo import VCPOSettings


def test_the_papers_values():
    config = VCPOSettings()
    assert (config.is_truncation, config.max_grad_norm, config.ess_reference) == (8.0, 1.0, 1.0)
    assert (config.opob, config.opob_weight, config.opob_aggregation) == ("group", "paper", "mean")
    assert (config.ess_scaling, config.ess_space, config.loss_aggregation) == ("sqrt", "log", "seq-mean-token-mean")


def test_json():
    config = VCPOSettings(
        is_truncation=None, opob="minibatch", opob_weight="exact", ess_reference="auto", ess_scaling="linear"
    )
    assert VCPOSettings.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="clip_rho"):
        VCPOSettings.from_dict({"clip_rho": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_truncation", 0.0), ("is_truncation", float("nan")), ("log_ratio_clamp", -20), ("opob", "prompt"),
        ("opob_weight", "code"), ("opob_aggregation", "mode"), ("opob_norm_by_std", 1), ("use_is_weights", None),
        ("ess_scaling", "log"), ("ess_reference", 0), ("ess_reference", 1.5), ("ess_reference", "first"),
        ("ess_reference_decay", 1.0), ("ess_use_clipped", "no"), ("ess_space", "linear"),
        ("loss_aggregation", "token-mean"), ("max_grad_norm", -1),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(name, value):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: got"):
        VCPOSettings(**{name: value})


@pytest.mark.parametrize("changed", [{"use_is_weights": False}, {"normalize_by_length": True}])
def test_the_exact_weight_has_no_options(changed):
    with pytest.raises(ValueError, match="no meaning with opob_weight='exact'"):
        VCPOSettings(opob_weight="exact", **changed)
