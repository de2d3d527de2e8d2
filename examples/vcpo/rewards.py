"""Rewards of the examples."""


def strokes(completions, answer, **kwargs):
    """1 for as many strokes as the sum has, less for more or fewer of them, and for whatever else there is."""
    rewards = []
    for text, right in zip(completions, answer, strict=True):
        count = text.count("1")
        rewards.append(max(0.0, 1 - abs(count - len(right)) / len(right) - 0.1 * (len(text) - count)))
    return rewards
