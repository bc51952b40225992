"""What bench.py has measured: a row of it, the table for a terminal, the chart as SVG."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from html import escape
from itertools import cycle


@dataclass
class Row:
    """One line of the table. `ours` and `beside` are what was measured, round by round."""

    name: str
    what: str
    unit: str
    ours: list[float]
    against: str  # a rival's name, "ideal", "target", ...
    beside: list[float]
    target: str = ""  # of the ratio: ">= 0.9", "<= 1.25"; "": for information
    remark: str = ""
    ratio: float | None = field(init=False, default=None)
    met: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.beside:
            # Round by round; what there is only one of, a target say, is the same in all.
            pairs = zip(self.ours, cycle(self.beside))
            self.ratio = statistics.median(a / b for a, b in pairs)
        if self.ratio is not None and self.target:
            sign, bound = self.target.split()
            self.met = (self.ratio - float(bound)) * (1 if sign == ">=" else -1) >= 0


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def figure(values: list[float]) -> str:
    """Return the median, and what it lies between."""
    if not values:
        return "absent"
    spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return number(statistics.median(values)) + spread


def verdict(row: Row) -> str:
    return {True: "met", False: "MISSED", None: "-"}[row.met]


def table(rows: list[Row]) -> str:
    """Return the rows in columns, each with its remark on a line below."""
    lines = [["WHAT", "QUEUECTL", "BESIDE", "RATIO", "TARGET", ""]]
    for row in rows:
        beside = f"{row.against} {figure(row.beside)}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        ours = f"{figure(row.ours)} {row.unit}"
        lines.append([row.what, ours, beside, ratio, row.target, verdict(row)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    told = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    remarks = ["", *(f"\n    {row.remark}" * bool(row.remark) for row in rows)]
    return "\n".join(line + remark for line, remark in zip(told, remarks))


STYLE = """
    text { font: 12px system-ui, sans-serif; fill: #1f2328 }
    .small { font-size: 11px; fill: #59636e }
    .ours { fill: #1a7f4b } .beside { fill: #afb8c1 } .missed { fill: #bc4c00 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .small { fill: #9198a1 }
      .ours { fill: #3fb96f } .beside { fill: #57606a } .missed { fill: #f0883e }
    }"""


def chart(rows: list[Row], facts: dict[str, object]) -> str:
    """Return an SVG: for each row two bars, queuectl's and the other's, to a scale of their own."""
    rows = [row for row in rows if row.beside]
    height, versions = 50 + 40 * len(rows), facts["versions"]
    head = f"queuectl on {facts['cores']} cores: " + ", ".join(
        f"{k} {v}" for k, v in versions.items()
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{height}"'
        f' viewBox="0 0 860 {height}" role="img" aria-label="queuectl beside its rivals">',
        f"<style>{STYLE}\n</style>",
        f'<text x="10" y="20" class="small">{escape(head)}</text>',
    ]
    for place, row in enumerate(rows):
        top = 40 + 40 * place
        ours, beside = statistics.median(row.ours), statistics.median(row.beside)
        parts.append(f'<text x="10" y="{top + 11}">{escape(row.what)}</text>')
        told = f"{row.ratio:.2f} of {row.against}" + f", to be {row.target}" * bool(row.target)
        told += f": {verdict(row)}" if row.target else ""
        parts.append(f'<text x="10" y="{top + 26}" class="small">{escape(told)}</text>')
        for step, (kind, value, name) in enumerate(
            [("missed" if row.met is False else "ours", ours, "queuectl"),
             ("beside", beside, row.against)]
        ):  # fmt: skip
            width, y = max(1.0, 260 * value / max(ours, beside)), top + 15 * step
            bar = f'<rect x="400" y="{y}" width="{width:.1f}" height="13" class="{kind}"/>'
            label = escape(f"{number(value)} {row.unit}  {name}")
            parts.append(f'{bar}<text x="{406 + width:.1f}" y="{y + 11}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])
