"""A user's own verifier: a function of the completion and of columns of the dataset, by name."""


def has_unit(completion: str, *, unit: str | None) -> float | None:
    """1 if the last line of the completion names the unit of the problem; not applicable to problems without one.

    ``unit`` is a column of ``data/word_problems.jsonl``, null in some rows.
    """
    if unit is None:
        return None
    last_line = completion.strip().rpartition("\n")[2]
    return float(unit.rstrip("s") in last_line.lower())
