"""Rewards of the examples."""


def right_digits(completions, answer, **kwargs):
    """The share of an answer's digits that a completion has in their places."""
    return [sum(a == b for a, b in zip(text, right, strict=False)) / len(right)
            for text, right in zip(completions, answer, strict=True)]  # fmt: skip
