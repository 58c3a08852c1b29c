"""How a command ended: its exit code, what it printed and what it said."""


def ended(answer: tuple[int | None, str, str]) -> tuple[str, str]:
    """What a command printed and said, which ended well."""
    code, printed, said = answer
    assert code == 0, said
    return printed, said


def refused(answer: tuple[int | None, str, str]) -> str:
    """What a command said, which refused and printed nothing."""
    code, printed, said = answer
    assert (code, printed) == (2, ""), said
    return said
