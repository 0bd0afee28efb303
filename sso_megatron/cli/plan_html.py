"""A plan as one HTML page that needs no network."""

import io
import re
from typing import Any

from jinja2 import Environment

from sso_megatron.cli import plan_text
from sso_megatron.cli.plan_speed import Speed
from sso_megatron.mcore.plan_records import Plan

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Plan: {{ plan.optimizer }}, {{ plan.world_size }} ranks</title>
<style>
  :root { color-scheme: light; }
  body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
         max-width: 76rem; margin: 2.5rem auto; padding: 0 1.5rem; }
  h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
  p { max-width: 46rem; } .muted { color: #555; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; }
  dt { color: #555; } dd { margin: 0; max-width: 52rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
  th { text-align: left; font-weight: 600; border-bottom: 2px solid #1a1a1a; }
  th, td { padding: .3rem .9rem .3rem 0; vertical-align: top; white-space: pre-line; }
  td { border-bottom: 1px solid #ddd; } td.name { font-family: ui-monospace, monospace; }
  td.n { text-align: right; }
  .warning { border-left: 5px solid #1a1a1a; padding: .1rem 0 .1rem .9rem;
             margin: .7rem 0; max-width: 60rem; }
  svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>Plan of a run with <code>--optimizer {{ plan.optimizer }}</code></h1>
<p class="muted">What the optimizer will do to every weight, found by building the model without
weights.</p>
<dl>{% for name, text in summary %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
<h2>Warnings</h2>
{% for warning in plan.warnings %}<p class="warning">{{ warning }}</p>{% else %}<p>None.</p>{% endfor %}
<h2>Balance</h2>
<figure style="margin:0" role="img" aria-label="Work of each data-parallel rank">{{ picture|safe }}</figure>
<p class="muted">{{ caption }}</p>
<h2>Parameters</h2>
<div class="scroll"><table>
<tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td{{ ' class="name"' if loop.first else '' }}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</table></div>
{% if cuts %}<h2>Cut by tensor parallelism</h2>
<div class="scroll"><table>
<tr>{% for head in cut_heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in cuts %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
<h2>Notes</h2>
<ul>{% for note in plan.notes %}<li>{{ note }}</li>{% endfor %}</ul>
</body>
</html>
"""

_METADATA = ("Creator", "Date", "Format", "Type")


def page(plan: Plan, speed: Speed | None) -> str:
    """The page's text."""
    environment = Environment(autoescape=True)
    count = len(plan.flops_by_data_rank())
    caption = (
        f"Flops of a spectral step on each of {count} data-parallel ranks, at pipeline stage "
        f"{plan.busiest.stage} and tensor-parallel rank {plan.busiest.tensor}, where the busiest rank is. "
        "The line is the mean."
        if plan.is_sharded
        else "Data-parallel ranks do not share the matrices out: each does all of this work."
    )
    return environment.from_string(_PAGE).render(
        plan=plan,
        summary=plan_text.summary(plan, speed),
        rows=[plan_text.cells(plan, row) for row in plan_text.rows_of(plan.parameters, is_full=False)],
        heads=(*plan_text.COLUMNS, "dp owner") if plan.is_sharded else plan_text.COLUMNS,
        cuts=plan_text.cut_rows(plan),
        cut_heads=plan_text.CUT_COLUMNS,
        picture=balance(plan),
        caption=caption,
    )


def balance(plan: Plan) -> str:
    """An SVG element: the work of each data-parallel rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    flops = plan.flops_by_data_rank()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plan", "font.family": "sans-serif"}):
        figure, axis = plt.subplots(figsize=(9, 2.8))
        axis.bar(
            range(len(flops)), flops, color="0.75", edgecolor="0.1", linewidth=0.6 if len(flops) < 65 else 0
        )
        mean = sum(flops) / len(flops)
        axis.axhline(mean, color="0.1", linestyle="--", linewidth=1.2)
        axis.set(xlabel="data-parallel rank", ylabel="flop a step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(_METADATA))
        plt.close(figure)
    found: Any = re.search(r"<svg.*</svg>", text.getvalue(), re.DOTALL)
    return str(found[0])
