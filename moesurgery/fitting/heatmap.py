"""A probe as pictures: a layer x expert heat map as PNG, and one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.strict_json import ascii_json
from moesurgery.errors import OutputError

ANNOTATED = 160  # cells: with more, numbers would not be legible
INK, PAPER = "#22262b", "#ffffff"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw the change of loss without each expert, and without each index over all layers, as PNG.

    Raises OutputError where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise OutputError(
            "the picture needs matplotlib", "`pip install moesurgery[plot]`, or leave out --png"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.colors import SymLogNorm
    from matplotlib.patches import Rectangle

    mode = document["modes"][0]
    layers = document["layers"]
    values = 1000 * np.array([[_number(e["change"].get(mode)) for e in layer["experts"]] for layer in layers])
    count = values.shape[1]
    largest = float(np.nanmax(np.abs(values), initial=0.1))
    typical = float(np.nanmedian(np.abs(values))) if np.isfinite(values).any() else 0.1
    norm = SymLogNorm(max(typical, largest / 1e4, 1e-6), linscale=0.6, vmin=-largest, vmax=largest)
    cell = 0.62 if values.size <= ANNOTATED else max(0.06, min(0.3, 14 / count))
    width = min(24.0, 2.2 + cell * count + 1.1)
    height = min(30.0, 2.6 + max(0.16, min(0.5, cell)) * len(layers) + 1.9)
    figure, (bars, grid) = plt.subplots(
        2, 1, figsize=(width, height), height_ratios=(1.4, max(1.0, 0.42 * len(layers))), layout="constrained"
    )
    figure.suptitle(f"{document['name']}: loss without each expert", fontsize=12, color=INK, fontweight="bold")
    _bars(bars, document, mode, count)
    image = grid.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    grid.set_xlabel("expert")
    grid.set_ylabel("layer")
    step = max(1, count // 32)
    grid.set_xticks(range(0, count, step), [str(e) for e in range(0, count, step)])
    every = max(1, len(layers) // 40)
    grid.set_yticks(range(0, len(layers), every), [str(layer["number"]) for layer in layers[::every]])
    if values.size <= ANNOTATED:
        for y, x in np.ndindex(*values.shape):
            if np.isfinite(values[y, x]):
                dark = abs(float(norm(values[y, x])) - 0.5) > 0.3
                digits = 0 if abs(values[y, x]) >= 10 else 1
                text = f"{round(float(values[y, x]), digits) + 0.0:.{digits}f}"  # never -0.0
                grid.text(x, y, text, ha="center", va="center", fontsize=8, color=PAPER if dark else INK)
    for y, layer in enumerate(layers):
        for x in layer["super_experts"]:
            grid.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=2))
    bar = figure.colorbar(image, ax=grid, pad=0.02, fraction=0.04)
    bar.set_label("change of loss, millinats per token", color=INK)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axes: Any, document: Mapping[str, Any], mode: str, count: int) -> None:
    """The chart of one index over all layers, which a few layers make."""
    index = document["indices"].get(mode, {})
    axes.bar([int(e) for e in index], [float(v) for v in index.values()], color="#7d8894", width=0.7)
    if index:
        worst = max(index, key=lambda e: index[e])
        axes.bar([int(worst)], [float(index[worst])], color="#b2182b", width=0.7)
        axes.text(int(worst), float(index[worst]), f"{index[worst]:+.2f}", ha="center", va="bottom", fontsize=8)
    axes.set_xlim(-0.5, count - 0.5)
    axes.margins(y=0.2)
    axes.set_title(f"one index out of all layers ({mode}), nats per token", fontsize=9, loc="left", color=INK)
    axes.set_xticks([])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def page(document: Mapping[str, Any]) -> str:
    """Return the HTML page: a heat map of any measure, with each expert's figures and tokens on a click."""
    data = ascii_json(document, indent=None).replace("<", "\\u003c")
    return _PAGE.replace("@NAME@", html.escape(str(document["name"]))).replace("@DATA@", data)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>@NAME@: what each expert does</title>
<style>
body{font:15px/1.45 system-ui,sans-serif;color:#22262b;background:#fff;margin:2rem auto;max-width:76rem;padding:0 1rem}
h1{font-size:1.3rem;margin:0 0 .2rem} .about{color:#5b6570;margin:0 0 1rem}
select{font:inherit;padding:.2rem .4rem} .map{overflow-x:auto;margin:1rem 0}
table{border-collapse:separate;border-spacing:2px} th{font-weight:500;font-size:.75rem;color:#5b6570;text-align:right;
padding:0 .35rem}
td.c{min-width:2.4rem;height:1.9rem;text-align:center;font-size:.72rem;border-radius:3px;cursor:pointer}
td.c.small{min-width:.6rem;font-size:0} td.s{outline:2px solid #22262b} td.on{box-shadow:0 0 0 3px #f0a202}
#card{border:1px solid #d5dae0;border-radius:6px;padding:.8rem 1rem;min-height:7rem} #card b{font-weight:600}
.tok{display:inline-block;background:#eef1f4;border-radius:3px;padding:0 .35rem;margin:.15rem .2rem .15rem 0;
font-family:ui-monospace,monospace;font-size:.82rem;white-space:pre}
</style></head><body>
<h1>@NAME@: what each expert does</h1><p class="about" id="about"></p>
<label>Show <select id="what"></select></label>
<div class="map"><table id="map"></table></div>
<div id="card">Click a cell: its figures, and the tokens that come to it more than elsewhere.</div>
<script id="data" type="application/json">@DATA@</script>
<script>
const D=JSON.parse(document.getElementById('data').textContent);
const M={};
for(const m of D.modes)M['change of loss ('+m+')']={f:e=>e.change[m]??null,
 n:v=>(Math.round(1e4*v)/10+0).toFixed(Math.abs(v)<.01?1:0),
 u:'millinats per token',signed:true};
M['share of tokens']={f:e=>e.usage,n:v=>(100*v).toFixed(0),u:'%'};
M['mean gate weight']={f:e=>e.gate,n:v=>v.toFixed(2),u:''};
M['REAP']={f:e=>e.reap,n:v=>v.toPrecision(2),u:'gate times output norm, mean'};
M['largest activation']={f:e=>e.peak,n:v=>v.toPrecision(2),u:'largest |f|'};
const $=i=>document.getElementById(i),what=$('what'),map=$('map');
for(const k in M)what.add(new Option(k));
$('about').textContent=D.tokens.toLocaleString('en')+' tokens; loss '+D.loss.toFixed(4)+
 ' nats per token. Thick border: super expert.';
function colour(v,max,signed){if(v===null)return'#f3f4f6';const t=Math.sign(v)*Math.sqrt(Math.min(1,Math.abs(v)/max));
 const mix=(a,b,s)=>a.map((x,i)=>Math.round(x+(b[i]-x)*s));
 const c=t<0?mix([247,247,247],[33,102,172],-t):mix([247,247,247],signed?[178,24,43]:[27,94,110],t);
 return'rgb('+c+')'}
function draw(){const m=M[what.value],all=D.layers.flatMap(l=>l.experts.map(m.f)).filter(v=>v!==null);
 const max=Math.max(...all.map(Math.abs),1e-12),E=D.layers[0].experts.length;map.textContent='';
 const head=map.insertRow();head.insertCell();for(let e=0;e<E;e++){const h=document.createElement('th');
 h.textContent=E<=32||e%8==0?e:'';h.style.textAlign='center';head.append(h)}
 for(const l of D.layers){const r=map.insertRow(),h=document.createElement('th');
 h.textContent='layer '+l.number;r.append(h);
 l.experts.forEach((e,i)=>{const c=r.insertCell(),v=m.f(e);c.className='c'+(E>32?' small':'')+
 (l.super_experts.includes(i)?' s':'');c.textContent=v===null?'':m.n(v);c.style.background=colour(v,max,m.signed);
 if(v!==null&&Math.sqrt(Math.abs(v)/max)>.62)c.style.color='#fff';
 c.title='layer '+l.number+', expert '+i+(v===null?'':': '+m.n(v)+' '+m.u);c.onclick=()=>show(l,i,c)})}}
function show(l,i,c){document.querySelectorAll('td.on').forEach(x=>x.classList.remove('on'));c.classList.add('on');
 const e=l.experts[i],card=$('card');card.textContent='';const b=document.createElement('b');
 b.textContent='Layer '+l.number+', expert '+i+(l.super_experts.includes(i)?' (super expert)':'');card.append(b);
 const p=document.createElement('p');p.textContent=Object.keys(M).map(k=>{const v=M[k].f(e);
 return v===null?null:k+' '+M[k].n(v)+' '+M[k].u}).filter(x=>x).join('; ')+'. Layer: routing entropy '+
 l.entropy.toFixed(2)+' nats, load balance '+l.balance.toFixed(2)+'.';card.append(p);
 for(const t of e.takes){const s=document.createElement('span');s.className='tok';s.textContent=t.text;
 s.title=t.count+' times, '+(100*t.share).toFixed(0)+' % of its occurrences';card.append(s)}}
what.onchange=draw;draw();
</script></body></html>
"""
