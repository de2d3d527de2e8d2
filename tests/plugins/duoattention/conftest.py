import pytest
import torch
from tests.models import tiny_model

from pronghorn.duoattention import DuoAttentionConfig, apply_duo

SINK, RECENT = 3, 8
MIXED = [[1.0, 0.0], [0.0, 0.0]]


def small(name="llama", seed=0, **changes):
    """A tiny model whose attention goes through the interface; sliding windows only where a test wants them."""
    changes = {"sliding_window": None, **changes} if name == "mistral" else changes
    return tiny_model(name, seed, **changes).eval()


def duo_of(model, gates=MIXED, *, reorder=False, **options):
    options = {"sink_size": SINK, "recent_size": RECENT, "threshold": 0.5, **options}
    return apply_duo(model, DuoAttentionConfig(gates=gates, **options), reorder=reorder)


def run(model, ids, cache, calls, mask=None):
    """Logits [batch, tokens, vocabulary] of calls of so many tokens each."""
    found, seen = [], 0
    with torch.no_grad():
        for tokens in ids.split(calls, dim=1):
            seen += tokens.shape[1]
            options = {} if mask is None else {
                "attention_mask": mask[:, :seen],
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, seen - tokens.shape[1] : seen],
            }  # fmt: skip
            found.append(model(tokens, past_key_values=cache, **options).logits)
    return torch.cat(found, dim=1)


@pytest.fixture(scope="session")
def llama():
    return small()
