"""A small policy in float64 and a minibatch of its own rollouts, some updates old."""

import torch
from torch import nn

from pronghorn.vcpo import Minibatch

WORDS, TOKENS = 11, 6


class Policy(nn.Module):
    """Words to words, two of whose matrices are one."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.layer = nn.Embedding(WORDS, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, ids):
        """[..., tokens] to [..., tokens, words]."""
        return self.head(torch.tanh(self.layer(self.embedding(ids)).cumsum(-2)))


def rollouts(policy, groups=(4, 4), lag=0.3, seed=1):
    """Token ids [trajectories, 1 + tokens] and a minibatch; the sampler's log-probabilities are off by about `lag`."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(groups)
    ids = torch.randint(0, WORDS, (count, 1 + TOKENS), generator=generator)
    mask = torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (count, 1), generator=generator)
    with torch.no_grad():
        learner = log_probs(policy, ids)
    sampler = learner + lag * torch.randn(learner.shape, generator=generator).double()
    rewards = torch.rand(count, generator=generator).double()
    advantages = torch.randn(count, generator=generator).double()
    numbers = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    return ids, Minibatch(sampler, mask, rewards, advantages, numbers)


def log_probs(policy, ids):
    """Of each token but the first, [trajectories, tokens]."""
    return policy(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def one_by_one(policy, ids):
    """What a step asks for."""
    return lambda row: log_probs(policy, ids[row : row + 1])[0]
