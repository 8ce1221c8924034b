"""The CSS of a report, for phones, wide screens, dark mode and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #fff; --ink: #22303c; --soft: #5b6874; --rule: #e1e6ea;
  --accent: #0062a8; --alert: #b34a00; --code: #eef2f5;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #12171c; --card: #1a2128; --ink: #e4e9ed; --soft: #a3b0bb;
    --rule: #2c363f; --accent: #7ec0f2; --alert: #ff9d5c; --code: #26303a;
  }
  svg { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
    Arial, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) 1.25rem; }
h1, h2, h3, h4, p, dl, dd, ol, ul, figure { margin: 0; padding: 0; }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em;
  text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin-bottom: 1.1rem; }
h3 { font-size: 1.06rem; line-height: 1.3; }
h4 { font-size: .8rem; font-weight: 600; color: var(--soft); margin-bottom: .3rem; }
section { margin-top: clamp(2.5rem, 6vw, 4rem); }
code { font: .88em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  background: var(--code); border-radius: .3em; padding: .1em .35em;
  overflow-wrap: anywhere; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; }
a { color: var(--accent); text-underline-offset: .2em; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px;
  border-radius: 3px; }
.soft, figcaption p, caption { color: var(--soft); }
header p { margin-top: .5rem; }
nav { margin-top: 1rem; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem;
  font-size: .92rem; }
.tiles { display: grid; gap: 1px; margin-top: 2rem; background: var(--card);
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); overflow: hidden;
  border: 1px solid var(--rule); border-radius: .7rem; }
.tiles div { box-shadow: 0 0 0 1px var(--rule); padding: .9rem 1.1rem; }
.tiles dt { color: var(--soft); font-size: .85rem; }
.tiles dd { font-size: 1.45rem; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft);
  letter-spacing: 0; }
.findings { list-style: none; display: grid; gap: 1rem; }
.finding { background: var(--card); border: 1px solid var(--rule);
  border-left: .25rem solid var(--alert); border-radius: .5rem;
  padding: 1.2rem 1.4rem 1.3rem; scroll-margin: 1rem; }
.finding header { display: flex; gap: .8rem; align-items: baseline; }
.finding header p { margin: .15rem 0 0; font-size: .92rem; color: var(--soft); }
.number { flex: none; min-width: 1.6rem; padding: 0 .4rem; border-radius: .8rem;
  background: var(--ink); color: var(--card); text-align: center; font-weight: 700;
  font-size: .85rem; line-height: 1.6rem; }
.evidence { margin: .9rem 0 1.1rem; max-width: 62rem; overflow-wrap: anywhere; }
.advice { display: grid; gap: 1rem 2.5rem; font-size: .94rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.advice ul, .advice ol { padding-left: 1.15rem; }
.advice ul { list-style: disc; }
.advice li { margin: .2rem 0; }
.advice li::marker { color: var(--soft); }
.calm { background: var(--card); border: 1px solid var(--rule);
  border-left: .25rem solid var(--accent); border-radius: .5rem;
  padding: 1.2rem 1.4rem; }
.checks { font-size: .94rem; }
.checks p { margin-top: .7rem; }
.checks ul { padding-left: 1.15rem; }
.advice ol + h4 { margin-top: .8rem; }
figure { padding-top: 1.6rem; }
figure + figure { margin-top: .9rem; border-top: 1px solid var(--rule); }
figcaption { margin-bottom: .5rem; }
figcaption p { font-size: .92rem; max-width: 46rem; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
.scroll svg { min-width: 38rem; }
svg.swatch { display: inline-block; width: 1.15rem; height: .8rem; margin-right: .4rem;
  vertical-align: -.05em; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.2rem;
  margin: .4rem 0 0; font-size: .85rem; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif !important; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; margin-bottom: .8rem; }
th, td { padding: .45rem .9rem .45rem 0; text-align: right; vertical-align: baseline;
  border-bottom: 1px solid var(--rule); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
thead th { font-size: .8rem; font-weight: 600; color: var(--soft); }
th:first-child, .what { text-align: left; }
tbody th { font-weight: 400; }
td.what { color: var(--soft); white-space: normal; }
@media (max-width: 40rem) { .what { display: none; } }
th:last-child, td:last-child { padding-right: 0; }
summary { cursor: pointer; }
.keys { list-style: none; columns: 20rem; column-gap: 2rem; margin-top: 1rem;
  font-size: .88rem; }
.keys code { background: none; padding: 0; }
footer { margin-top: 3.5rem; font-size: .85rem; color: var(--soft); }
@media print {
  @page { margin: 15mm; }
  :root { --paper: #fff; }
  html { font-size: 9.5pt; }
  main { max-width: none; padding: 0; }
  nav, #metrics { display: none; }
  .findings { display: block; }
  .finding { margin-bottom: 1rem; }
  section { margin-top: 1.6rem; }
  h2, h3, h4, figcaption { break-after: avoid; }
  .finding, figure, .tiles, tr { break-inside: avoid; }
  .finding, .calm { border-color: #9aa5b1; }
  .number { background: none; color: #000; border: 1pt solid #000; }
  .scroll { overflow: visible; }
  .scroll svg { min-width: 0; }
}
""".strip()
