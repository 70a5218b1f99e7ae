"""The trainings beside the form: how far each is, read from disk, and buttons to stop, resume, use or remove it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ...io.run_layout import step_of
from ..jobs.job import Job
from ..jobs.sample_scores import SampleScores
from ..layout.page import HIDDEN, LAST, QUIET, Page, handler
from ..state import App
from . import train_view as view
from .rack import inserter

TICK = 1.5


def build_runs(page: Page) -> SimpleNamespace:
    """The components."""
    chosen = gr.Dropdown([], label="Trainings", elem_id="train-runs", interactive=True, visible=False)
    status = gr.HTML(view.NO_RUN, elem_id="train-status")
    with gr.Row():
        use = gr.Button("Make pictures with it", variant="primary", visible=False, elem_id="train-use")
        stop = gr.Button("Stop and save", variant="stop", visible=False, elem_id="train-stop")
        resume = gr.Button("Resume", visible=False, elem_id="train-resume")
        remove = gr.Button("Remove this training", visible=False, elem_id="train-remove")
    samples = gr.Gallery(
        label="Samples with fixed seeds", show_label=False, columns=4, height="auto", visible=False,
        elem_id="train-samples", elem_classes=["pixels"] if page.app.engine.is_embedded else [], format="png",
        interactive=False, buttons=["download", "fullscreen"],
    )  # fmt: skip
    curves = gr.HTML("", elem_id="train-curves")
    return SimpleNamespace(
        chosen=chosen, status=status, use=use, stop=stop, resume=resume, remove=remove, curves=curves, samples=samples,
        timer=gr.Timer(TICK, active=False), shown=gr.State(()), finished=gr.State(None),
    )  # fmt: skip


def watch(page: Page, runs: SimpleNamespace, started: Any) -> None:
    """Wire the buttons, and read the runs anew whenever one of them may have changed."""
    app = page.app
    refresh = handler(refresher(app, SampleScores()))
    state = [runs.chosen, runs.shown, runs.finished, page.library_changed]
    seen = [
        runs.chosen, runs.status, runs.use, runs.stop, runs.resume, runs.remove, runs.curves, runs.samples, runs.timer,
        runs.shown, runs.finished, page.library_changed,
    ]  # fmt: skip
    started.success(refresh, state, seen, **QUIET)
    acts = {"stop": app.jobs.stop, "resume": resumer(app), "remove": app.jobs.remove}
    for name, act in acts.items():
        acted = getattr(runs, name).click(
            handler(actor(app, act)), runs.chosen, None, api_name=f"train_{name}", **HIDDEN
        )
        for over in (acted.success, acted.failure):  # refused: another page was faster, and this one is out of date
            over(refresh, state, seen, **QUIET)
    runs.use.click(handler(user(app)), [page.prompt, runs.chosen], [page.prompt, page.tabs], **HIDDEN)
    gr.on(
        [page.blocks.load, page.tab.select, runs.timer.tick, runs.chosen.input], refresh, state, seen, **LAST, **QUIET
    )


def actor(app: App, act: Any) -> Any:
    """Stop, resume or remove the chosen run."""

    def do(identity: str | None) -> None:
        app.require_changes()
        act(identity or "")

    return do


def resumer(app: App) -> Any:
    """Go on with a run, which gets the device to itself."""

    def resume(identity: str) -> None:
        app.jobs.resume(identity)
        app.make_room()

    return resume


def user(app: App) -> Any:
    """Put the adapter of the chosen run into the prompt and go there."""
    insert = inserter(app)

    def use(prompt: str, identity: str | None) -> list[Any]:
        adapter = app.jobs.get(identity or "").adapter
        found: list[Any] = insert(prompt, adapter.name if adapter else "")
        return found

    return use


def choices(app: App) -> list[tuple[str, str]]:
    """The runs for the list, newest first."""
    return [(view.label(job), job.id) for job in app.jobs.list()]


def refresher(app: App, scores: SampleScores) -> Any:
    """What is shown now, read from disk: the same after a reload, in a new tab, after a restart."""

    def refresh(identity: str | None, shown: tuple[Any, ...], finished: Any, changed: int) -> tuple[Any, ...]:
        jobs = app.jobs.list()
        done = frozenset(job.id for job in jobs if job.status == "done")
        changed += bool(finished is not None and done - finished)
        job = _chosen(jobs, identity)
        if job is None:
            hidden = gr.update(visible=False)
            none = gr.update(choices=[], value=None, visible=False)
            return (none, view.NO_RUN, *[hidden] * 4, "", hidden, gr.Timer(active=False), (), done, changed)
        listed, samples = [(view.label(j), j.id) for j in jobs], tuple(sample.name for sample in job.samples)
        now = (listed, job.id, samples)
        # Said again, a choice would be written over another one that is made meanwhile.
        chosen = {} if identity == job.id else {"value": job.id}
        same_list = identity == job.id and shown[:1] == (listed,)  # an open list must not close under the cursor
        judged = scores.curves(job) if app.engine.is_embedded else None
        return (
            gr.skip() if same_list else gr.update(choices=listed, visible=True, **chosen),
            view.run_status(job),
            gr.update(visible=job.adapter is not None),
            gr.update(visible=job.running, interactive=job.status != "stopping"),
            gr.update(visible=job.resumable, value=f"Resume from step {job.checkpoint}"),
            gr.update(visible=not job.running),
            view.curves(job, judged),
            gr.skip() if now[1:] == shown[1:] else _gallery(app, job),
            gr.Timer(active=any(j.running for j in jobs)),
            now,
            done,
            changed,
        )

    return refresh


def _chosen(jobs: Sequence[Job], identity: str | None) -> Job | None:
    """The run that was chosen, else the one that runs, else the newest."""
    wanted = [job for job in jobs if job.id == identity] or [job for job in jobs if job.running] or list(jobs)
    return wanted[0] if wanted else None


def _gallery(app: App, job: Job) -> Any:
    items = [(app.hand_out(sample), f"step {step_of(sample)}") for sample in job.samples]
    return gr.update(value=items, visible=bool(items))
