"""How a page looks: one style sheet for light and dark, for a desk and for a phone.

A drawing bears classes and no colours; what they look like is settled here alone. On a narrow
screen only what lies in a box of class `wide` may scroll sideways.
"""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark;
  --page: #ffffff; --text: #1c2024; --soft: #60646c; --line: #d9d9e0; --panel: #f9f9fb;
  --anchor-hue: #3e63dd; --volatile-hue: #e5484d; --pivot-hue: #f5a623; --satellite-hue: #46a758;
  --ink: #1c2024; --stable-hue: #0b7f8f; --decaying-hue: #ab4aba; }
@media (prefers-color-scheme: dark) {
  :root { --page: #111113; --text: #edeef0; --soft: #b0b4ba; --line: #43484e; --panel: #18191b;
    --anchor-hue: #849dff; --volatile-hue: #ff9592; --pivot-hue: #ffca16; --satellite-hue: #71d083;
    --ink: #111113; --stable-hue: #4ccce6; --decaying-hue: #e796f3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p, li { max-width: 46rem; } .soft { color: var(--soft); } .plain { list-style: none; padding: 0; }
.wide { overflow-x: auto; } .fit svg { max-width: 100%; height: auto; } svg { display: block; }
svg text { fill: var(--soft); font-size: 10px; } svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .mark { fill: var(--ink); text-anchor: middle; } .axis { stroke: var(--line); }
.threshold { stroke: var(--text); stroke-dasharray: 4 3; }
.chance { stroke: var(--soft); stroke-dasharray: 1 3; }
.anchor, .value, .all { --hue: var(--anchor-hue); } .volatile { --hue: var(--volatile-hue); }
.pivot { --hue: var(--pivot-hue); } .satellite { --hue: var(--satellite-hue); }
.stable { --hue: var(--stable-hue); } .decaying { --hue: var(--decaying-hue); }
rect, polygon { fill: var(--hue); } .band { fill-opacity: .22; } .hit { fill: transparent; }
.curve { fill: none; stroke: var(--hue); stroke-width: 2; stroke-linejoin: round; }
.curves svg { width: 34rem; } .curves svg text { font-size: 11px; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .4em; background: var(--hue); }
.matrices { display: flex; flex-wrap: wrap; gap: .75rem; margin-top: .75rem; } figure { margin: 0; }
figcaption { font-size: .8rem; line-height: 1.35; color: var(--soft); margin-top: .2rem; }
figcaption b { color: var(--text); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem;
  margin: 1rem 0; }
.facts div { display: flex; flex-direction: column-reverse; justify-content: flex-end;
  padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--panel); }
.facts dd { margin: 0; font-size: 1.4rem; font-weight: 600; line-height: 1.2; }
.facts dt { font-size: .8rem; line-height: 1.35; color: var(--soft); margin-top: .2rem; }
.maps { display: grid; grid-template-columns: repeat(3, 1fr); gap: .75rem; }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: .75rem 1.5rem; } .halves .maps { grid-template-columns: 1fr 1fr; }
.maps img { display: block; width: 100%; height: auto; aspect-ratio: 4 / 3;
  image-rendering: pixelated; background: var(--panel); border: 1px solid var(--line); }
.scale { display: flex; align-items: center; gap: .5rem; margin: .5rem 0; font-size: .8rem;
  color: var(--soft); }
.scale span { width: 9rem; height: .8em; border: 1px solid var(--line);
  background: linear-gradient(to right, transparent, var(--heat)); }
.sparks { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr));
  gap: .75rem; }
.sparks figcaption { font-size: .75rem; white-space: nowrap; }
.sparks svg { width: 100%; height: auto; background: var(--panel); border: 1px solid var(--line); }
.spark { fill: none; stroke: var(--satellite-hue); stroke-width: 1.5; stroke-linejoin: round; }
table { border-collapse: collapse; } th, td { padding: .25rem .75rem; text-align: right;
  white-space: nowrap; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, td[colspan] { text-align: left; }
@media (max-width: 40rem) { .maps { gap: .5rem; } }
"""
