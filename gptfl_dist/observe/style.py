"""The style sheet of the report: dark on white, the reader's own fonts, fit for a laptop screen and for paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #57606a; --line: #d8dee4; --pale: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); -webkit-print-color-adjust: exact; print-color-adjust: exact;
  font: 16px/1.5 -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.28; font-weight: 650; margin: .25rem 0 .75rem; letter-spacing: -.01em;
  text-wrap: pretty; }
h2 { font-size: 1.2rem; font-weight: 650; margin: 2.75rem 0 .9rem; padding-bottom: .35rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.kicker, .facts, .note, figcaption { color: var(--soft); margin: 0; }
.note, figcaption, .facts { font-size: .875rem; }
.note { margin-top: .75rem; max-width: 46rem; }
figure { margin: 0; }
figure + figure { margin-top: 1.5rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th { text-align: left; font-weight: 600; }
thead th { color: var(--soft); font-size: .8rem; line-height: 1.25; vertical-align: bottom; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line); }
tr > :first-child { padding-left: 0; }
table.numbers { width: 100%; }
table.numbers tbody th { white-space: nowrap; }
table.numbers td, table.numbers th + th { text-align: right; }
table.numbers td { white-space: nowrap; }
.chip { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .5em; }
.chosen { white-space: nowrap; }
table.matrix { border-collapse: separate; border-spacing: 2px; }
.matrix td, .matrix th { border: 0; padding: .4rem; font-size: .85rem; text-align: center; min-width: 2.6rem; }
.matrix tbody th { text-align: right; padding-right: .5rem; white-space: nowrap; }
.matrix tbody td { border-radius: 3px; }
.matrix.dense td, .matrix.dense th { padding: .15rem; font-size: .7rem; min-width: 1.5rem; }
.matrix .none { color: #8c959f; background: var(--pale); }
.matrix .recall { padding-left: .7rem; color: var(--soft); text-align: right; white-space: nowrap; }
.matrix .axis { color: var(--soft); font-weight: 400; font-style: italic; }
.matrix thead tr:last-child .axis { text-align: right; padding-right: .5rem; }
.matrix .upright span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem; overflow: hidden;
  white-space: nowrap; text-overflow: ellipsis; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .85rem; margin-bottom: .8rem; }
.silo { display: flex; align-items: center; gap: .75rem; font-size: .85rem; margin: .3rem 0; break-inside: avoid; }
.silo .name { flex: 0 0 8.5rem; text-align: right; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.silo .track { flex: 1; display: flex; height: 1.6rem; }
.silo .total { flex: 0 0 4rem; font-variant-numeric: tabular-nums; }
.segment { border-right: 1px solid #fff; font-size: .75rem; line-height: 1.6rem; text-align: center; overflow: hidden;
  white-space: nowrap; }
table.stages { width: 100%; margin-top: 1.25rem; }
.stages th:first-child { width: 12rem; }
.stages td:nth-child(2) { width: 7rem; text-align: right; white-space: nowrap; }
.stages th:nth-child(2) { text-align: right; }
.bar { display: block; height: .7rem; min-width: 1px; border-radius: 2px; background: #8c959f; }
dl { display: grid; grid-template-columns: minmax(10rem, max-content) 1fr; gap: .3rem 1.5rem; margin: 0;
  font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .8rem ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
pre { background: var(--pale); border: 1px solid var(--line); border-radius: 6px; padding: 1rem; margin: 0;
  line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print {
  html { font-size: 11px; }
  body { font-size: 1rem; }
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  th, td { padding: .4rem .5rem; }
  h2 { margin-top: 2rem; break-after: avoid; }
  figure, table, tr, header, dl { break-inside: avoid; }
  figure img { max-height: 8cm; }
  @page { margin: 15mm; }
}
"""
