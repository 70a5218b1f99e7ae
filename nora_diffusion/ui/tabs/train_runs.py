"""The runs on the right of the Train tab: progress, read from disk, and buttons to stop, resume, use or delete one."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ...io.run_layout import step_of
from ..jobs.job import Job
from ..jobs.sample_scores import SampleScores
from ..layout.page import ALWAYS_LAST, PRIVATE, UNQUEUED, Page, handler
from ..state import App
from . import train_view as view
from .adapter_sliders import insert_handler

TICK = 1.5


def build_runs(page: Page) -> SimpleNamespace:
    """Create the components."""
    chosen = gr.Dropdown([], label="Training runs", elem_id="train-runs", interactive=True, visible=False)
    status = gr.HTML(view.NO_RUN, elem_id="train-status")
    with gr.Row():
        use = gr.Button("Generate with this adapter", variant="primary", visible=False, elem_id="train-use")
        stop = gr.Button("Stop and save", variant="stop", visible=False, elem_id="train-stop")
        resume = gr.Button("Resume", visible=False, elem_id="train-resume")
        remove = gr.Button("Delete this run", visible=False, elem_id="train-remove")
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
    """Wire the buttons, and re-read the runs whenever one may have changed."""
    app = page.app
    refresh = handler(refresh_handler(app, SampleScores()))
    state = [runs.chosen, runs.shown, runs.finished, page.library_changed]
    outputs = [
        runs.chosen, runs.status, runs.use, runs.stop, runs.resume, runs.remove, runs.curves, runs.samples, runs.timer,
        runs.shown, runs.finished, page.library_changed,
    ]  # fmt: skip
    started.success(refresh, state, outputs, **UNQUEUED)
    actions = {"stop": app.jobs.stop, "resume": resume_handler(app), "remove": app.jobs.remove}
    for name, action in actions.items():
        clicked = getattr(runs, name).click(
            handler(action_handler(app, action)), runs.chosen, None, api_name=f"train_{name}", **PRIVATE
        )
        for ended in (clicked.success, clicked.failure):  # a failure means that this page shows an outdated state
            ended(refresh, state, outputs, **UNQUEUED)
    runs.use.click(handler(use_handler(app)), [page.prompt, runs.chosen], [page.prompt, page.tabs], **PRIVATE)
    changes = [page.blocks.load, page.tab.select, runs.timer.tick, runs.chosen.input]
    gr.on(changes, refresh, state, outputs, **ALWAYS_LAST, **UNQUEUED)


def action_handler(app: App, action: Any) -> Any:
    """Stop, resume or delete the chosen run."""

    def act(identity: str | None) -> None:
        app.require_changes()
        action(identity or "")

    return act


def resume_handler(app: App) -> Any:
    """Resume a run and free the device for it."""

    def resume(identity: str) -> None:
        app.jobs.resume(identity)
        app.make_room()

    return resume


def use_handler(app: App) -> Any:
    """Insert the adapter of the chosen run into the prompt and open the Generate tab."""
    insert = insert_handler(app)

    def use(prompt: str, identity: str | None) -> list[Any]:
        adapter = app.jobs.get(identity or "").adapter
        updates: list[Any] = insert(prompt, adapter.name if adapter else "")
        return updates

    return use


def choices(app: App) -> list[tuple[str, str]]:
    """The runs for the dropdown, newest first."""
    return [(view.label(job), job.id) for job in app.jobs.list()]


def refresh_handler(app: App, scores: SampleScores) -> Any:
    """Read everything shown from disk, so that it survives a reload and a restart of the app."""

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
        # Sending the same value again could overwrite a choice made in the meantime.
        chosen = {} if identity == job.id else {"value": job.id}
        same_list = identity == job.id and shown[:1] == (listed,)  # an update would close an open list
        sample_scores = scores.curves(job) if app.engine.is_embedded else None
        return (
            gr.skip() if same_list else gr.update(choices=listed, visible=True, **chosen),
            view.run_status(job),
            gr.update(visible=job.adapter is not None),
            gr.update(visible=job.running, interactive=job.status != "stopping"),
            gr.update(visible=job.resumable, value=f"Resume from step {job.checkpoint}"),
            gr.update(visible=not job.running),
            view.curves(job, sample_scores),
            gr.skip() if now[1:] == shown[1:] else _gallery(app, job),
            gr.Timer(active=any(j.running for j in jobs)),
            now,
            done,
            changed,
        )

    return refresh


def _chosen(jobs: Sequence[Job], identity: str | None) -> Job | None:
    """The chosen run, else a running one, else the newest."""
    candidates = [job for job in jobs if job.id == identity] or [job for job in jobs if job.running] or list(jobs)
    return candidates[0] if candidates else None


def _gallery(app: App, job: Job) -> Any:
    items = [(app.hand_out(sample), f"step {step_of(sample)}") for sample in job.samples]
    return gr.update(value=items, visible=bool(items))
