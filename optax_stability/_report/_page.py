"""The parts of a report as HTML. All texts are escaped in this module only."""

import html
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from optax_stability._diagnosis._finding import Finding
from optax_stability._report import _style

TITLES = {
    "nonfinite": "NaN or Inf",
    "divergence": "The loss diverged",
    "underflow": "Gradients underflow to zero",
    "vanishing_then_surge": "A layer's gradient vanished, then surged",
    "exploding_gradient": "The gradient exploded",
    "loss_spike": "The loss spiked",
    "loss_stuck": "The loss is exactly the same",
    "learning_rate_zero": "The learning rate is 0",
    "learning_rate_too_high": "The learning rate is too high",
    "attention_saturates": "Attention saturates",
    "update_too_large": "Updates are too large for the weights",
    "growing_spectral_norm": "A weight matrix grows faster and faster",
    "vanishing_gradient": "A gradient vanished",
    "overfitting": "The model overfits",
    "eps_dominated": "ε outweighs the gradient in Adam",
    "guard_loss_constant": "The guard is given the same loss at every step",
    "frequent_skips": "Steps are skipped too often",
    "skip_budget_spent": "No skip is left",
    "clustered_skips": "Skips come at the same place of the data",
    "clipping_too_often": "Nearly every step is clipped",
    "misplaced_clip": "The clip stands at the wrong place",
    "dominant_layer": "One tensor is nearly all of the gradient",
    "bimodal_updates": "All entries of the update have the same size",
    "correlated_updates": "Successive updates have the same direction",
    "noise_too_high": "The gradient is mostly noise",
    "update_too_small": "Updates are too small for the weights",
    "plateau": "The loss does not fall",
    "several_runs": "Several trainings in one history",
}
# The metrics of the table, each shown if it was measured.
SCALARS = {
    "loss": "training loss",
    "eval/loss": "loss on held-out data",
    "learning_rate": "learning rate",
    "grad/norm": "norm of the gradient",
    "grad/max_abs": "largest entry of the gradient",
    "grad/zero_fraction": "share of the gradient that is exactly 0",
    "clip/norm": "norm before clipping",
    "clip/limit": "limit to which the norm is clipped",
    "clip/fraction": "share of steps clipped so far",
    "skip/norm_limit": "norm above which a step may be skipped",
    "skip/total": "steps skipped so far",
    "skip/nonfinite_total": "steps with NaN or Inf so far",
    "branch/rollbacks": "branches rolled back so far",
    "branch/accepted": "branches accepted so far",
    "accumulate/rejected_total": "microbatches rejected so far",
    "noise_scale/b_simple": "simple noise scale of this step",
    "noise_scale/low": "lower end of its confidence interval",
    "noise_scale/high": "upper end of its confidence interval",
    "noise_scale/batch_size": "batch size",
    "adam/update_rms": "RMS of Adam's step before the learning rate",
    "adam/correlation": "correlation of successive gradients",
    "adam/eps_share": "share of ε in Adam's denominator",
    "adam/zero_fraction": "share of coordinates that never had a gradient",
    "update/rms": "RMS of the update",
    "update/param_ratio": "norm of the update over that of the parameters",
    "params/norm": "norm of the parameters",
    "params/spectral_norm": "largest singular value of a weight matrix",
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SVG = re.compile(r"<svg[^>]*>(.*)</svg>", re.DOTALL)


def title_of(kind: str) -> str:
    """The title of a kind of finding."""
    return TITLES.get(kind, kind.replace("_", " ").capitalize())


def text(value: str) -> str:
    """Escaped text; text between backticks becomes code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(value))


def code(value: str) -> str:
    """Escaped text, as code."""
    return f"<code>{html.escape(value)}</code>"


def _items(tag: str, values: Iterable[str]) -> str:
    return f"<{tag}>{''.join(f'<li>{text(each)}</li>' for each in values)}</{tag}>"


def card(number: int, finding: Finding, words: bool) -> str:
    """One finding as a card; with ``words``, for those who use another library."""
    helps = f"<div><h4>What helps</h4>{_items('ol', finding.remedies)}</div>"
    if words:
        helps = (
            f"<div><h4>What helps</h4>{_items('ol', finding.elsewhere)}"
            f"<h4>With optax and optax_stability</h4>"
            f"{_items('ul', finding.remedies)}</div>"
        )
    where = f" · first in {code(finding.layer)}" if finding.layer else ""
    return f"""<li><article class="finding" id="finding-{number}" \
aria-labelledby="finding-{number}-title">
<header><span class="number"><span class="hidden">Finding </span>{number}</span>
<div><h3 id="finding-{number}-title">{text(title_of(finding.kind))}</h3>
<p>from step {finding.step:,}{where} · seen in {code(finding.metric)}</p></div></header>
<p class="evidence">{text(finding.evidence)}</p>
<div class="advice">
<div><h4>Likely causes</h4>{_items("ul", finding.causes)}</div>
{helps}
</div></article></li>"""


def findings(found: list[Finding], steps: str, metrics: str, words: bool) -> str:
    """All findings; if there are none, what was examined."""
    if found:
        cards = "\n".join(card(i, each, words) for i, each in enumerate(found, 1))
        body = f'<ol class="findings">\n{cards}\n</ol>'
    else:
        body = (
            f'<p class="calm"><strong>No finding:</strong> in {steps}, over {metrics}, '
            "no limit of the diagnosis is exceeded. The diagnosis reads only recorded "
            "metrics, and finds only the kinds of problems that it has rules for.</p>"
        )
    return section("findings", "Findings", body)


def checks(ran: list[str], lacking: dict[str, list[str]], unknown: list[str]) -> str:
    """The checks that ran, those that could not, and what the history cannot tell."""
    done = ", ".join(code(each) for each in ran) or "none"
    parts = [f"<p>{len(ran)} ran: {done}.</p>"]
    if lacking:
        missing = "".join(
            f"<li>{html.escape(what)}: {', '.join(map(code, kinds))}</li>"
            for what, kinds in lacking.items()
        )
        count = sum(map(len, lacking.values()))
        parts.append(f"<p>{count} could not run, for lack of:</p><ul>{missing}</ul>")
    if unknown:
        parts.append(f"<p>Cannot be told:</p>{_items('ul', unknown)}")
    return section("checks", "Checks", f'<div class="checks">{"".join(parts)}</div>')


def section(name: str, title: str, body: str) -> str:
    """A section with its heading."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{html.escape(title)}</h2>\n{body}\n</section>'
    )


def with_titles(svg: str, texts: list[str]) -> str:
    """Gives the group ``hover-<i>`` of an SVG the text that is shown on hover."""
    for i, each in enumerate(texts):
        group = f'<g id="hover-{i}">'
        svg = svg.replace(group, f"{group}<title>{html.escape(each)}</title>", 1)
    return svg


def _swatch(entry: dict[str, Any]) -> str:
    """The mark of a legend, as an SVG, which dark mode inverts like the chart."""
    colour, glyph = entry["colour"], entry["glyph"]
    if glyph:
        # Areas are bordered: a light one does not show on a light page.
        border = ' stroke="#8a949e" stroke-width=".4"' if glyph == "■" else ""
        mark = (
            f'<text x="9" y="9.5" text-anchor="middle" font-size="11" fill="{colour}"'
            f"{border}>{glyph}</text>"
        )
    else:
        dash = ' stroke-dasharray="4 2"' if entry["dashed"] else ""
        width = 1 if entry["faint"] else 2
        mark = (
            f'<line x1="0" x2="18" y1="6" y2="6" stroke="{colour}" '
            f'stroke-width="{width}"{dash}/>'
        )
    return f'<svg class="swatch" viewBox="0 0 18 12" aria-hidden="true">{mark}</svg>'


def legend(entries: list[dict[str, Any]]) -> str:
    """The legend of a chart, which wraps on a narrow page."""
    items = "".join(
        f"<li>{_swatch(each)}{html.escape(each['label'])}</li>" for each in entries
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


def figure(title: str, note: str, description: str, svg: str, below: str = "") -> str:
    """An SVG inside the page, with a description for screen readers.

    Metadata, sizes and ids of groups are removed: the ids are the same in every SVG.
    """
    opening = re.search(r'viewBox="[^"]*"', svg)
    body = _SVG.search(svg)
    if opening is None or body is None:
        raise ValueError(
            f"svg={svg[:40]!r} is not an SVG of matplotlib; render it with kind='svg'"
        )
    inner = re.sub(r"<metadata>.*?</metadata>", "", body[1], flags=re.DOTALL)
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)
    inner = re.sub(r"<style type=.*?</style>", "", inner, flags=re.DOTALL)
    inner = re.sub(r"\s*\n\s*", "\n", inner)
    label = html.escape(f"{title}. {description}")
    return f"""<figure>
<figcaption><h3>{html.escape(title)}</h3>{f"<p>{html.escape(note)}</p>" if note else ""}
</figcaption>
<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(title)}, chart">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" \
{opening[0]} role="img" aria-label="{label}">{inner}</svg>
</div>{below}</figure>"""


def tiles(values: list[tuple[str, str, str]]) -> str:
    """A tile for each (name, value, remark)."""
    each = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        f"<small>{html.escape(remark)}</small></dd></div>"
        for name, value, remark in values
    )
    return f'<dl class="tiles">{each}</dl>'


def table(rows: list[tuple[str, list[str]]]) -> str:
    """A row for each (metric, numbers)."""
    heads = "Metric", "Meaning", "Last", "Smallest", "Largest", "Measured", "∞"
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    head = head.replace('scope="col">Meaning', 'scope="col" class="what">Meaning')
    body = "\n".join(
        f'<tr><th scope="row">{code(key)}</th><td class="what">{text(SCALARS[key])}'
        f"</td>{''.join(f'<td>{each}</td>' for each in numbers)}</tr>"
        for key, numbers in rows
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of numbers">'
        "<table><caption>Smallest and largest finite value; number of rows with a "
        "measurement; number of rows with an infinite value.</caption>"
        f"<thead><tr>{head}</tr>"
        f"</thead><tbody>\n{body}\n</tbody></table></div>"
    )


def keys(history: dict[str, np.ndarray]) -> str:
    """The names of all metrics in the history."""
    listed = "\n".join(f"<li>{code(str(key))}</li>" for key in history)
    return (
        f"<details><summary>{len(history):,} names, in the order of the history"
        f'</summary>\n<ul class="keys">\n{listed}\n</ul></details>'
    )


def page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """The whole document."""
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)}</title>
<style>
{_style.CSS}
</style>
</head>
<body>
<main>
<header>
<h1>{html.escape(title)}</h1>
<p class="soft">{html.escape(subtitle)}</p>
<nav aria-label="Contents"><a href="#findings">Findings</a><a href="#run">The run</a>\
<a href="#checks">Checks</a><a href="#numbers">Numbers</a>\
<a href="#metrics">All metrics</a></nav>
</header>
{body}
<footer>Written by optax_stability. Charts are reduced to the resolution of a page; \
extremes are kept.</footer>
</main>
</body>
</html>
"""
