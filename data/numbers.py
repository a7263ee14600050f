"""Numbers in sentences and tables."""


def rounded(value: float, digits: int) -> str:
    """With so many significant digits or more, never as 1e+02."""
    return f"{value:.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:.0f}"
