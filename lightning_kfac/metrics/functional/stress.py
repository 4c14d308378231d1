"""Position stress (arXiv 2510.24256, section 5): does another prompt bring the suffix back?"""

from collections.abc import Sequence


def stress_length(hits: Sequence[bool], shifted: Sequence[int], t: int, include_unperturbed: bool = False) -> int:
    """The longest run of gold tokens that any perturbed prompt of a sequence recites.

    A prompt extended to the left of the suffix holds the prefix and the first e = 1, ..., t gold tokens (fewer where
    the gold ends before); only the gold that remains counts.

    Args:
        hits: Which gold tokens are the argmax after the prefix and the gold before them.
        shifted: Numbers of leading gold tokens that each right-shifted prompt recites.
        t: Most gold tokens in a prompt.
        include_unperturbed: Let the prefix itself count as well.

    Example:
        >>> stress_length([True, False, True, True], shifted=[0, 1], t=20)
        2
    """
    first = 0 if include_unperturbed else 1
    runs = [leading_run(hits[e:]) for e in range(first, min(t, len(hits)) + 1)]
    return max([*runs, *shifted], default=0)


def leading_run(hits: Sequence[bool]) -> int:
    """Number of hits before the first miss.

    Example:
        >>> leading_run([True, True, False, True])
        2
    """
    return next((i for i, hit in enumerate(hits) if not hit), len(hits))
