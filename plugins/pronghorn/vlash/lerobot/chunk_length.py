"""How many actions a LeRobot policy predicts, which each kind of policy says in its own words."""

from __future__ import annotations

from lerobot.configs import PreTrainedConfig


def predicted_actions(config: PreTrainedConfig) -> int:
    """Actions from the current one on that a policy predicts at a time.

    Raises:
        ValueError: it predicts no chunks, or keeps a history of observations of its own that cannot be led.
    """
    if hasattr(config, "horizon") and config.type == "diffusion":
        # Its horizon begins with the oldest observation that it sees.
        return int(config.horizon) - config.n_obs_steps + 1
    if not hasattr(config, "chunk_size") or config.n_obs_steps != 1:
        raise ValueError(
            f"base: got {config.type!r}, wanted a policy that predicts chunks (its configuration has a chunk_size) "
            "from one observation, like act, smolvla, pi0 and pi05, or diffusion"
        )
    return int(config.chunk_size)


def with_chunk_size(config: PreTrainedConfig, chunk_size: int) -> PreTrainedConfig:
    """Have a policy predict, and give away, that many actions; changes `config`.

    Raises:
        ValueError: a diffusion policy's horizon is too short for it.
    """
    if config.type == "diffusion":
        longest = predicted_actions(config)
        if chunk_size > longest:
            raise ValueError(
                f"chunk_size: got {chunk_size}, wanted at most {longest}, or a larger horizon: "
                f"--policy.base_config='{{\"horizon\": {_horizon_for(config, chunk_size)}}}'"
            )
    else:
        config.chunk_size = chunk_size
    config.n_action_steps = chunk_size
    return config


def _horizon_for(config: PreTrainedConfig, chunk_size: int) -> int:
    multiple = 2 ** len(config.down_dims)
    return -(-(chunk_size + config.n_obs_steps - 1) // multiple) * multiple
