"""How cards print numbers: three decimals, or three digits where that would say nothing."""

from typing import Any


def number(value: float | int) -> str:
    """An integer with commas; a float with three decimals, below 0.001 (and not 0) with three significant digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"


def rounded(value: Any) -> Any:
    """Plain values with every float as `number` prints it."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(number(value)) if isinstance(value, float) else value
