"""Painting a mask over an image in the page. Gradio's image editor keeps all that it is sent in memory."""

from __future__ import annotations

SCRIPT = """
  let brushAt = null;
  const paint = (canvas, event) => {
    const box = canvas.getBoundingClientRect(), painter = canvas.closest('.painter');
    const to = [(event.clientX - box.left) * canvas.width / box.width,
                (event.clientY - box.top) * canvas.height / box.height];
    const pen = canvas.getContext('2d');
    const erases = painter.querySelector('[type=checkbox]').checked;
    pen.globalCompositeOperation = erases ? 'destination-out' : 'source-over';
    pen.strokeStyle = '#e11d48';
    pen.lineCap = 'round';
    pen.lineWidth = painter.querySelector('[type=range]').value * canvas.width / 100;
    pen.beginPath();
    pen.moveTo(...(brushAt ?? to));
    pen.lineTo(...to);
    pen.stroke();
    brushAt = to;
  };
  document.addEventListener('pointerdown', (event) => {
    if (!event.target.matches?.('.painter canvas')) return;
    event.target.setPointerCapture(event.pointerId);
    paint(event.target, event);
  });
  document.addEventListener('pointermove', (event) => {
    if (brushAt && event.target.matches?.('.painter canvas')) paint(event.target, event);
  });
  for (const end of ['pointerup', 'pointercancel']) document.addEventListener(end, () => { brushAt = null; });
  document.addEventListener('click', (event) => {
    const canvas = event.target.closest?.('.painter .clear')?.closest('.painter').querySelector('canvas');
    canvas?.getContext('2d').clearRect(0, 0, canvas.width, canvas.height);
  });
  window.paintedMask = () => {
    const canvas = document.querySelector('.painter canvas');
    if (!canvas) return '';
    const copy = document.createElement('canvas');
    [copy.width, copy.height] = [canvas.width, canvas.height];
    const image = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    let painted = false;
    for (let i = 0; i < image.data.length; i += 4) {
      const white = image.data[i + 3] > 127 ? 255 : 0;
      painted ||= white > 0;
      image.data.set([white, white, white, 255], i);
    }
    copy.getContext('2d').putImageData(image, 0, 0);
    return painted ? copy.toDataURL('image/png') : '';
  };
"""
"""Part of the page's script: ``window.paintedMask()`` is the mask as a PNG in a data URI, empty without a stroke."""
CSS = """
.painter { position: relative; line-height: 0; border-radius: 8px; overflow: hidden; }
.painter :is(img, canvas) { width: 100%; display: block; margin: 0; }
.painter canvas { position: absolute; inset: 0; height: 100%; opacity: .6; touch-action: none; cursor: crosshair; }
.painter-tools { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; font-size: .9rem;
  line-height: 1.5; margin-bottom: .4rem; }
.painter-tools label { display: flex; gap: .4rem; align-items: center; }
"""


def painter(picture: str, size: tuple[int, int]) -> str:
    """An image, given as a data URI, with a canvas of ``size`` over it, and its tools."""
    width, height = size
    return (
        '<div class="painter"><div class="painter-tools"><span>Paint what shall change; nothing: all of it.</span>'
        '<label>Brush <input type="range" min="2" max="40" value="12" aria-label="Width of the brush"></label>'
        '<label><input type="checkbox"> Erase</label>'
        '<button type="button" class="chip clear">Clear</button></div>'
        f'<div style="position: relative"><img src="{picture}" alt="The image to start from">'
        f'<canvas width="{width}" height="{height}" aria-label="Mask: paint with the pointer"></canvas></div></div>'
    )
