"""Writes a plan as one HTML page that needs no network."""

from markupsafe import Markup

from sso_megatron.cli.plan import text as plan_text
from sso_megatron.cli.plan.speed import Speed
from sso_megatron.cli.plot import axes as plot_axes
from sso_megatron.cli.shared import pages
from sso_megatron.mcore.plan.records import Plan

_MAX_EDGED = 64
"""Most bars of a picture that have an edge; with more bars, edges would be all that is seen."""


def page(plan: Plan, speed: Speed | None) -> str:
    """Return the page's text."""
    count = len(plan.flops_by_data_rank())
    caption = (
        f"Flops of a spectral step on each of {count} data-parallel ranks, at pipeline stage "
        f"{plan.busiest.stage} and tensor-parallel rank {plan.busiest.tensor}, where the busiest rank is. "
        "The line is the mean."
        if plan.is_sharded
        else "Data-parallel ranks do not share the matrices out: each does all of this work."
    )
    return pages.render(
        "plan/plan.html.j2",
        plan=plan,
        summary=plan_text.summary(plan, speed),
        rows=[plan_text.cells(plan, row) for row in plan_text.rows_of(plan.parameters, is_full=False)],
        heads=plan_text.heads(plan),
        cuts=plan_text.cut_rows(plan),
        cut_heads=plan_text.CUT_COLUMNS,
        picture=Markup(balance(plan)),
        caption=caption,
    )


def balance(plan: Plan) -> str:
    """Return an SVG element that shows the work of each data-parallel rank."""
    flops = plan.flops_by_data_rank()
    with plot_axes.look():
        figure, (axis,) = plot_axes.panels(1, width=9.0, height=2.4)
        width = 0.6 if len(flops) <= _MAX_EDGED else 0
        axis.bar(range(len(flops)), flops, color="0.75", edgecolor="0.1", linewidth=width)
        axis.axhline(sum(flops) / len(flops), color="0.1", linestyle="--", linewidth=1.2)
        axis.set(xlabel="data-parallel rank", ylabel="flop a step")
        plot_axes.whole_numbers(axis)
        svg = plot_axes.svg_of(figure)
    return svg[svg.index("<svg ") :]
