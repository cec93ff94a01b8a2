"""Parse sizes; format sizes, durations, speeds and ratios. Imports no torch."""

from __future__ import annotations

import math

from pydantic import ByteSize, TypeAdapter, ValidationError

_BYTES = TypeAdapter(ByteSize)


def parse_size(text: str) -> int:
    """Bytes, above 0: ``90MB`` and ``1.5GB`` in powers of ten, ``6GiB`` in powers of two, ``7000`` is bytes.

    Raises:
        ValueError: the text has another form.
    """
    try:
        found = int(_BYTES.validate_python(text)) if "bit" not in text.lower() else 0  # ByteSize also reads bits
    except (ValidationError, OverflowError):
        found = 0
    if found <= 0:
        raise ValueError(f"{text!r:.60} is not a size above 0; write it as 90MB, 1.5GB or 6GiB")
    return found


def size_at_least(count: float) -> str:
    """Bytes in the notation of recipes, rounded up so that ``parse_size`` gives ``count`` or more: ``90.5MB``."""
    unit, factor = next(((u, f) for u, f in (("GB", 10**9), ("MB", 10**6)) if count >= f), ("kB", 10**3))
    thousandths = math.ceil(1000 * count / factor)
    while parse_size(text := f"{thousandths / 1000:.10g}{unit}") < count:  # float rounding may give one byte less
        thousandths += 1
    return text


def size(count: float) -> str:
    """Bytes in decimal units with three digits: ``135 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def speed(rate: float) -> str:
    """``72.4 tokens/s``."""
    return f"{rate:,.0f} tokens/s" if rate >= 100 else f"{rate:.3g} tokens/s"


def seconds(duration: float) -> str:
    """``340 ms``, ``12.1 s``, ``7 min 12 s``, ``2 h 5 min``; two days or more as ``30 days``."""
    if duration < 1:
        return f"{duration * 1000:.3g} ms"
    if duration < 99.95:
        return f"{duration:.1f} s"
    if duration < 3600:
        return f"{int(duration) // 60} min {int(duration) % 60} s"
    if duration < 2 * 86400:
        return f"{int(duration) // 3600} h {int(duration) % 3600 // 60} min"
    return f"{duration / 86400:,.0f} days"


def number(value: float) -> str:
    """Four digits, with thousands separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def times(ratio: float, up: str, down: str) -> str:
    """A ratio result / baseline in words: ``3.10 x faster``, or for ratios below one ``3.10 x slower``."""
    return f"{ratio:.2f} x {up}" if ratio >= 1 else f"{1 / ratio:.2f} x {down}"


def with_error(value: float, stderr: float | None, form: str) -> str:
    """A measured value with its standard error, as ``+0.130 ± 0.004``; only the value if the error is not known."""
    text = format(value, form)
    return text if stderr is None else f"{text} ± {format(stderr, form.lstrip('+'))}"
