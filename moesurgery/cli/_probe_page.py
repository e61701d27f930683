"""A probe as one HTML page that needs nothing else: a map of any measure, each expert's figures and tokens."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from moesurgery.checkpoint.strict_json import ascii_json
from moesurgery.cli._pictures import Heatmap, Panel, largest_bars


def panels(document: Mapping[str, Any]) -> list[Panel]:
    """Return the pictures of a probe, all in millinats per token: layer by expert, then each index over all layers."""
    layers = document["layers"]
    framed = {(y, x) for y, layer in enumerate(layers) for x in layer["super_experts"]}
    pictures: list[Panel] = []
    for mode in document["modes"]:
        changes = [[expert["change"].get(mode) for expert in layer["experts"]] for layer in layers]
        pictures.append(
            Heatmap(
                f"Loss without each expert ({mode}), change in millinats per token",
                [f"layer {layer['number']}" for layer in layers],
                [str(e) for e in range(max(map(len, changes)))],
                [[None if v is None else 1000 * v for v in row] for row in changes],
                "millinats",
                framed=framed,
                frame="super expert: its output is far above all others'",
            )
        )
    for mode, by in document["indices"].items():
        if by:
            values = {f"expert {e}": 1000 * v for e, v in by.items()}
            pictures.append(largest_bars(f"One index out of all layers ({mode})", values, "millinats per token"))
    return pictures


def about_probe(document: Mapping[str, Any]) -> str:
    """Say of what a probe was measured."""
    texts = document["text"]
    named = ", ".join(str(t.get("file", t)) if isinstance(t, Mapping) else str(t) for t in texts)
    seed = f"seed {document['seed']}"
    return f"{document['tokens']:,} tokens of {named}, {seed}; loss {document['loss']:.4f} nats per token"


def probe_page(document: Mapping[str, Any]) -> str:
    """Return the page. It is walked by Tab and the arrow keys as well as by clicks."""
    data = ascii_json(document, indent=None).replace("<", "\\u003c")
    name, about = html.escape(str(document["name"])), html.escape(about_probe(document))
    return _PAGE.replace("@NAME@", name).replace("@ABOUT@", about).replace("@DATA@", data)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>@NAME@: what each expert does</title>
<style>
:root{color-scheme:light dark;--ink:#22262b;--paper:#fff;--soft:#5b6570;--line:#d5dae0;--chip:#eef1f4}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--paper:#16191d;--soft:#9aa4ae;--line:#3a424a;--chip:#2a3037}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:1.5rem auto;max-width:76rem;
padding:0 1rem} h1{font-size:1.3rem;margin:0 0 .2rem;overflow-wrap:anywhere} .about{color:var(--soft);margin:0 0 1rem}
select{font:inherit;padding:.2rem .4rem;max-width:100%} .map{overflow-x:auto;margin:1rem 0;padding:3px}
table{border-collapse:separate;border-spacing:2px} th{font-weight:500;font-size:.75rem;color:var(--soft);
padding:0 .35rem;white-space:nowrap} tbody th,thead td{position:sticky;left:0;background:var(--paper);text-align:right;
z-index:1} td.c{min-width:2.4rem;height:1.9rem;text-align:center;font-size:.72rem;border-radius:3px;cursor:pointer;
background:color-mix(in srgb,var(--hue) calc(var(--t)*100%),var(--paper))} td.c.w{color:#fff}
td.c.small{min-width:.8rem;font-size:0} th.small{max-width:.8rem;padding:0}
td.s{outline:2px solid var(--ink);outline-offset:-2px}
td.c:focus-visible,td.on{box-shadow:0 0 0 3px #f0a202;position:relative}
td.none,.key .none{background:repeating-linear-gradient(45deg,var(--chip) 0 3px,var(--line) 3px 4px)}
.key{margin-bottom:1rem;display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;font-size:.8rem;color:var(--soft);
align-items:center}
.key i{display:inline-block;width:1rem;height:1rem;vertical-align:-.2rem;margin-right:.35rem;border-radius:3px}
.key .bar{width:8rem;margin:0 .4rem} .key .s{outline:2px solid var(--ink);outline-offset:-2px}
#card{border:1px solid var(--line);border-radius:6px;padding:.8rem 1rem;min-height:7rem;overflow-wrap:anywhere}
#card b{font-weight:600} .tok{display:inline-block;background:var(--chip);border-radius:3px;padding:0 .35rem;
margin:.15rem .2rem .15rem 0;font-family:ui-monospace,monospace;font-size:.82rem;white-space:pre;max-width:100%;
overflow:hidden;text-overflow:ellipsis}
</style></head><body>
<h1>@NAME@: what each expert does</h1><p class="about">@ABOUT@</p>
<label>Show <select id="what"></select></label>
<div class="map"><table id="map" role="grid" aria-label="layers by experts"></table></div>
<div class="key" id="key"></div>
<div id="card" aria-live="polite">Choose a cell, by a click or with Tab, the arrow keys and Enter: its figures, and the
tokens that come to it more than elsewhere.</div>
<script id="data" type="application/json">@DATA@</script>
<script>
const D=JSON.parse(document.getElementById('data').textContent),M={};
let most=1;
const power=v=>+Math.abs(v).toExponential(2).split('e')[1];
const few=v=>{if(!v)return'0';const p=Math.min(Math.max(0,2-power(v)),Math.max(0,3-power(most)));
 const t=v.toFixed(p);return+t?t:'0'};
for(const m of D.modes)M['change of loss ('+m+')']={f:e=>m in e.change?1000*e.change[m]:null,u:'millinats per token'};
M['share of tokens']={f:e=>100*e.usage,u:'%'};
M['mean gate weight']={f:e=>e.gate,u:''};
M['REAP']={f:e=>e.reap,u:'gate times output norm, mean'};
M['largest activation']={f:e=>e.peak,u:'largest |f|'};
const $=i=>document.getElementById(i),what=$('what'),map=$('map'),key=$('key');
for(const k in M)what.add(new Option(k));
const make=(tag,cls,text)=>{const n=document.createElement(tag);if(cls)n.className=cls;
 if(text)n.textContent=text;return n};
function shade(v,low,high){const near=low>0&&high<4*low,t=near?(high>low?.1+.9*(v-low)/(high-low):.5):
 Math.sqrt(Math.abs(v)/Math.max(Math.abs(low),Math.abs(high),1e-300));return[v<0?'#2563b0':'#c2410c',t]}
function draw(){const m=M[what.value],all=D.layers.flatMap(l=>l.experts.map(m.f)).filter(v=>v!==null);
 const low=Math.min(...all),high=Math.max(...all),E=Math.max(...D.layers.map(l=>l.experts.length));map.textContent='';
 most=Math.max(Math.abs(low),Math.abs(high));const head=map.createTHead().insertRow(),body=map.createTBody();
 head.insertCell();
 for(let e=0;e<E;e++){const h=make('th','',E<=32||e%8===0?''+e:'');h.scope='col';
 if(E>32)h.className='small';head.append(h)}
 D.layers.forEach((l,y)=>{const r=body.insertRow(),h=make('th','','layer '+l.number);h.scope='row';r.append(h);
 l.experts.forEach((e,x)=>{const c=r.insertCell(),v=m.f(e),isSuper=l.super_experts.includes(x);
 c.className='c'+(E>32?' small':'')+(isSuper?' s':'')+(v===null?' none':'');
 c.tabIndex=x===0&&y===0?0:-1;const says=v===null?'not measured':few(v)+' '+m.u;
 c.setAttribute('aria-label','layer '+l.number+', expert '+x+': '+says);c.title=c.getAttribute('aria-label');
 if(v!==null){const[hue,t]=shade(v,low,high);c.textContent=few(v);c.style.setProperty('--hue',hue);
 c.style.setProperty('--t',t.toFixed(3));if(t>.6)c.classList.add('w')}
 c.onclick=()=>show(l,x,c);c.onkeydown=k=>walk(k,l,x,y,c)})});
 key.textContent='';const scale=make('span','',few(low)),bar=make('i','bar');
 const stops=[...Array(9).keys()].map(i=>{const[hue,t]=shade(low+(high-low)*i/8,low,high);
 return'color-mix(in srgb,'+hue+' '+Math.round(100*t)+'%,var(--paper))'});
 bar.style.background='linear-gradient(90deg,'+stops.join(',')+')';
 scale.append(bar,few(high)+' '+m.u);key.append(scale);
 const entry=(cls,text)=>{const s=make('span');s.append(make('i',cls),text);key.append(s)};
 if(D.layers.some(l=>l.super_experts.length))entry('s','super expert: its output is far above all others\\u2019');
 if(D.layers.some(l=>l.experts.some(e=>m.f(e)===null)))entry('none','not measured')}
function walk(k,l,x,y,c){if(k.key==='Enter'||k.key===' '){k.preventDefault();show(l,x,c);return}
 const step={ArrowRight:[1,0],ArrowLeft:[-1,0],ArrowDown:[0,1],ArrowUp:[0,-1]}[k.key];if(!step)return;
 k.preventDefault();
 const row=map.tBodies[0].rows[y+step[1]],to=row&&row.cells[x+1+step[0]];
 if(to&&to.tagName==='TD'){c.tabIndex=-1;to.tabIndex=0;to.focus();to.scrollIntoView({block:'nearest',inline:'center'})}}
function show(l,i,c){document.querySelectorAll('td.on').forEach(x=>x.classList.remove('on'));c.classList.add('on');
 const e=l.experts[i],card=$('card');card.textContent='';
 card.append(make('b','','Layer '+l.number+', expert '+i+(l.super_experts.includes(i)?' (super expert)':'')));
 most=1e-3;card.append(make('p','',Object.keys(M).map(k=>{const v=M[k].f(e);
 return v===null?null:k+' '+few(v)+(M[k].u?' '+M[k].u:'')}).filter(x=>x).join('; ')+'. Layer: routing entropy '+
 l.entropy.toFixed(2)+' nats, load balance '+l.balance.toFixed(2)+'.'));
 for(const t of e.takes){const s=make('span','tok',t.text);
 s.title=t.count+' times, '+(100*t.share).toFixed(0)+' % of its occurrences';card.append(s)}}
what.onchange=draw;draw();
</script></body></html>
"""
