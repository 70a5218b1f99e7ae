"""Exports loaded by stock diffusers and PEFT, in a process that never imports this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from factories import randomize
from safetensors import safe_open

from nora_diffusion import add_adapter, export_lora, save_adapter
from nora_diffusion.adapters import nora
from nora_diffusion.pipelines.components import components

FORMATS = ("diffusers", "kohya", "peft")
SCRIPT = """
import json, logging, sys
from pathlib import Path
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

base, exports, out = map(Path, sys.argv[1:])
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
diffusers_logging.get_logger("diffusers").addHandler(handler)

def lora_tensors(pipe):
    models = [p for p in pipe.components.values() if isinstance(p, torch.nn.Module)]
    return sum(".lora_A." in n or ".lora_B." in n for p in models for n, _ in p.named_parameters())

report = {}
for form in ("none", "diffusers", "kohya", "peft"):
    pipe = DiffusionPipeline.from_pretrained(base)
    messages.clear()
    if form in ("diffusers", "kohya"):
        pipe.load_lora_weights(str(exports / f"{form}.safetensors"), adapter_name="plain")
    elif form == "peft":
        from peft import PeftModel
        for folder in (exports / "peft").iterdir():
            setattr(pipe, folder.name, PeftModel.from_pretrained(getattr(pipe, folder.name), folder))
    image = pipe("a dog", num_inference_steps=2, height=16, width=16, output_type="np",
                 generator=torch.Generator().manual_seed(0)).images
    torch.save(torch.from_numpy(image), out / f"{form}.pt")
    complaints = [line for line in messages if any(w in line for w in ("nexpected", "issing", "No LoRA"))]
    report[form] = {"tensors": lora_tensors(pipe), "complaints": complaints}
assert not [name for name in sys.modules if name.startswith("nora_diffusion")]
(out / "report.json").write_text(json.dumps(report))
"""


def count_keys(path: Path) -> int:
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    keys = []
    for file in files:
        with safe_open(file, "pt") as reader:
            keys += [key for key in reader.keys() if not key.endswith(".alpha")]  # noqa: SIM118
    return len(keys)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_exports_load_without_this_package(model: str, tmp_path: Path, render: Any) -> None:
    pipe = tiny_pipeline(model, tmp_path / "base")
    pipe.save_pretrained(tmp_path / "base")
    add_adapter(
        pipe, nora(r=4, inner_r=2, alpha=6.0, basis="svd", target_modules=["attn", "ff"]), "dog", list(components(pipe))
    )
    randomize(pipe, "dog")
    expected = render(pipe)
    save_adapter(pipe, tmp_path / "dog", "dog")
    exports, out = tmp_path / "exports", tmp_path / "out"
    out.mkdir()
    paths = {
        "diffusers": exports / "diffusers.safetensors",
        "kohya": exports / "kohya.safetensors",
        "peft": exports / "peft",
    }
    for form, path in paths.items():
        export_lora(tmp_path / "dog", path, format=form)  # type: ignore[arg-type]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    subprocess.run([sys.executable, script, tmp_path / "base", exports, out], check=True, cwd=tmp_path)

    report = json.loads((out / "report.json").read_text())
    images = {form: torch.load(out / f"{form}.pt") for form in ("none", *paths)}
    assert (images["none"] - expected).abs().max() > 8 / 255, "the adapter changes the image too little for this test"
    for form, path in paths.items():
        assert report[form]["tensors"] == count_keys(path) > 0
        assert report[form]["complaints"] == []
        assert (images[form] - expected).abs().max() < 2 / 255, form
