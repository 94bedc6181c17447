"""The page's style sheet and its short script. Light and dark come from one table of colours.

The colours of lines are those of Okabe and Ito (2008),
which colour-blind readers can tell apart. They
are darkened or lightened until text in them can be read on its background. Not for: what the page
says.
"""

# name: (light, dark)
_COLOURS = {
    "ground": ("#fbfaf7", "#15171b"),
    "panel": ("#f3f1eb", "#1d2026"),
    "line": ("#dedad0", "#33373f"),
    "ink": ("#1d1c1a", "#e9e6df"),
    "soft": ("#5f5b53", "#a5a29a"),
    "track": ("#ebe8e0", "#262a31"),
    "t0": ("#0067a5", "#6db9f0"),
    "t1": ("#b84a00", "#ff9f61"),
    "t2": ("#00704f", "#4fd0a7"),
    "t3": ("#94477e", "#e6a0cf"),
    "t4": ("#866000", "#e6c05c"),
    "t5": ("#8a867d", "#7f838c"),
    "h0": ("#08306b", "#9ecbff"),
    "h1": ("#4a84bd", "#4a86c2"),
    "h2": ("#a9c6de", "#2e4a66"),
    "h3": ("#efece4", "#23272e"),
    "h4": ("#f5c89b", "#6b4a2b"),
    "h5": ("#e08a3c", "#c67a34"),
    "h6": ("#a34700", "#ffb071"),
}


def _variables(theme: int) -> str:
    scheme = ("light", "dark")[theme]
    return f"color-scheme:{scheme};" + "".join(
        f"--{name}:{pair[theme]};" for name, pair in _COLOURS.items()
    )


STYLE = (
    f"""
:root{{{_variables(0)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}
:root[data-theme=light]{{{_variables(0)}}}
:root[data-theme=dark]{{{_variables(1)}}}
@media print{{:root,:root[data-theme=light],:root[data-theme=dark]{{{_variables(0)}}}}}
"""
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--ground);color:var(--ink);
font:1.0625rem/1.62 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Noto Sans",Arial,sans-serif;font-variant-numeric:tabular-nums;
text-rendering:optimizeLegibility}
main,header,footer{max-width:49rem;margin:0 auto;padding:0 1.5rem}
h1,h2,.figure b,.mark{font-family:"Iowan Old Style","Palatino Linotype",Palatino,"Source Serif 4",
Charter,Georgia,
"Noto Serif","DejaVu Serif",serif;font-weight:500}
header{padding-top:3.2rem}
.kicker{display:flex;align-items:baseline;gap:.9rem;color:var(--soft);font-size:.9rem;
margin:0 0 2.4rem}
.mark{color:var(--ink);font-size:1.3rem;letter-spacing:.01em}
.hanzi{font-family:"Songti SC","STSong","Noto Serif CJK SC","Source Han Serif SC","Noto Serif SC",
SimSun,serif;
font-size:1.5rem;font-weight:700;color:var(--ink);letter-spacing:.12em;white-space:nowrap}
.hanzi .void{color:transparent;-webkit-text-stroke:.7px var(--ink)}
.day{white-space:nowrap}
.kicker button{margin-left:auto;align-self:center;font:inherit;font-size:.82rem;color:var(--soft);
background:none;
border:1px solid var(--line);border-radius:1rem;padding:.1rem .8rem;cursor:pointer;
white-space:nowrap}
.kicker button:hover{color:var(--ink);border-color:var(--soft)}
:focus-visible{outline:2px solid var(--t0);outline-offset:3px}
h1{font-size:clamp(1.55rem,1.05rem + 2.1vw,2.3rem);line-height:1.28;letter-spacing:-.012em;
margin:0 0 1.4rem;
text-wrap:pretty}
.lede{font-size:1.12rem;color:var(--soft);max-width:42rem;margin:0 0 .8rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.5rem,1fr));gap:1.6rem 1.4rem;
margin:2.6rem 0 0;
padding:1.5rem 0;border-top:1px solid var(--line);border-bottom:1px solid var(--line)}
.figure b{display:block;font-size:1.65rem;line-height:1.2;white-space:nowrap}
.figure span{display:block;font-size:.84rem;line-height:1.4;color:var(--soft);margin-top:.25rem}
section{margin:4.4rem 0 0}
h2{font-size:1.6rem;line-height:1.25;margin:0 0 .9rem;letter-spacing:-.008em;display:flex;
align-items:baseline;gap:1rem}
h2 small{margin-left:auto;font:400 .88rem system-ui,sans-serif;letter-spacing:0;color:var(--soft);
white-space:nowrap}
h3{font-size:1.02rem;font-weight:650;margin:2.4rem 0 .3rem}
p{margin:0 0 1rem;max-width:42rem}
p.hash{max-width:none;overflow-wrap:anywhere;color:var(--soft);font-size:.78rem}
figcaption,.legend{font-size:.86rem;line-height:1.5;color:var(--soft)}
a{color:inherit;text-decoration-color:var(--line);text-underline-offset:.2em}
a:hover{text-decoration-color:currentColor}
ol.story{list-style:none;margin:0;padding:0}
.story li{position:relative;display:grid;grid-template-columns:9.4rem 1fr auto;gap:0 1rem;
padding:.75rem 0 .85rem 1.7rem}
.story li::before{content:"";position:absolute;left:.28rem;top:1.28rem;width:.56rem;height:.56rem;
border-radius:50%;
border:1.5px solid var(--ink);background:var(--ground);z-index:1}
.story li.real::before{background:var(--ink)}
.story li::after{content:"";position:absolute;left:.53rem;top:0;bottom:0;width:1px;
background:var(--line)}
.story li:first-child::after{top:1.3rem}.story li:last-child::after{bottom:calc(100% - 1.3rem)}
.story b{font-weight:600}.story .did{color:var(--soft);font-size:.95rem}
.story .time{text-align:right;white-space:nowrap;font-size:.95rem}
.story .share{grid-column:2/4;height:3px;margin-top:.5rem;background:var(--track);border-radius:2px}
.story .share i{display:block;height:100%;min-width:2px;background:var(--t0);border-radius:2px}
dl.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr));gap:.9rem 1.4rem;
margin:1.4rem 0}
.facts dt{font-size:.82rem;color:var(--soft);line-height:1.4}.facts dd{margin:0;
overflow-wrap:anywhere}
figure{margin:1.5rem 0 1.7rem;break-inside:avoid}h3+figure{margin-top:.7rem}
figcaption{margin-top:.5rem;max-width:42rem}
.chart{position:relative;container-type:inline-size}.from420,.from640{display:none}
@container (min-width:420px){.from420{display:inline}}
@container (min-width:640px){.from640{display:inline}}
.chart.lines{padding-bottom:44px}.chart.cells{padding-bottom:24px}
.axis{font-size:.78rem;color:var(--soft);margin:0 0 .65rem;line-height:1.3;max-width:none}
svg{display:block;overflow:visible}svg svg{overflow:hidden}
svg.plot{--left:46px;margin-left:var(--left);width:calc(100% - var(--left) - var(--right,16px))}
svg.heat{margin:0 0 0 28px;width:calc(100% - 28px)}svg.bars{width:100%}
svg text{font-size:12px;fill:var(--soft)}
svg .name{font-weight:600;font-size:11.5px}svg .label,svg .value{font-size:13.5px;fill:var(--ink)}
svg .value{font-weight:600}svg .group{font-size:12px;font-weight:600;letter-spacing:.02em}
.grid{stroke:var(--line);stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-width:1.9;vector-effect:non-scaling-stroke;
stroke-linejoin:round}
.line.faint{stroke-width:1;opacity:.32}
.dot{fill:var(--c);stroke:var(--ground);stroke-width:1}
.bar{fill:var(--c)}.track{fill:var(--track)}
.whisker{stroke:var(--ink);stroke-width:1.3}
line.reference{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 4}
text.reference{fill:var(--soft);font-weight:400}
svg text.name:not(.reference){fill:var(--c)}
.t0{--c:var(--t0)}.t1{--c:var(--t1)}.t2{--c:var(--t2)}.t3{--c:var(--t3)}.t4{--c:var(--t4)}
.t5{--c:var(--t5)}
.h0{fill:var(--h0);background:var(--h0)}.h1{fill:var(--h1);background:var(--h1)}.h2{fill:var(--h2);
background:var(--h2)}
.h3{fill:var(--h3);background:var(--h3)}.h4{fill:var(--h4);background:var(--h4)}.h5{fill:var(--h5);
background:var(--h5)}
.h6{fill:var(--h6);background:var(--h6)}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:.2rem 0 1rem;padding:0;list-style:none}
.legend i{display:inline-block;width:.95rem;height:.7rem;margin-right:.45rem;
border:1px solid var(--line)}
.small{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:0 2.2rem}
.small figure{margin:.8rem 0}
.tip{position:absolute;pointer-events:none;z-index:3;background:var(--ground);
border:1px solid var(--line);
border-radius:.35rem;padding:.3rem .6rem;font-size:.8rem;line-height:1.45;white-space:pre;
box-shadow:0 2px 10px #0002}
.cross{position:absolute;width:1px;background:var(--soft);opacity:.55;pointer-events:none}
.verdict{border-left:3px solid var(--t1);padding:.1rem 0 .1rem 1.1rem;margin:1.6rem 0}
.verdict p:last-child{margin:0}.verdict h3{margin-top:0}.asked .text{font-weight:600;
font-size:.95rem}
.sample{border-top:1px solid var(--line);padding:1.1rem 0 1.3rem;break-inside:avoid}
.sample .asked{display:flex;gap:1rem;justify-content:space-between;align-items:baseline;
margin:0 0 .7rem;max-width:none}
.sample .asked span{color:var(--soft);font-size:.86rem;white-space:nowrap}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1.3rem}
.answer h4{font-size:.8rem;font-weight:500;color:var(--soft);margin:0 0 .4rem;display:flex;
gap:.6rem}
.sign{font-weight:650}.sign.right{color:var(--t2)}.sign.wrong{color:var(--t1)}
pre,code,.hash,.written{font-family:ui-monospace,"SF Mono",SFMono-Regular,Menlo,Consolas,
"DejaVu Sans Mono",monospace;
font-size:.84rem;line-height:1.5}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;margin:0}
.thought{color:var(--soft);background:var(--panel);border-radius:.35rem;padding:.5rem .75rem;
margin:0 0 .45rem;
max-height:14rem;overflow:auto}
.call,.observed{padding:0 .75rem;margin:0 0 .45rem}.call{color:var(--t3)}
.observed{color:var(--soft);border-left:2px solid var(--line)}
.silent{color:var(--soft);font-size:.84rem;font-style:italic;margin:0 0 .45rem}
pre{background:var(--panel);border-radius:.4rem;padding:1rem 1.15rem;margin:1rem 0;
max-height:30rem;overflow:auto;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
pre .given{color:var(--soft)}
.wide{overflow-x:auto;margin:1.2rem 0}
.rows{border-collapse:collapse;width:100%;font-size:.84rem;line-height:1.4}
.rows th,.rows td{border-top:1px solid var(--line);padding:.3rem .6rem .3rem 0;text-align:left;
vertical-align:top;font-weight:400}
.rows thead th{border-top:0;color:var(--soft);font-size:.8rem}
.rows .n{text-align:right;white-space:nowrap}
.rows td:not(.n){overflow-wrap:anywhere;unicode-bidi:isolate}
.rows td:first-child:not(.n){min-width:11rem}
.numbers{columns:2;column-gap:2.4rem;margin-top:1.2rem}
.numbers table{border-collapse:collapse;width:100%;margin:0 0 1.5rem;font-size:.8rem;
line-height:1.4;
break-inside:avoid-column}
.numbers caption{text-align:left;font-weight:600;font-size:.86rem;padding-bottom:.3rem}
.numbers tr{display:grid;grid-template-columns:fit-content(62%) minmax(0,1fr);
border-top:1px solid var(--line)}
.numbers th,.numbers td{padding:.22rem 0;text-align:left;font-weight:400}
.numbers th{color:var(--soft);padding-right:1rem;overflow-wrap:anywhere}
.numbers td{text-align:right;overflow-wrap:anywhere;unicode-bidi:isolate}
footer{margin-top:5rem;padding-top:1.2rem;padding-bottom:3.5rem;font-size:.84rem;color:var(--soft)}
footer p{border-top:1px solid var(--line);padding-top:1.2rem;max-width:none}
@media (max-width:40rem){body{font-size:1rem}header{padding-top:1.6rem}.kicker{margin-bottom:1.6rem}
main,header,footer{padding-left:1.1rem;padding-right:1.1rem}section{margin-top:3.2rem}
.story li{grid-template-columns:1fr auto}.story .did{grid-column:1/3;grid-row:2}
.story .share{grid-column:1/3}
.pair{grid-template-columns:1fr;gap:.9rem}.numbers{columns:1}
.figures{grid-template-columns:auto auto}
.figure b{font-size:1.3rem}dl.facts{grid-template-columns:repeat(auto-fill,minmax(8rem,1fr))}
.kicker{gap:.2rem .6rem;flex-wrap:wrap}.kicker .run{order:1;flex-basis:100%}
.sample .asked{flex-wrap:wrap;gap:.2rem 1rem}svg.plot{--left:38px}}
@media print{body{font-size:10pt;background:none}header{padding-top:0}
button,.tip,.cross{display:none!important}
main,header,footer{max-width:none;padding:0}section{margin-top:2.2rem}h2,h3{break-after:avoid}
.story li{break-inside:avoid}
pre,.thought{max-height:none;overflow:visible}
.bar,.track,.heat path,.legend i,.story i,.story .share,.dot,.thought,pre,
.story li::before{-webkit-print-color-adjust:exact;print-color-adjust:exact}@page{margin:16mm}}
"""
)

SCRIPT = """
(() => {
  const root = document.documentElement, button = document.getElementById('theme');
  button.hidden = false;
  button.onclick = () => {
    root.dataset.theme = getComputedStyle(root).colorScheme.includes('dark') ? 'light' : 'dark';
  };
  const show = v => {
    const a = Math.abs(v);
    if (a >= 1e6) return (v / 1e6).toPrecision(4) + ' M';
    if (a >= 1e4) return Math.round(v).toLocaleString('en').replaceAll(',', '\\u202f');
    return String(+v.toPrecision(4));
  };
  for (const plot of document.querySelectorAll('svg.plot')) {
    const [x0, x1] = plot.dataset.x.split(' ').map(Number);
    const [y0, y1] = plot.dataset.y.split(' ').map(Number);
    const height = +plot.dataset.height, chart = plot.parentElement;
    const lines = [...plot.querySelectorAll('path[data-label]')].map(path => [path.dataset.label,
      [...path.getAttribute('d').matchAll(/(-?[\\d.]+),(-?[\\d.]+)/g)].map(m => [+m[1], +m[2]])]);
    const tip = document.createElement('div'), cross = document.createElement('div');
    tip.className = 'tip';
    cross.className = 'cross';
    tip.hidden = cross.hidden = true;
    chart.append(cross, tip);
    chart.onpointerleave = () => { tip.hidden = cross.hidden = true; };
    chart.onpointermove = event => {
      const box = plot.getBoundingClientRect(), frame = chart.getBoundingClientRect();
      const u = (event.clientX - box.left) / box.width * 1000;
      if (u < 0 || u > 1000 || !lines.length) return chart.onpointerleave();
      const near = lines.map(([label, points]) => [label, points.reduce((a, b) =>
        Math.abs(b[0] - u) < Math.abs(a[0] - u) ? b : a)]);
      const nearest = near.reduce((a, b) => Math.abs(b[1][0] - u) < Math.abs(a[1][0] - u) ? b : a);
      const at = nearest[1][0] / 1000;
      const x = x0 + at * (x1 - x0);
      tip.textContent = plot.dataset.name + ' ' + show(x) + near.map(([label, p]) =>
        '\\n' + label + '  ' + show(y0 + (1 - p[1] / height) * (y1 - y0))).join('');
      tip.hidden = cross.hidden = false;
      const left = box.left - frame.left + at * box.width;
      cross.style.cssText = `left:${left}px;top:${box.top - frame.top}px;height:${height}px`;
      tip.style.left = Math.max(0, Math.min(left + 12, frame.width - tip.offsetWidth)) + 'px';
      tip.style.top = box.top - frame.top + 6 + 'px';
    };
  }
})();
"""
