"""The Inspect tab: an adapter's update of each layer of the base, as plots and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from ...errors import UserError
from ...evaluation.spectra import TOP, LayerSpectrum, gate_summaries, iter_spectra
from ...formats.adapter_file import layer_ranks
from ...formats.keys import Projection
from ...loaders.gates import GateSummary
from ...reports.plots import bar_chart, column_chart, line_chart
from ..entries import Entry
from ..layout.cards import details, line
from ..layout.page import ALWAYS_LAST, UNQUEUED, Page, handler
from ..runs import Progress, Run
from ..state import App
from .adapter_sliders import NO_ADAPTERS, update_choices, usable_names

TITLE = "Inspect"
HINT = line("Choose an adapter, then press Inspect.")
MAX_BARS, MAX_LINES = 24, 6
ABBREVIATIONS = {
    ".transformer_blocks.0.": ".", "transformer_blocks": "block", "attentions": "attn", "down_blocks": "down",
    "up_blocks": "up", "mid_block": "mid",
}  # fmt: skip


def build(page: Page) -> None:
    """Choice and details of the adapter on the left, plots on the right."""
    app = page.app
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            adapter = gr.Dropdown([], label="Adapter", elem_id="inspect-adapter", interactive=True)
            intruders = gr.Checkbox(
                False, label="Count intruder dimensions (slower)",
                info="Singular vectors that are new to the base; many of them are a sign of forgetting",
                elem_id="inspect-intruders",
            )  # fmt: skip
            go = gr.Button("Inspect", variant="primary", elem_id="inspect-go")
            about = gr.HTML("", elem_id="inspect-about")
        with gr.Column(scale=7, min_width=320):
            status = gr.HTML(HINT, elem_id="inspect-status")
            plots = gr.HTML("", elem_id="inspect-plots")
    refresh = handler(lambda chosen: _choices(page, chosen))
    changes = [page.blocks.load, page.tab.select, page.library_changed.change]
    gr.on(changes, refresh, adapter, adapter, **ALWAYS_LAST, **UNQUEUED)
    go.click(
        handler(inspect_handler(app)), [adapter, intruders], [status, about, plots], api_name="inspect",
        api_visibility="private", concurrency_limit=None, show_progress="hidden",
    )  # fmt: skip


def _choices(page: Page, chosen: str | None) -> Any:
    found = usable_names(page)
    if chosen in found:  # sending the value again could overwrite a choice made in the meantime
        return update_choices(found)
    return gr.update(choices=found, value=found[0] if found else None, info="" if found else NO_ADAPTERS)


def inspect_handler(app: App) -> Any:
    """The handler of the Inspect button; a generator, so that closing the page stops the work."""

    def inspect(name: str | None, intruders: bool) -> Iterator[Any]:
        if not name:
            raise UserError("no adapter is chosen: choose one to inspect")
        entry = app.library.entry(name)
        app.library.hash_all([entry])
        found: list[LayerSpectrum] = []
        gates: dict[str, GateSummary] = {}

        def work(run: Run) -> None:
            app.engine.use([])  # a training moved the base to the CPU, where sampling for the routers takes minutes
            for spectrum, total in iter_spectra(entry.file, app.engine.pipe, bool(intruders)):
                found.append(spectrum)
                run.report(image=len(found), images=total)
                run.check()
            if any(layer.mixture for layer in found):
                gates.update(gate_summaries(entry.file, app.engine.pipe, prompts(entry)))

        run = Run(app.device, "an inspection", work)
        about = details(entry, app.problem(entry))
        for progress in run.follow():
            done = progress.state == "done"
            plots = show(found) + show_gates(gates) + show_ranks(layer_ranks(entry.file)) if done else gr.skip()
            yield _status(progress), about, plots

    return inspect


def _status(progress: Progress) -> str:
    if progress.state == "failed":
        return line(progress.message, bad=True)
    if progress.state == "waiting":
        return line(f"Waiting; now running: {progress.busy_with or 'nothing'}.")
    if progress.state == "done":
        return line(f"{progress.images} layers in {progress.seconds:.1f} s.")
    return line(f"Layer {progress.image} of {progress.images or '…'}")


def show(found: Sequence[LayerSpectrum]) -> str:
    """All plots of an adapter, and their values as a table."""
    if not found:
        return ""
    largest = sorted(found, key=lambda s: -s.relative)
    plots = [
        bar_chart("Update size by block: mean |dW| / |W|", by_block(found), "mean |dW| / |W|"),
        bar_chart("Largest updates: |dW| / |W|", [(label(s), s.relative) for s in largest[:MAX_BARS]], "|dW| / |W|"),
        line_chart("Singular values of the update", {label(s): spectrum(s) for s in largest[:MAX_LINES]},
                   "rank", "s / s1"),
    ]  # fmt: skip
    counted = [s for s in found if s.intruders is not None]
    if counted:
        most = sorted(counted, key=lambda s: -(s.intruders or 0))[:MAX_BARS]
        mean = sum(s.intruders or 0 for s in counted) / len(counted)
        plots.append(
            line(
                f"On average, {mean:.2f} of the {TOP} largest singular directions of an adapted layer are new to the "
                "base (intruder dimensions, arXiv 2410.21228). Many of them are a sign of forgetting."
            )
        )
        if any(s.intruders for s in most):
            bars = [(label(s), float(s.intruders or 0)) for s in most if s.intruders]
            plots.append(bar_chart("Intruder dimensions", bars, f"of {TOP}"))
    if any(s.mixture for s in found):
        plots.append(line("This is a mixture of experts: the values are for equal gates."))
    return f'<div class="plots">{"".join(plots)}{table(largest)}</div>'


def prompts(entry: Entry) -> list[str] | None:
    """Prompts for the router statistics: the adapter's instance prompt, if its file has one."""
    return [entry.info.instance_prompt] if entry.info and entry.info.instance_prompt else None


def show_gates(gates: Mapping[str, GateSummary]) -> str:
    """Router plots: mean gate of each expert, and the sharpest routers."""
    if not gates:
        return ""
    most = max(len(summary.gate) for summary in gates.values())
    shares = [[float(g.gate[n]) for g in gates.values() if n < len(g.gate)] for n in range(most)]
    means = [(f"expert {number}", sum(share) / len(share)) for number, share in enumerate(shares, 1)]
    sharp = sorted(gates.items(), key=lambda item: -item[1].sharpness)[:MAX_BARS]
    return '<div class="plots">' + (
        bar_chart("Router: mean gate of each expert over all layers", means, "mean gate")
        + bar_chart(
            "Router: layers with the sharpest gates (0: all experts equal, 1: one expert)",
            [(short(key.removeprefix("unet.")), summary.sharpness) for key, summary in sharp], "sharpness",
        )
    ) + "</div>"  # fmt: skip


def show_ranks(ranks: Mapping[Projection, int]) -> str:
    """The rank of each layer as a plot; empty if all have the same setting."""
    columns = [
        (short(path if c in ("unet", "transformer") else f"{c}.{path}"), float(r)) for (c, path), r in ranks.items()
    ]
    plot = column_chart("Ranks by layer, in the order of the file", columns, "layer", "rank")
    return f'<div class="plots">{plot}</div>' if plot else ""


def label(layer: LayerSpectrum) -> str:
    """A short layer name for plots; layers of text encoders start with their component."""
    path = short(layer.path)
    return path if layer.component in ("unet", "transformer") else f"{layer.component}.{path}"


def short(path: str) -> str:
    """A module path with common words abbreviated."""
    for word, abbreviation in ABBREVIATIONS.items():
        path = path.replace(word, abbreviation)
    return path


def by_block(found: Sequence[LayerSpectrum]) -> list[tuple[str, float]]:
    """Mean relative size by block of the denoiser, and by component for others."""
    groups: dict[str, list[float]] = {}
    for layer in found:
        words = layer.path.split(".")
        block = ".".join(words[:2]) if len(words) > 1 and words[1].isdigit() else words[0]
        groups.setdefault(block if layer.component == "unet" else layer.component, []).append(layer.relative)
    return [(name, sum(values) / len(values)) for name, values in groups.items()]


def spectrum(layer: LayerSpectrum) -> list[tuple[float, float]]:
    """``(rank, s / s_1)``."""
    first = layer.singular_values[0] if layer.singular_values else 1.0
    return [(float(rank), value / first) for rank, value in enumerate(layer.singular_values, 1)]


def table(found: Sequence[LayerSpectrum]) -> str:
    """A table of all layers."""
    rows = "".join(
        f"<tr><td>{escape(label(s))}</td><td>{s.shape[0]}x{s.shape[1]}</td><td>{s.relative:.4f}</td>"
        f"<td>{s.stable_rank:.2f}</td><td>{'' if s.intruders is None else s.intruders}</td></tr>"
        for s in found
    )
    return (
        f"<details><summary>All {len(found)} layers</summary><table class='facts'><thead><tr><th>layer</th><th>shape"
        f"</th><th>|dW| / |W|</th><th>stable rank</th><th>intruders</th></tr></thead><tbody>{rows}</tbody></table>"
        "</details>"
    )
