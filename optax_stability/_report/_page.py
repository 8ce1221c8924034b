"""The parts of a report as HTML. Every text is escaped here, and nowhere else."""

import html
import re
from collections.abc import Iterable

import numpy as np

from optax_stability._diagnosis._finding import Finding
from optax_stability._report import _style

TITLES = {
    "nonfinite": "A number that is not finite",
    "divergence": "The loss diverged",
    "underflow": "Gradients underflow to zero",
    "vanishing_then_surge": "A layer's gradient vanished, then surged",
    "exploding_gradient": "The gradient exploded",
    "loss_spike": "The loss spiked",
    "learning_rate_too_high": "The learning rate is too high",
    "update_too_large": "Updates are too large for the weights",
    "growing_spectral_norm": "A weight matrix grows faster and faster",
    "vanishing_gradient": "A gradient vanished",
    "eps_dominated": "ε outweighs the gradient in Adam",
    "frequent_skips": "Steps are skipped too often",
    "clipping_too_often": "Nearly every step is clipped",
    "bimodal_updates": "Updates are all of one size",
    "correlated_updates": "Updates keep one direction",
    "noise_too_high": "The gradient is mostly noise",
    "update_too_small": "Updates are too small for the weights",
    "plateau": "The loss stands still",
}
# What the table shows, where it was measured.
SCALARS = {
    "loss": "loss of training",
    "eval/loss": "loss on held-out data",
    "learning_rate": "learning rate",
    "grad/norm": "norm of the gradient",
    "grad/max_abs": "largest entry of the gradient",
    "grad/zero_fraction": "share of the gradient that is exactly 0",
    "clip/norm": "norm before clipping",
    "clip/limit": "what it is held to",
    "clip/fraction": "share of steps clipped so far",
    "skip/norm_limit": "norm from which a step is skipped",
    "skip/total": "steps skipped so far",
    "skip/nonfinite_total": "steps with NaN or Inf so far",
    "branch/rollbacks": "branches taken back so far",
    "branch/accepted": "branches that are the run now",
    "accumulate/rejected_total": "microbatches left out so far",
    "noise_scale/b_simple": "simple noise scale",
    "noise_scale/low": "lower end of its interval",
    "noise_scale/high": "upper end of its interval",
    "noise_scale/batch_size": "batch size",
    "adam/update_rms": "RMS of Adam's step before the learning rate",
    "adam/correlation": "correlation of successive gradients",
    "adam/eps_share": "share of ε in Adam's denominator",
    "adam/zero_fraction": "coordinates that never had a gradient",
    "update/rms": "RMS of the update",
    "update/param_ratio": "update relative to the parameters",
    "params/norm": "norm of the parameters",
    "params/spectral_norm": "largest singular value of a weight matrix",
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SVG = re.compile(r"<svg[^>]*>(.*)</svg>", re.DOTALL)


def title_of(kind: str) -> str:
    """The kind of a finding, for people."""
    return TITLES.get(kind, kind.replace("_", " ").capitalize())


def text(value: str) -> str:
    """Escaped, with code where it stands between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(value))


def code(value: str) -> str:
    """Escaped, as code."""
    return f"<code>{html.escape(value)}</code>"


def _items(tag: str, values: Iterable[str]) -> str:
    return f"<{tag}>{''.join(f'<li>{text(each)}</li>' for each in values)}</{tag}>"


def card(number: int, finding: Finding) -> str:
    """One finding."""
    where = f" · first in {code(finding.layer)}" if finding.layer else ""
    return f"""<li><article class="finding" id="finding-{number}" \
aria-labelledby="finding-{number}-title">
<header><span class="number"><span class="hidden">Finding </span>{number}</span>
<div><h3 id="finding-{number}-title">{text(title_of(finding.kind))}</h3>
<p>from step {finding.step:,}{where} · seen in {code(finding.metric)}</p></div></header>
<p class="evidence">{text(finding.evidence)}</p>
<div class="advice">
<div><h4>Likely causes</h4>{_items("ul", finding.causes)}</div>
<div><h4>What helps</h4>{_items("ol", finding.remedies)}</div>
</div></article></li>"""


def findings(found: list[Finding], steps: str, metrics: int) -> str:
    """All findings; without one, what was looked at."""
    if found:
        cards = "\n".join(card(i, each) for i, each in enumerate(found, 1))
        body = f'<ol class="findings">\n{cards}\n</ol>'
    else:
        what = f"{metrics:,} metric{'' if metrics == 1 else 's'}"
        body = (
            f'<p class="calm"><strong>No finding:</strong> nothing in {steps}, over '
            f"{what}, is beyond the limits of the diagnosis. It sees only what was "
            "recorded, and knows only the kinds of trouble that it has rules for.</p>"
        )
    return section("findings", "Findings", body)


def section(name: str, title: str, body: str) -> str:
    """A section with its heading."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{html.escape(title)}</h2>\n{body}\n</section>'
    )


def figure(title: str, note: str, description: str, svg: str) -> str:
    """A picture inside the page, with a text for those who do not see it.

    Metadata, sizes and the ids of groups, which are the same in all, are left out.
    """
    opening = re.search(r'viewBox="[^"]*"', svg)
    body = _SVG.search(svg)
    if opening is None or body is None:
        raise ValueError("svg is no picture of matplotlib's; render it with kind='svg'")
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
</div></figure>"""


def tiles(values: list[tuple[str, str, str]]) -> str:
    """(name, value, remark) each in a tile."""
    each = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        f"<small>{html.escape(remark)}</small></dd></div>"
        for name, value, remark in values
    )
    return f'<dl class="tiles">{each}</dl>'


def table(rows: list[tuple[str, list[str]]]) -> str:
    """(metric, numbers) each in a row."""
    heads = "Metric", "What it is", "Last", "Smallest", "Largest", "Measured", "∞"
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    head = head.replace('scope="col">What', 'scope="col" class="what">What')
    body = "\n".join(
        f'<tr><th scope="row">{code(key)}</th><td class="what">{text(SCALARS[key])}'
        f"</td>{''.join(f'<td>{each}</td>' for each in numbers)}</tr>"
        for key, numbers in rows
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of numbers">'
        "<table><caption>Smallest and largest of what is finite; rows in which it was "
        f"measured; rows in which it was infinite.</caption><thead><tr>{head}</tr>"
        f"</thead><tbody>\n{body}\n</tbody></table></div>"
    )


def keys(history: dict[str, np.ndarray]) -> str:
    """Every name in the history."""
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
<a href="#numbers">Numbers</a><a href="#metrics">All metrics</a></nav>
</header>
{body}
<footer>Written by optax_stability. Charts are thinned to what a page can show; \
extremes are kept.</footer>
</main>
</body>
</html>
"""
