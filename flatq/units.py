"""Numbers for people: sizes, durations, speeds and ratios."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes for people, decimal units, three digits: ``135 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def speed(rate: float) -> str:
    """``72.4 tokens/s``."""
    return f"{rate:,.0f} tokens/s" if rate >= 100 else f"{rate:.3g} tokens/s"


def seconds(duration: float) -> str:
    """``340 ms``, ``12.1 s``, ``7 min 12 s``."""
    if duration < 1:
        return f"{duration * 1000:.3g} ms"
    return f"{duration:.1f} s" if duration < 99.95 else f"{int(duration) // 60} min {int(duration) % 60} s"


def number(value: float) -> str:
    """Four digits, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def times(ratio: float, up: str, down: str) -> str:
    """A ratio result / baseline in words: ``3.10 x faster``, or below one ``3.10 x slower``."""
    return f"{ratio:.2f} x {up}" if ratio >= 1 else f"{1 / ratio:.2f} x {down}"


def with_error(value: float, stderr: float | None, form: str) -> str:
    """A measured value with its standard error, as ``+0.130 ± 0.004``; alone where the error is not known."""
    said = format(value, form)
    return said if stderr is None else f"{said} ± {format(stderr, form.lstrip('+'))}"
