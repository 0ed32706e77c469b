"""The style sheet of ``report.html``: light and dark, print and phone."""

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1f2430;--muted:#667085;--line:#e4e7ec;
 --accent:#d95f02}
@media (prefers-color-scheme:dark){
 :root{--bg:#0f1218;--card:#161a22;--ink:#e6e9ef;--muted:#98a2b3;--line:#2c3340;--accent:#ff9f4a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
 "Helvetica Neue",Arial,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
header{padding:0 .25rem 1rem}
.kicker{margin:0;color:var(--accent);font-weight:600;font-size:.85rem;letter-spacing:.04em}
h1{margin:.25rem 0 .75rem;font-size:2rem;line-height:1.2;letter-spacing:-.01em}
h2{margin:0 0 1rem;font-size:1.2rem}
h3{margin:1.5rem 0 .5rem;font-size:.95rem;color:var(--muted);font-weight:600}
p{margin:.4rem 0 .8rem}
.lead{font-size:1.1rem}
.muted,figcaption{color:var(--muted);font-size:.88rem}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1.5rem;
 margin:1.25rem 0}
figure{margin:0 0 1.25rem}
img{display:block;max-width:100%;height:auto}
figcaption{margin-top:.5rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.93rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .75rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--muted);font-weight:600}
th:first-child,td:first-child,.text th,.text td{text-align:left}
tbody tr:last-child td{border-bottom:0}
.total td{font-weight:650;border-top:2px solid var(--line)}
dl{display:grid;grid-template-columns:minmax(9rem,max-content) 1fr;gap:.3rem 1.25rem;
 margin:.25rem 0 1rem;font-size:.93rem}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
@media print{body{background:#fff}section{break-inside:avoid;border-color:#ccc}}
"""
