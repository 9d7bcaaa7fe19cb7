"""A strict verifier of additions: only the right number at the end of a finished answer counts."""

import re


def right_sum(completion: str, *, answer: str, finish: str = "") -> float:
    """1 if the last number of a completion that was not cut off is ``answer``, else 0.

    A completion that repeats the question ends in one of its terms and earns nothing.
    """
    numbers = re.findall(r"\d+", completion)
    return float(finish != "length" and bool(numbers) and numbers[-1] == answer)
