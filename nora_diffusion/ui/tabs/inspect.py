"""The Inspect tab: what an adapter does to the weights of its base, as plots and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from ...errors import UserError
from ...evaluation.spectra import TOP, LayerSpectrum, gate_summaries, iter_spectra
from ...loaders.gates import GateSummary
from ...reports.plots import bar_chart, line_chart
from ..entries import Entry
from ..layout.cards import facts, line
from ..layout.page import LAST, QUIET, Page, handler
from ..runs import Progress, Run
from ..state import App
from .rack import NONE_YET, names

TITLE = "Inspect"
HINT = line("Choose an adapter to see what it changes.")
MOST_BARS, MOST_LINES = 24, 6
SHORTER = {
    ".transformer_blocks.0.": ".", "transformer_blocks": "block", "attentions": "attn", "down_blocks": "down",
    "up_blocks": "up", "mid_block": "mid",
}  # fmt: skip


def build(page: Page) -> None:
    """The choice and the adapter's facts on the left, the plots on the right."""
    app = page.app
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            adapter = gr.Dropdown([], label="Adapter", elem_id="inspect-adapter", interactive=True)
            intruders = gr.Checkbox(
                False, label="Count intruder dimensions (slower)", info="New directions, often a sign of forgetting",
                elem_id="inspect-intruders",
            )  # fmt: skip
            go = gr.Button("Inspect", variant="primary", elem_id="inspect-go")
            about = gr.HTML("", elem_id="inspect-about")
        with gr.Column(scale=7, min_width=320):
            said = gr.HTML(HINT, elem_id="inspect-status")
            plots = gr.HTML("", elem_id="inspect-plots")
    refresh = handler(lambda chosen: _choices(page, chosen))
    refreshed = [page.blocks.load, page.tab.select, page.library_changed.change]
    gr.on(refreshed, refresh, adapter, adapter, **LAST, **QUIET)
    go.click(
        handler(inspector(app)), [adapter, intruders], [said, about, plots], api_name="inspect",
        api_visibility="private", concurrency_limit=None, show_progress="hidden",
    )  # fmt: skip


def _choices(page: Page, chosen: str | None) -> Any:
    found = names(page)
    if chosen in found:  # said again, it would be written over another choice that is made meanwhile
        return gr.update(choices=found, info=None)
    return gr.update(choices=found, value=found[0] if found else None, info=None if found else NONE_YET)


def inspector(app: App) -> Any:
    """The handler of the button; a generator, so that a closed page ends the work."""

    def inspect(name: str | None, intruders: bool) -> Iterator[Any]:
        if not name:
            raise UserError("there is nothing to inspect: choose an adapter")
        entry = app.library.entry(name)
        app.library.hash_all([entry])
        found: list[LayerSpectrum] = []
        gates: dict[str, GateSummary] = {}

        def work(run: Run) -> None:
            app.engine.use([])  # the base rests on the CPU after a training, where the routers' sampling takes minutes
            for spectrum, total in iter_spectra(entry.file, app.engine.pipe, bool(intruders)):
                found.append(spectrum)
                run.report(picture=len(found), pictures=total)
                run.check()
            if any(layer.mixture for layer in found):
                gates.update(gate_summaries(entry.file, app.engine.pipe, prompts(entry)))

        run = Run(app.device, "an inspection", work)
        about = facts(entry, app.misfit(entry))
        for progress in run.follow():
            done = progress.state == "done"
            yield _status(progress), about, show(found) + show_gates(gates) if done else gr.skip()

    return inspect


def _status(progress: Progress) -> str:
    if progress.state == "failed":
        return line(progress.message, bad=True)
    if progress.state == "waiting":
        return line(f"Waiting; now running: {progress.busy_with or 'nothing'}.")
    if progress.state == "done":
        return line(f"{progress.pictures} layers in {progress.seconds:.1f} s.")
    return line(f"Layer {progress.picture} of {progress.pictures or '…'}")


def show(found: Sequence[LayerSpectrum]) -> str:
    """All plots of an adapter, and the same numbers as a table."""
    if not found:
        return ""
    strongest = sorted(found, key=lambda s: -s.relative)
    parts = [
        bar_chart("Size of the update by part of the model", by_part(found), "mean |dW| / |W|"),
        bar_chart("Layers that change most", [(label(s), s.relative) for s in strongest[:MOST_BARS]], "|dW| / |W|"),
        line_chart("Singular values of the update", {label(s): spectrum(s) for s in strongest[:MOST_LINES]},
                   "rank", "s / s1"),
    ]  # fmt: skip
    counted = [s for s in found if s.intruders is not None]
    if counted:
        most = sorted(counted, key=lambda s: -(s.intruders or 0))[:MOST_BARS]
        mean = sum(s.intruders or 0 for s in counted) / len(counted)
        parts.append(
            line(
                f"{mean:.2f} of the {TOP} largest directions of an adapted layer are new to the base on average "
                "(intruder dimensions, arXiv 2410.21228); many of them go with forgetting."
            )
        )
        if any(s.intruders for s in most):
            bars = [(label(s), float(s.intruders or 0)) for s in most if s.intruders]
            parts.append(bar_chart("Intruder dimensions", bars, f"of {TOP}"))
    if any(s.mixture for s in found):
        parts.append(line("This is a mixture: the numbers are those of even gates."))
    return f'<div class="plots">{"".join(parts)}{table(strongest)}</div>'


def prompts(entry: Entry) -> list[str] | None:
    """What the routers are watched on: the subject's own prompt, where the file tells it."""
    return [entry.info.instance_prompt] if entry.info and entry.info.instance_prompt else None


def show_gates(gates: Mapping[str, GateSummary]) -> str:
    """How the routers share the work between the experts, and which of them decide most."""
    if not gates:
        return ""
    most = max(len(summary.gate) for summary in gates.values())
    shares = [[float(g.gate[n]) for g in gates.values() if n < len(g.gate)] for n in range(most)]
    means = [(f"expert {number}", sum(share) / len(share)) for number, share in enumerate(shares, 1)]
    sharp = sorted(gates.items(), key=lambda item: -item[1].sharpness)[:MOST_BARS]
    return '<div class="plots">' + (
        bar_chart("Router: mean gate of each expert over all layers", means, "mean gate")
        + bar_chart(
            "Router: layers that decide most (0: all experts alike, 1: one expert)",
            [(short(key.removeprefix("unet.")), summary.sharpness) for key, summary in sharp], "sharpness",
        )
    ) + "</div>"  # fmt: skip


def label(layer: LayerSpectrum) -> str:
    """A layer's name, short enough for a plot; the text encoders' have their component before them."""
    path = short(layer.path)
    return path if layer.component in ("unet", "transformer") else f"{layer.component}.{path}"


def short(path: str) -> str:
    """A module's path with the usual words abbreviated."""
    for long, brief in SHORTER.items():
        path = path.replace(long, brief)
    return path


def by_part(found: Sequence[LayerSpectrum]) -> list[tuple[str, float]]:
    """Mean relative size by block of the denoiser, or by component."""
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
    """Every layer's numbers."""
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
