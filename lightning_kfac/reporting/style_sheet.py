"""How a page looks: light and dark, wide and narrow, on a screen and on paper."""

_LIGHT = """
  --paper: #fff; --ink: #1b1b1b; --soft: #5f5f5f; --line: #dcdcdc; --fill: #f4f4f4; --mark: #ffe2c7;
  --before: #0072b2; --after: #d55e00;
"""
_DARK = """
  --paper: #15171a; --ink: #e6e4e1; --soft: #a8a6a3; --line: #3a3d42; --fill: #212429; --mark: #6b3d12;
  --before: #62b5f0; --after: #f0954a;
"""
_RULES = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 0 auto; padding: 1.2rem 1rem 3rem;
}
h1, h2, h3, p, li, dd, summary, blockquote, figcaption { overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
a { color: inherit; }
.lead { font-size: 1.15rem; margin: .8rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.figures div { background: var(--fill); border-radius: .5rem; padding: .8rem 1rem; }
.figures div { border-top: .25rem solid var(--after); }
.figures b { display: block; font-size: 2rem; line-height: 1.15; font-variant-numeric: tabular-nums; }
.figures span { display: block; color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th, td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th, th:first-child { background: var(--fill); }
.stacked th { white-space: normal; vertical-align: bottom; }
.stacked .interval { display: block; font-size: .75rem; }
figure { margin: .8rem 0 1.4rem; }
figcaption, .interval, .note { color: var(--soft); font-size: .82rem; }
svg.drawn { display: block; width: 100%; height: auto; fill: currentColor; }
svg.drawn * { stroke-linejoin: round; }
svg.drawn a:hover { opacity: .6; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
pre { background: var(--fill); padding: .7rem; font-size: .78rem; white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote { margin: .2rem 0 .8rem; padding-left: .8rem; border-left: .2rem solid var(--line); }
blockquote b, dt { color: var(--soft); font-weight: 600; font-size: .82rem; }
dl { margin: .4rem 0 .8rem; padding-left: .8rem; border-left: .2rem solid var(--line); }
dd { margin: 0 0 .4rem; }
mark { background: var(--mark); color: inherit; }
details { margin: .3rem 0; }
summary { cursor: pointer; }
:target { outline: .15rem solid var(--after); outline-offset: .2rem; }
@media (max-width: 40rem) {
  body { padding: .8rem .7rem 2rem; }
  th, td { padding: .25rem .4rem; }
  th { white-space: normal; }
  th:first-child, td:first-child { white-space: normal; min-width: 6.5rem; max-width: 9rem; }
  td .interval { display: block; font-size: .72rem; }
  .figures b { font-size: 1.7rem; }
  .scroll img { width: 38rem; max-width: none; }
}
"""
_PRINT = """
  body { max-width: none; font-size: 11px; padding: 0; }
  h2, h3 { break-after: avoid; }
  figure, blockquote, tr, .figures div { break-inside: avoid; }
  .scroll { overflow: visible; }
  svg.drawn { min-width: 0 !important; }
  pre, td, th { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; block-size: auto; }
"""
STYLE = (
    f":root {{ color-scheme: light dark; {_LIGHT} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
    f"{_RULES}"
    f"@media print {{ {_PRINT} }}\n"
)
