"""A delay sweep of a user's own checkpoint in gym-pusht, as it is typed."""

import json

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies import get_policy_class, make_policy, make_pre_post_processors
from lerobot.scripts import lerobot_eval
from tiny_lerobot import ACT, DIFFUSION, PI, perturbed
from typer.testing import CliRunner

from pronghorn.vlash.cli import app
from pronghorn.vlash.lerobot.configuration_vlash import VLASHConfig
from pronghorn.vlash.lerobot.environment_task import EnvironmentTask
from pronghorn.vlash.sweep import rollout, sweep

STATE, BLOCK, ACTION = "observation.state", "observation.environment_state", "action"
OPTIONS = {"obs_type": "environment_state_agent_pos", "episode_length": 14}
WORDS = [word for pair in OPTIONS.items() for word in ("--env-option", "{}={}".format(*pair))]


def features(state_dim=2, action_dim=2):
    return {
        "input_features": {
            STATE: PolicyFeature(FeatureType.STATE, (state_dim,)), BLOCK: PolicyFeature(FeatureType.ENV, (16,)),
        },
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (action_dim,))},
    }  # fmt: skip


def statistics(name, size):
    middle, reach = torch.full((size,), 256.0), torch.full((size,), 100.0)
    return {name: {"mean": middle, "std": reach, "min": middle - reach, "max": middle + reach}}


def saved(folder, kind, sizes=(2, 2), **options):
    """A checkpoint of a policy that is told what pusht's simulator knows."""
    torch.manual_seed(0)
    config = PreTrainedConfig.get_choice_class(kind)(device="cpu", **features(*sizes), **options)
    stats = statistics(STATE, sizes[0]) | statistics(BLOCK, 16) | statistics(ACTION, sizes[1])
    get_policy_class(kind)(config, dataset_stats=stats).save_pretrained(folder)
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def act(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("act"), "act", **ACT, chunk_size=8, n_action_steps=4)


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("vlash"), "vlash", base="act", base_config=ACT, chunk_size=8, n_action_steps=4)


def run(*words):
    done = CliRunner().invoke(app, ["sweep", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_sweep_as_it_is_typed_that_goes_on_where_it_ended(act, tmp_path, monkeypatch):
    rows, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    words = (
        "--env",
        "pusht",
        "--policy",
        act,
        *WORDS,
        "--modes",
        "sync,naive,vlash",
        "--delays",
        "0,3",
        "--json",
        rows,
    )
    said = run(*words, "--seeds", 1, "--png", picture)
    assert "largest reward at delay" in said
    first = json.loads(rows.read_text())
    assert first["about"]["options"] == OPTIONS
    assert len(first["rows"]) == 6
    for row in first["rows"]:
        assert (row["episodes"], row["n_action_steps"], row["steps"], row["success"]) == (1, 4, 14, 0)
        assert row["stalls"] == (1 if row["mode"] != "sync" and row["delay"] else 4)
        assert row["stall_seconds"] == pytest.approx(row["stalls"] * row["delay"] / 10)
        assert min(row["boundary_jump"], row["typical_step"], row["jerk"]) > 0
        assert 0 <= row["reward_largest"] <= row["reward_sum"] <= 14 * row["reward_largest"]
    late = {row["mode"]: row for row in first["rows"] if row["delay"] == 3}
    assert late["sync"]["reaction_worst"] == pytest.approx(1.0)
    assert late["vlash"]["reaction_worst"] == pytest.approx(0.7)

    monkeypatch.setattr("pronghorn.vlash.sweep.rollout", rolled := Rolled())
    run(*words, "--seeds", 2)
    assert sorted(rolled.seeds) == [1] * 6
    assert json.loads(rows.read_text())["rows"][::2] == first["rows"]


class Rolled:
    """Notes what is run, and runs it."""

    def __init__(self):
        self.seeds = []

    def __call__(self, environment, method, mode, delay, seed):
        self.seeds.append(seed)
        return rollout(environment, method, mode, delay, seed)


@pytest.mark.parametrize(("mode", "delay"), [("sync", 0), ("naive", 2), ("vlash", 3)])
def test_an_episode_is_that_of_lerobot_eval(wrapped, command, tmp_path, mode, delay):
    """The largest and the sum of its rewards, which tell any other command."""
    task = EnvironmentTask("pusht", str(wrapped), options=OPTIONS)
    environment = task.environment()
    row = rollout(environment, task.method(mode, delay, 7, environment), mode, delay, 7)
    command(
        lerobot_eval.main, f"--policy.path={wrapped}", "--env.type=pusht", "--seed=7", "--policy.device=cpu",
        *(f"--env.{name}={value}" for name, value in OPTIONS.items()), "--eval.batch_size=1", "--eval.n_episodes=1",
        "--eval.use_async_envs=false", f"--policy.async_mode={mode}", f"--policy.inference_overlap_steps={delay}",
        f"--output_dir={tmp_path}",
    )  # fmt: skip
    (of_task,) = json.loads((tmp_path / "eval_info.json").read_text())["per_task"]
    assert row.reward_largest == pytest.approx(of_task["metrics"]["max_rewards"][0], rel=1e-5)
    assert row.reward_sum == pytest.approx(of_task["metrics"]["sum_rewards"][0], rel=1e-5)


def test_a_policy_with_a_memory_gives_all_that_it_predicts(tmp_path):
    options = {name: value for name, value in DIFFUSION.items() if name not in ("use_group_norm",)}
    path = saved(tmp_path, "diffusion", **options, n_action_steps=8)
    task = EnvironmentTask("pusht", str(path), options=OPTIONS, episodes=2)
    task.check(["sync_real_time", "naive", "vlash"], [0, 7])
    environment = task.environment()
    rows = [rollout(environment, task.method("naive", 4, 0, environment), "naive", 4, seed) for seed in (3, 3, 4)]
    assert (rows[0].episodes, rows[0].n_action_steps) == (2, 8)
    assert rows[0] == rows[1]
    assert rows[0].jerk != rows[2].jerk
    assert len(environment._frames) == 2
    with pytest.raises(ValueError, match=r"naive at a delay of 8: .*leaves out 8 actions"):
        task.check(["naive"], [8])


@pytest.mark.usefixtures("tiny_pi")
def test_real_time_chunking_leaves_other_modes_as_they_are(tmp_path, tokenizer, meta):
    """From pixels, with words; each mode does the same before and after the others."""
    config = VLASHConfig(
        base="pi05", base_config=PI, tokenizer=str(tokenizer), device="cpu", chunk_size=8, n_action_steps=4
    )
    perturbed(make_policy(config, ds_meta=meta)).save_pretrained(tmp_path)
    for processor in make_pre_post_processors(config):
        processor.save_pretrained(tmp_path)
    task = EnvironmentTask("pusht", str(tmp_path), options={"episode_length": 8})
    modes = ["sync", "naive", "rtc", "rtc_full", "vlash"]
    task.check(modes, [2])
    once = {row.mode: row for row in sweep(task, modes, [2], [0])}
    again = {row.mode: row for row in sweep(task, modes[::-1], [2], [0])}
    assert once == again
    assert len({row.boundary_jump for row in once.values()}) == 5


def test_success_is_kept_and_nothing_counts_after_it(act):
    environment = EnvironmentTask("pusht", str(act), options=OPTIONS, episodes=2).environment()
    environment.reset(0)
    shares = [0.0, 0.0]
    for number, each in enumerate(environment._env.envs):
        each.unwrapped._get_coverage = lambda number=number: shares[number]
    for shares[:] in ([0.19, 0.0], [0.96, 0.38], [0.57, 0.19]):
        environment.step(torch.full((2, 2), 100.0))
    assert environment.success().tolist() == [1, 0]
    assert environment.finished.tolist() == [True, False]
    torch.testing.assert_close(environment.rewards(), (torch.tensor([1.0, 0.4]), torch.tensor([1.2, 0.6])))
    environment.reset(0)
    assert environment.success().tolist() == [0, 0]
    assert not environment.finished.any()


def test_another_training_is_another_sweep(act, tmp_path):
    rows = tmp_path / "rows.json"
    words = (
        "--env",
        "pusht",
        *WORDS,
        "--modes",
        "sync",
        "--delays",
        "0",
        "--seeds",
        1,
        "--json",
        rows,
        "--policy",
        act,
    )
    run(*words)
    with torch.no_grad():
        policy = get_policy_class("act").from_pretrained(act)
        before = {name: value.clone() for name, value in policy.state_dict().items()}
        policy.model.action_head.weight += 0.01
    policy.save_pretrained(act)
    with pytest.raises(ValueError, match="holds a sweep of pusht"):
        run(*words)
    policy.load_state_dict(before)
    policy.save_pretrained(act)
    run(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--env", "pushT"], "env: got 'pushT', accepted are aloha, .*pusht"),
        (["--env", "pusht", "--env-option", "speed=3"], "env_option: got .* for pusht: .*speed"),
        (["--env", "pusht", "--env-option", "episode_length=long"], "env_option: .*episode_length"),
        (["--env", "pusht", "--env-option", "task"], "env_option: got 'task', wanted name=value"),
        (["--env", "pusht", "--modes", "bid"], "modes: got bid, accepted for pusht are sync, "),
        (["--env", "pusht", "--modes", "sync,rtc"], "modes: rtc at a delay of 0: .*'act'.*cannot guide"),
        (["--env", "pusht", "--modes", "vlash", "--delays", "4,5"], "vlash at a delay of 5: .*got 5, wanted 0 to"),
        (["--env", "pusht", "--modes", "naive", "--setting", "n_action_steps=8"], "leaves out 1 actions of a chunk"),
        (
            ["--env", "pusht", "--modes", "vlash", "--delays", "3", "--setting", "action_quant_ratio=2"],
            "at most 2 comm",
        ),
        (["--env", "pusht", "--setting", "fps=3"], "setting: got fps, which the sweep sets itself"),
        (["--env", "pusht", "--setting", "horizon=3"], "horizon"),
        (["--env", "pusht", "--dry-run"], "env: got 'pusht' beside task, dry_run or policies"),
        (["--env", "pusht", "--task", "a:b"], "env: got 'pusht' beside task"),
        (["--env", "pusht", "--rename-map", "[1]"], r"rename_map: got '\[1\]', wanted a JSON object of names"),
        ([], "policy: got .* without env"),
    ],
)
def test_mistakes(act, words, said, monkeypatch):
    monkeypatch.setattr("pronghorn.vlash.sweep.rollout", None)
    with pytest.raises(ValueError, match=said):
        run("--policy", act, *WORDS[: 4 * ("--env" in words)], *words)


def test_an_environment_that_is_not_installed(act):
    with pytest.raises(ImportError, match=r"env: aloha needs what is not installed, .*gym_aloha"):
        run("--env", "aloha", "--policy", act)


def test_a_checkpoint_that_is_none(tmp_path, act):
    pusht = ("--env", "pusht", *WORDS)
    with pytest.raises(ValueError, match="policy: got none with env='pusht'"):
        run("--env", "pusht")
    for path in (tmp_path, tmp_path / "nothing", "no/such-policy"):
        with pytest.raises(ValueError, match=f"policy: got '{path}', wanted a checkpoint of a LeRobot policy"):
            run(*pusht, "--policy", path)
    (tmp_path / "config.json").write_text((act / "config.json").read_text())
    for content in (None, b"none"):
        if content is not None:
            (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"policy: got .*, whose weights or processors cannot be loaded"):
            run(*pusht, "--policy", tmp_path)


def test_a_policy_of_another_robot(tmp_path, act):
    with pytest.raises(ValueError, match=r"looks at observation.environment_state; pusht gives .*observation.image"):
        run("--env", "pusht", "--policy", act)
    other = saved(tmp_path, "act", (2, 3), **ACT, chunk_size=8, n_action_steps=4)
    with pytest.raises(ValueError, match="whose action has 3 coordinates; that of pusht has 2"):
        run("--env", "pusht", *WORDS, "--policy", other)


def test_a_policy_that_calls_a_camera_otherwise(tmp_path):
    top = "observation.images.top"
    config = PreTrainedConfig.get_choice_class("act")(
        device="cpu", **ACT, chunk_size=8, n_action_steps=4,
        input_features={
            STATE: PolicyFeature(FeatureType.STATE, (2,)), top: PolicyFeature(FeatureType.VISUAL, (3, 96, 96))
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
    )  # fmt: skip
    stats = statistics(STATE, 2) | statistics(ACTION, 2)
    stats[top] = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    get_policy_class("act")(config, dataset_stats=stats).save_pretrained(tmp_path / "act")
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(tmp_path / "act")
    words = ("--env", "pusht", "--env-option", "episode_length=6", "--policy", tmp_path / "act", "--delays", "0",
             "--modes", "sync", "--seeds", 1, "--json", tmp_path / "rows.json")  # fmt: skip
    with pytest.raises(ValueError, match=f"looks at {top}; pusht gives .*observation.image"):
        run(*words)
    run(*words, "--rename-map", json.dumps({"observation.image": top}))
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["about"]["rename_map"] == {"observation.image": top}
    assert len(found["rows"]) == 1
