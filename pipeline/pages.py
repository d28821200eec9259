"""Templates, and how figures are written in them."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.record import spans

DASH = "\u2013"
BYTES = ("bytes", "KB", "MB", "GB", "TB")


def render(template: str, shown: Mapping[str, Any]) -> str:
    """A template of `pipeline/templates/`; in one of HTML all that is shown is escaped."""
    environment = Environment(
        loader=PackageLoader("pipeline"),
        undefined=StrictUndefined,
        autoescape=".html" in template,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": lambda share: DASH if share is None else f"{100 * share:.1f} %",
        "times": lambda ratio: f"{ratio:.3g}x",
        "size": size,
        "spans": spans,
        "code": code,
    }
    return environment.get_template(template).render(shown)


def number(value: float | None) -> str:
    """For people: 1,234,567; 12.345; 0.01230; a dash where the figure is null."""
    if value is None:
        return DASH
    if isinstance(value, int):
        return f"{value:,}"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:#.4g}" if abs(value) < 1 else f"{value:.3f}"


def size(n: float) -> str:
    """Bytes as 999 bytes, 1.50 KB, 12.3 GB; powers of 1000."""
    power = 0
    while n >= 999.5 and power < len(BYTES) - 1:
        n, power = n / 1000, power + 1
    return f"{n:.3g} {BYTES[power]}"


def code(value: object) -> str:
    """Inline code of Markdown, in which nothing is markup: neither HTML nor links."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"
