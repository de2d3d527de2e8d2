"""What asynchrony is worth: simulated wall-clock time to a reward, from measured step times and measured learning.

Samplers and learner take the times that `vcpo.py` measured on an H100, updates to the reward are those of
`vcpo_addition.py` at the lag that so many samplers make. Assumed: generating a minibatch takes a device the same time
however many others there are, it does not shorten by spreading; samplers never wait but for the bound on staleness;
moving weights costs nothing. Synchronous training waits for one sampler, then learns; nothing of this ran as a whole.
"""

from __future__ import annotations

import json
from typing import Any

from harness import RESULTS, row, write

LAGS = (8, 32)


def main() -> None:
    """Simulate and write the results."""
    quantiles = ("p20", "p50", "p80")
    times = _rows("vcpo-h100", "sampling by transformers")[0]
    sampling, learning = times["ours"]["p50"], times["theirs"]["p50"]
    rows = []
    for lag in LAGS:
        for updates in _rows("vcpo_addition-cpu", "updates to reward", f"VCPO, lag {lag}"):
            mine = simulated(int(updates["ours"]["p50"]), lag, sampling, learning)
            theirs = updates["theirs"]["p50"] * (sampling + learning)
            shape = f"{lag} samplers, {sampling:.1f} s and {learning:.2f} s a minibatch"
            rows.append(row(f"simulated, {updates['what']}", "synchronous, one sampler", shape,
                            dict.fromkeys(quantiles, mine), dict.fromkeys(quantiles, theirs)))  # fmt: skip
    write("vcpo_pipeline", rows)


def simulated(updates: int, lag: int, sampling: float, learning: float) -> float:
    """Seconds until so many updates were made with `lag` samplers, each with a minibatch at a time.

    A sampler begins minibatch n when it is free and the learner has made n - lag updates.
    """
    free, done = [0.0] * lag, [0.0]
    for number in range(updates):
        sampler = min(range(lag), key=free.__getitem__)
        begin = max(free[sampler], done[max(0, number - lag)])
        free[sampler] = begin + sampling
        done.append(max(free[sampler], done[-1]) + learning)
    return done[-1]


def _rows(stem: str, *words: str) -> list[dict[str, Any]]:
    rows = json.loads((RESULTS / f"{stem}.json").read_text())["rows"]
    return [entry for entry in rows if all(word in entry["what"] for word in words)]


if __name__ == "__main__":
    main()
