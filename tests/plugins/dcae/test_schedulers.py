"""The samplers of UViT and USiT, on data whose noise and velocity are known."""

import copy
import math

import diffusers
import numpy as np
import pytest
import torch

from pronghorn.dcae import DPMSolverFastScheduler, FlowODEScheduler

MEAN, STD = 0.7, 0.5  # of the data
LOG_ALPHAS = 0.5 * np.log(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumsum()


def alpha_sigma(timestep):
    log_alpha = np.interp(float(timestep), np.arange(1000), LOG_ALPHAS)
    return math.exp(log_alpha), math.sqrt(1 - math.exp(2 * log_alpha))


def noise_of(x, timestep):
    alpha, sigma = alpha_sigma(timestep)
    return sigma * (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)


def ends_at(x):
    """Where the exact way from the last training step leads to at the first."""
    (a0, s0), (a1, s1) = alpha_sigma(999), alpha_sigma(0)
    return a1 * MEAN + math.hypot(a1 * STD, s1) / math.hypot(a0 * STD, s0) * (x - a0 * MEAN)


def start(dtype=torch.float64):
    return torch.linspace(-2, 2, 8, dtype=dtype).reshape(1, 2, 2, 2)


def sampled(scheduler, evaluations, x=None, answer=noise_of):
    x = start() if x is None else x
    scheduler.set_timesteps(evaluations)
    for timestep in scheduler.timesteps:
        x = scheduler.step(answer(scheduler.scale_model_input(x, timestep), timestep), timestep, x).prev_sample
    return x


def error(evaluations):
    return float((sampled(DPMSolverFastScheduler(), evaluations) - ends_at(start())).abs().max())


def test_third_order():
    coarse, fine = error(242), error(482)  # all but the last step are of third order, and that one of second
    assert 7 < coarse / fine < 9
    assert fine < 1e-4
    assert error(30) < 0.05
    for lower in (240, 241):  # end with a step of first order, which decides
        assert error(242) < error(lower) < 0.005


def test_as_diffusers_solvers_where_steps_are_many():
    for kind in (diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler):
        other = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", solver_order=3,
                     final_sigmas_type="sigma_min")  # fmt: skip
        theirs = sampled(other, 480)
        assert (theirs - ends_at(start())).abs().max() < 2e-3
        torch.testing.assert_close(sampled(DPMSolverFastScheduler(), 482), theirs, rtol=0, atol=2e-3)


def test_steps_are_exact_for_what_their_order_knows():
    """A data prediction that does not change is followed exactly by all, one linear in log-SNR by third order."""

    def signal(timestep):
        alpha, sigma = alpha_sigma(timestep)
        return math.log(alpha / sigma)

    def answer(slope):
        def noise(x, timestep):
            alpha, sigma = alpha_sigma(timestep)
            return (x - alpha * (MEAN + slope * signal(timestep))) / sigma

        return noise

    for evaluations in (1, 2, 3, 4, 5, 6):
        (a0, s0), (a1, s1) = alpha_sigma(999), alpha_sigma(0)
        wanted = a1 * MEAN + s1 / s0 * (start() - a0 * MEAN)
        torch.testing.assert_close(sampled(DPMSolverFastScheduler(), evaluations, answer=answer(0.0)), wanted)

    scheduler, slope = DPMSolverFastScheduler(), 0.3
    scheduler.set_timesteps(4)
    x, times = start(), scheduler.timesteps
    for timestep in times[:3]:
        x = scheduler.step(answer(slope)(x, timestep), timestep, x).prev_sample
    # d(x / sigma) = (alpha / sigma) m d(log alpha / sigma), and the integral of e^u (MEAN + slope u) is known.
    u0, u1 = signal(times[0]), signal(times[3])
    gained = math.exp(u1) * (MEAN + slope * (u1 - 1)) - math.exp(u0) * (MEAN + slope * (u0 - 1))
    wanted = alpha_sigma(times[3])[1] * (start() / alpha_sigma(times[0])[1] + gained)
    torch.testing.assert_close(x, wanted, rtol=1e-6, atol=1e-6)


def test_second_order_is_the_papers_and_not_another():
    """Lu et al. (arXiv 2211.01095), algorithm 1, for which DPM-Solver++(2S) is one of several of this order."""
    scheduler = DPMSolverFastScheduler()
    answers = []
    found = sampled(scheduler, 2, answer=lambda x, t: answers.append((x, noise_of(x, t))) or answers[-1][1])
    (a0, s0), (a1, s1), (a2, s2) = (alpha_sigma(t) for t in (*scheduler.timesteps, 0))
    (x0, e0), (x1, e1) = answers
    m0, m1 = (x0 - s0 * e0) / a0, (x1 - s1 * e1) / a1
    h = math.log(a2 / s2) - math.log(a0 / s0)
    r = (math.log(a1 / s1) - math.log(a0 / s0)) / h
    data = (1 - 1 / (2 * r)) * m0 + m1 / (2 * r)
    torch.testing.assert_close(found, s2 / s0 * x0 - a2 * math.expm1(-h) * data)


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 5, 30])
def test_evaluations_are_known_before(evaluations):
    scheduler = DPMSolverFastScheduler()
    scheduler.set_timesteps(evaluations)
    wanted = torch.linspace(999, 0, evaluations + 1)[:-1]
    torch.testing.assert_close(scheduler.timesteps, wanted)
    asked = []
    sampled(scheduler, evaluations, answer=lambda x, t: asked.append(t) or x)
    assert len(asked) == evaluations


def test_dtypes_and_copies():
    scheduler = DPMSolverFastScheduler()
    rough = sampled(scheduler, 30, start(torch.bfloat16))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.double(), sampled(scheduler, 30), rtol=0.05, atol=0.05)
    scheduler.set_timesteps(5)
    x = scheduler.step(noise_of(start(), 999), scheduler.timesteps[0], start(), return_dict=False)[0]
    again = copy.deepcopy(scheduler)
    noise = noise_of(x, scheduler.timesteps[1])
    found = [each.step(noise, each.timesteps[1], x).prev_sample for each in (scheduler, again)]
    assert torch.equal(*found)


def test_settings_are_saved_and_go_to_others(tmp_path):
    scheduler = DPMSolverFastScheduler(num_train_timesteps=500, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    scheduler.save_pretrained(tmp_path / "dpm")
    again = DPMSolverFastScheduler.from_pretrained(tmp_path / "dpm")
    x = start(torch.float32)
    assert torch.equal(sampled(scheduler, 7, x), sampled(again, 7, x))
    assert not torch.equal(sampled(scheduler, 7, x), sampled(DPMSolverFastScheduler(), 7, x))
    other = diffusers.DPMSolverMultistepScheduler.from_config(DPMSolverFastScheduler().config)
    torch.testing.assert_close(other.alphas_cumprod.log() / 2, torch.tensor(LOG_ALPHAS).float())
    FlowODEScheduler(method="heun2", rtol=0.1).save_pretrained(tmp_path / "flow")
    loaded = FlowODEScheduler.from_pretrained(tmp_path / "flow").config
    assert (loaded.method, loaded.rtol, loaded.atol) == ("heun2", 0.1, 1e-6)


def test_steps_out_of_turn_are_named():
    scheduler, x = DPMSolverFastScheduler(), start()
    with pytest.raises(ValueError, match="wanted one that set_timesteps gave"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match="inside a step"):
        scheduler.step(x, scheduler.timesteps[1], x)
    sampled(scheduler, 6)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 0, x)
    for values, match in (({"beta_schedule": "cosine"}, "beta_schedule: got"), ({"beta_end": 2.0}, "betas and steps"),
                          ({"prediction_type": "sample"}, "prediction_type: got")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            DPMSolverFastScheduler(**values)
    with pytest.raises(ValueError, match="num_inference_steps: got 0"):
        scheduler.set_timesteps(0)


def velocity(x, time):
    """Of noise that becomes data of MEAN and STD: the way of each sample is t · MEAN + its spread · x₀."""
    t = float(time)
    return MEAN + (t * STD**2 - (1 - t)) / ((t * STD) ** 2 + (1 - t) ** 2) * (x - t * MEAN)


def flow_error(evaluations=None, **settings):
    asked = []

    def counted(x, time):
        asked.append(float(time))
        return velocity(x, time)

    found = FlowODEScheduler(**settings).integrate(counted, start(), evaluations or 250)
    return float((found - (MEAN + STD * start())).abs().max()), asked


def test_flow_from_noise_to_data():
    assert flow_error()[0] < 0.01
    tight, asked = flow_error(rtol=1e-8, atol=1e-10)
    assert tight < 1e-8
    assert 0 <= min(asked) < max(asked) <= 1.5  # an adaptive step may go past the end, and is read inside
    for method, order, of_each in (("heun2", 2, 2), ("euler", 1, 1)):
        (coarse, _), (fine, asked) = flow_error(40, method=method), flow_error(80, method=method)
        assert len(asked) == 80 * of_each
        assert coarse / fine == pytest.approx(2**order, rel=0.1)
    for steps in (1, 49, 250):  # some of these, divided into 1, round up
        assert len(flow_error(steps, method="euler")[1]) == steps


def test_bad_flows_are_named():
    with pytest.raises(ValueError, match="method: got 'rk4', accepted are dopri5, heun2, euler"):
        FlowODEScheduler(method="rk4")
    with pytest.raises(ValueError, match="rtol: got 0"):
        FlowODEScheduler(rtol=0)
    with pytest.raises(ValueError, match="num_inference_steps: got 0"):
        FlowODEScheduler().integrate(velocity, start(), 0)
