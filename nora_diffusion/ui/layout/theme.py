"""Theme, CSS and scripts of the page, for light and dark mode."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import painting

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: 1280px !important; width: 100% !important; margin: 0 auto !important; }
#title .prose { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .75rem; }
#title h1 { font-size: 1.15rem; font-weight: 650; margin: 0; letter-spacing: -0.01em; }
#title p { margin: 0; color: var(--body-text-color-subdued); font-size: .9rem; overflow-wrap: anywhere; }
.html-container { padding: 0 !important; }
.block:has(> .html-container > .prose:empty) { display: none; }
:is(#train-photos, #import, #drop-image, #start-file) .icon-wrap { display: none; }
.pixels img, .html-container .card img { image-rendering: pixelated; object-fit: contain; }
#generate-areas { display: grid; gap: var(--layout-gap); grid-template: "ask result" auto "more result" 1fr / 5fr 6fr; }
#generate-ask { grid-area: ask; } #generate-more { grid-area: more; } #generate-result { grid-area: result; }
#library-areas { display: grid; gap: var(--layout-gap);
  grid-template: "cards chosen" auto "cards import" 1fr / 7fr 4fr; }
#library-cards { grid-area: cards; } #library-chosen { grid-area: chosen; } #library-import { grid-area: import; }
:is(#generate-areas, #library-areas) > * { min-width: 0 !important; }
#gallery .grid-wrap, #batch-gallery .grid-wrap { height: auto !important; max-height: none !important; }
.row:has(> .remove) { background: var(--block-background-fill); }
.inner { display: none !important; }
.remove { align-self: center !important; margin: .6rem; flex: none !important; }
#train-prepared .grid-wrap, #train-samples .grid-wrap, #batch-gallery .grid-wrap { min-height: 0; }
:is(#gallery, #batch-gallery, #train-samples) .gallery-container:has(> .preview) { min-height: 30rem; }
#train-prepared .grid-wrap { max-height: 340px; overflow-y: auto; }
#train-prepared .grid-container { grid-template-columns: repeat(5, minmax(0, 1fr)) !important; }
#choose-thumbnail .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
#compare-slider { border: 0 !important; }  /* Gradio draws 3 px around a slider in a group */
.html-container {  /* only our own HTML: Gradio's components have classes of the same names, such as `preview` */
.status { margin: 0; min-height: 1.5em; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.status.bad { color: var(--error-text-color); font-weight: 550; }
.bar { height: 4px; border-radius: 2px; background: var(--border-color-primary); overflow: hidden; margin: .4rem 0; }
.bar > span { display: block; height: 100%; background: var(--color-accent); transition: width .15s; }
.preview { display: block; width: 100%; max-width: 384px; aspect-ratio: 1; border-radius: 8px; }
.cards { display: grid; gap: .75rem; padding: 0; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(135px, 1fr)); }
.card { text-align: left; border: 1px solid var(--border-color-primary); border-radius: 10px; padding: .6rem;
  background: var(--block-background-fill); color: var(--body-text-color); cursor: pointer; width: 100%;
  font-weight: 400; display: flex; flex-direction: column; justify-content: flex-start; align-items: stretch; }
.card:hover { border-color: var(--color-accent); }
.card:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
.card[aria-pressed=true] { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent); }
.card.off { border-style: dashed; background: transparent; }
.card.off img { filter: grayscale(.8); }
.card img, .card .none { width: 100%; aspect-ratio: 1; border-radius: 6px; margin-bottom: .4rem; display: block;
  background: var(--background-fill-secondary); }
.card .none { display: grid; place-items: center; font-size: 2rem; color: var(--body-text-color-subdued); }
.card b { overflow-wrap: anywhere; overflow: hidden; flex: none;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; }
.card small { display: block; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.card small.why { color: var(--error-text-color); }
.suggestions { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; font-size: .9rem;
  color: var(--body-text-color-subdued); }
.chip { border: 1px solid var(--border-color-primary); border-radius: 999px; padding: .15rem .7rem; cursor: pointer;
  background: var(--block-background-fill); color: var(--body-text-color); overflow-wrap: anywhere;
  margin: 0; font-size: inherit; font-weight: 450; line-height: 1.5; }
.suggestions > span { margin: 0; }
.chip small { color: var(--body-text-color-subdued); font-weight: 400; margin-left: .25rem; }
.chip:hover { border-color: var(--color-accent); }
.chip:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
.facts { width: 100%; border-collapse: collapse; font-size: .92rem; }
.facts, .facts th, .facts td, .facts tr { border: 0 !important; }
.facts tr + tr { border-top: 1px solid var(--border-color-primary) !important; }
.facts th { text-align: left; font-weight: 500; color: var(--body-text-color-subdued); padding: .25rem .8rem .25rem 0;
  vertical-align: top; overflow-wrap: anywhere; min-width: 8.8rem; }
.facts td + td, .facts thead th:last-child { padding-left: .8rem; }
.facts td { padding: .25rem 0; overflow-wrap: anywhere; min-width: 6rem; vertical-align: top; }
.facts tr.new td { font-weight: 600; }
.empty { border: 1px dashed var(--border-color-primary); border-radius: 10px; padding: 1.2rem;
  color: var(--body-text-color-subdued); }
.plots { display: grid; gap: .75rem; }
.plots + .plots { margin-top: 1.5rem; }
.plot { margin: 0; }
.plot figcaption { font-weight: 550; margin-bottom: .2rem; }
.plot svg { width: 100%; max-width: 640px; display: block; font-size: 12px; }
.plot text { fill: var(--body-text-color-subdued); }
.plot .rule { stroke: var(--border-color-primary); stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; color: var(--body-text-color-subdued); }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
PAINTING
@media (max-width: 640px) { .facts :is(th, td) { min-width: 5rem; }
  .plot svg { font-size: 14px; } .plot g { font-size: 12px; } }
}
@media (max-width: 640px) { .gradio-container { padding: .5rem !important; }
  :is(#train-examples, #train-samples, #choose-thumbnail) .grid-container {
    grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
  #generate-areas { grid-template: "ask" auto "result" auto "more" auto / 1fr; }
  #library-areas { grid-template: "chosen" auto "cards" auto "import" auto / 1fr; } }
""".replace("PAINTING", painting.CSS)

# An event whose stream has ended is answered when Gradio's client has read that end: see event_streams.py. The client
# then aborts the last stream that it has opened, which is that of an upload's progress if there was one.
# Ctrl+Enter generates from anywhere, after what the field that is left changes: in the page by the end of the task, and
# on the server when all answers to unqueued events are read. The task that reads an answer may start the next event.
# Gradio's sliders report a change by keyboard only after a pointerup event.
SCRIPT = """
() => {
  let ended = null, read = () => {}, unanswered = 0, pressed = null;
  const press = () => {
    if (unanswered || !pressed) return;
    pressed.click();
    pressed = null;
  };
  const answered = () => setTimeout(() => { unanswered--; press(); });
  const send = window.fetch;
  window.fetch = async (...request) => {
    const url = String(request[0]?.url ?? request[0]);
    request[0]?.signal?.addEventListener('abort', () => read());
    if (url.includes('/queue/data')) ended = new Promise((done) => { read = done; });
    if (!url.includes('/run/predict')) {
      const answer = await send(...request);
      if (answer.headers.has('x-stream-ended')) await ended;
      return answer;
    }
    unanswered++;
    try {
      const answer = await send(...request);
      const json = answer.json.bind(answer);
      answer.json = () => json().finally(answered);
      return answer;
    } catch (error) {
      answered();
      throw error;
    }
  };
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      const button = document.querySelector('#generate');
      if (!button || button.offsetParent === null) return;
      event.preventDefault();
      event.stopPropagation();
      document.activeElement?.blur();  // a number counts when its field is left
      setTimeout(() => { pressed = button; press(); });
    }
  }, true);
  document.addEventListener('keyup', (event) => {
    if (event.target.matches && event.target.matches('input[type=range]')) {
      event.target.dispatchEvent(new PointerEvent('pointerup', {bubbles: true}));
    }
  });
  document.documentElement.lang = 'en';
PAINTING
}
""".replace("PAINTING", painting.SCRIPT)


def appearance() -> dict[str, Any]:
    """Arguments of ``gr.mount_gradio_app`` for theme, style and script."""
    return {"theme": theme(), "css": CSS, "js": SCRIPT}


def theme() -> Any:
    """System fonts (nothing is downloaded), neutral grays, one accent color that is readable in both modes."""
    accent = gr.themes.colors.indigo
    return gr.themes.Default(
        primary_hue=accent, secondary_hue=accent, neutral_hue=gr.themes.colors.zinc,
        spacing_size=gr.themes.sizes.spacing_md, radius_size=gr.themes.sizes.radius_md,
        font=list(FONTS), font_mono=list(MONO),
    ).set(
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600", button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white", button_primary_text_color_dark="white",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
        block_shadow="none", block_shadow_dark="none",
    )  # fmt: skip
