"""A policy that takes 100 ms, in a control loop at 30 Hz; then robots that follow targets, with and without delay."""

import time

import torch

from pronghorn.vlash.chunks import Observation
from pronghorn.vlash.config import VLASHSettings
from pronghorn.vlash.control import control_loop
from pronghorn.vlash.runner import AsyncRunner
from pronghorn.vlash.sweep import Method, rollout
from pronghorn.vlash.tracking import CHUNK, REACH, ExpertPolicy, TrackingEnvironment

FPS = 30


def slow_policy(request):
    """Chunks of 16 goals that lead from the state it is asked for to zero."""
    time.sleep(0.1)
    return request.state * torch.linspace(1, 0, 17)[1:, None]


def in_real_time(mode):
    robot = torch.tensor([1.0, -0.5])
    overlap = 4 if mode == "vlash" else 0
    settings = VLASHSettings(mode, chunk_size=16, n_action_steps=8, inference_overlap_steps=overlap, fps=FPS)
    with AsyncRunner(slow_policy, settings) as runner:
        record = control_loop(runner, lambda: Observation(None, robot.clone()), robot.copy_, fps=FPS, steps=60)
    print(
        f"{mode:5}: 60 commands in {record.times[-1]:.1f} s, "
        f"of which {record.stall_seconds:.2f} s waiting for {record.stalls} chunks"
    )


def in_simulation(mode, delay):
    """A planner that knows how old its observation is under vlash, not under naive; changes are added up."""
    settings = VLASHSettings(
        mode, chunk_size=CHUNK, n_action_steps=max(delay, 1), inference_overlap_steps=delay,
        state_estimator="sum_delta", action_low=[-REACH] * 2, action_high=[REACH] * 2,
    )  # fmt: skip
    method = Method(settings, ExpertPolicy(told_delay=mode == "vlash"))
    return rollout(TrackingEnvironment(256), method, mode, delay, seed=0)


def main():
    torch.set_num_threads(1)
    for mode in ("sync", "vlash"):
        in_real_time(mode)
    print("Share of the time in which a robot is near its target, when the policy takes 0 to 4 control steps:")
    for mode in ("naive", "vlash"):
        rows = [in_simulation(mode, delay) for delay in range(5)]
        print(f"{mode:5}: " + ", ".join(f"{row.success:.2f}" for row in rows))


if __name__ == "__main__":
    main()
