"""Numbers and texts as a reader wants them: few digits and a unit, never rounded into a false
claim.

Not for: results.json, which keeps every digit, or the ticks of an axis (`scales.py`).
"""

import html
import json
import math
import re

NARROW_SPACE = "\u202f"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")


def escape(text: object) -> str:
    """Text made safe for HTML and its attributes. Control characters and lone surrogates become
    U+FFFD.
    """
    clean = (
        str(text)
        .replace("\r\n", "\n")
        .encode("utf-16", "surrogatepass")
        .decode("utf-16", "replace")
    )
    return html.escape(_CONTROL.sub("\ufffd", clean), quote=True)


def digits(value: float, significant: int = 3) -> str:
    """A number with `significant` digits and separated thousands; scientific notation only below
    1e-4.
    """
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    # Of the rounded value: 9.996 is written 10.0, not 10.00.
    magnitude = int(f"{value:.{significant - 1}e}".partition("e")[2])
    if magnitude < -4:
        return f"{value:.{significant - 1}e}".replace("e-0", "e-").replace("-", "−")
    decimals = max(0, significant - 1 - magnitude)
    return f"{value:,.{decimals}f}".replace(",", NARROW_SPACE).replace("-", "−")


def count(value: float) -> str:
    """A count: exact below 10,000, then 24.1 k, 3.70 M, 1.20 G."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) < 10_000:
        return f"{value:,.0f}".replace(",", NARROW_SPACE)
    return _scaled(value, 1000.0, ["", "k", "M", "G", "T", "P"])


def size(value: float) -> str:
    """Bytes on disk, in powers of 1000."""
    return _scaled(value, 1000.0, ["B", "kB", "MB", "GB", "TB", "PB"])


def memory(value: float) -> str:
    """Bytes in memory, in powers of 1024."""
    return _scaled(value, 1024.0, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"])


def duration(seconds: float) -> str:
    """Seconds as 0.42 s, 38 s, 8 min 41 s or 2 h 03 min."""
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 9.95:
        return f"{digits(seconds, 2)}{NARROW_SPACE}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NARROW_SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{NARROW_SPACE}min {whole % 60:02d}{NARROW_SPACE}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{NARROW_SPACE}h {minutes % 60:02d}{NARROW_SPACE}min"


def percent(share: float) -> str:
    """A share of 1 in percent, such as 8.5 % or 99.97 %. Only exactly 1 is 100 %, only exactly 0 is
    0 %.
    """
    if not math.isfinite(share):
        return "not finite"
    for decimals in range(1, 5):
        text = f"{100 * share:.{decimals}f}"
        if float(text) not in (0.0, 100.0) or share in (0.0, 1.0):
            break
    return f"{text.removesuffix('.0')}{NARROW_SPACE}%".replace("-", "−")


def raw(value: object) -> str:
    """A value exactly as results.json writes it, strings without their quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _scaled(value: float, base: float, units: list[str]) -> str:
    if not math.isfinite(value):
        return "not finite"
    step = 0
    # 999.5 would be written as 1000, so it already belongs to the next unit.
    while abs(value) >= base * 0.9995 and step < len(units) - 1:
        value /= base
        step += 1
    text = f"{value:.0f}" if step == 0 else digits(value)
    return f"{text}{NARROW_SPACE}{units[step]}".rstrip(NARROW_SPACE)
