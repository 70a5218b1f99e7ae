"""Preflight findings: each case has exactly one, and memory and disk estimates match the real run."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_pipeline
from factories import tiny_random_pipeline, write_photos
from runs import Configure, flags

from nora_diffusion import inspect_adapter, load_base, open_pipeline
from nora_diffusion.adapters import PRESETS, NoraLayer
from nora_diffusion.errors import UserError
from nora_diffusion.loaders import add_adapter, trainable_parameters
from nora_diffusion.pipelines.components import components, denoiser_name, pick, targets_by_component
from nora_diffusion.training import TrainConfig, check, check_on, main, train
from nora_diffusion.training.data.subject import Subject, read_subject
from nora_diffusion.training.planning.adapter import adapter_config
from nora_diffusion.training.planning.opening import lower_precision
from nora_diffusion.training.planning.plan import Plan, plan_on
from nora_diffusion.training.planning.preflight import _estimate, freed_by_casting, is_known, preflight
from nora_diffusion.training.planning.rundir import SPARE_BYTES
from nora_diffusion.training.settings.defaults import usual_rates, with_defaults
from nora_diffusion.training.step import memory
from nora_diffusion.training.step.denoiser import native_resolution
from nora_diffusion.training.step.memory import estimate

RIGHT: dict[str, Any] = {
    "instance_prompt": "a photo of zqx dog", "trigger": "zqx", "max_train_steps": 60, "learning_rate": 1e-3,
    "resolution": 16,
}  # fmt: skip


def texts(findings: list[Any]) -> str:
    return "\n".join(finding.text for finding in findings)


def subject_of(caption: str, trigger: str) -> Subject:
    return Subject([], [caption] * 3, trigger, "dog", "")


def plan_of(config: TrainConfig, pipe: Any) -> Plan:
    return plan_on(with_defaults(config), subject_of("a sks dog", "sks"), pipe, torch.device("cpu"))


def test_nothing_is_said_of_a_run_in_order(configure: Configure) -> None:
    assert check(configure(**RIGHT)) == []
    assert not configure().folder.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 5e-6}, "A --learning_rate of 5e-06 is outside the usual 5e-05 to 0.01 of --method nora"),
        ({"learning_rate": 1e-3, "scale_lr": True, "gradient_accumulation_steps": 16}, "rate of 0.032 is outside"),
        ({"train_text_encoder": True, "text_encoder_lr": 0.5}, "A --text_encoder_lr of 0.5 is outside"),
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "usual 0.1 to 10 of --optimizer prodigy"),
        ({"train_text_encoder_ti": True, "token_lr": 1.0}, "A --token_lr of 1 is outside the usual 1e-05 to 0.05"),
        ({"rank": 4096, "alpha": 32.0}, "A --rank of 4096 is larger than any adapted layer allows"),
        ({"push_to_hub": True}, "There is no login for --push_to_hub, so the upload at the end will fail"),
        ({"trigger": "cat", "instance_prompt": "a cat dog"}, "The base already knows the trigger 'cat'"),
        ({"trigger": None, "instance_prompt": "a dog"}, "No trigger word was found"),
        ({"validation_prompt": "a dog on the beach"}, "The validation prompt lacks the trigger 'zqx'"),
        ({"with_prior_preservation": True, "class_prompt": "a zqx dog"}, "The class prompt contains the trigger 'zqx'"),
        (
            {"max_train_steps": 3},
            "Each photo is used only 2.0 times, too few to learn the subject: use --max_train_steps 15",
        ),
        ({"class_prompt": "a dog"}, "--class_prompt will do nothing without --with_prior_preservation: add it"),
        ({"hub_model_id": "me/dog", "hub_token": "x"}, "--hub_model_id, --hub_token will do nothing without --push_to"),
        ({"resolution": 64}, "Images of 64 pixels are far from the 16 of this base"),
    ],
)
def test_each_finding_is_one_sentence_with_its_remedy(
    changes: dict[str, Any], words: str, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    found = check(configure(**{**RIGHT, **changes}))
    assert len(found) == 1 and words in found[0].text and not found[0].fatal
    assert found[0].text.endswith(".") and (": " in found[0].text or "," in found[0].text)


@pytest.mark.parametrize("changes", [{"optimizer": "prodigy", "learning_rate": None}, {"optimizer": "sgd"}])
def test_the_rates_of_other_optimizers_are_their_own(changes: dict[str, Any], configure: Configure) -> None:
    if changes["optimizer"] == "prodigy":
        pytest.importorskip("prodigyopt")
    assert check(configure(**{**RIGHT, "learning_rate": 1.0, **changes})) == []


def test_few_photos_and_captions_without_the_trigger(configure: Configure, tmp_path: Path) -> None:
    place = write_photos(tmp_path / "two", 2)
    (place / "0.txt").write_text("a toy dog")
    found = texts(check(configure(**{**RIGHT, "trigger": None}, instance_data_dir=str(place), use_captions=True)))
    assert "There are only 2 photos: use 3 to 10" in found
    assert "1 of 2 captions lack the trigger 'zqx', such as 'a toy dog': add it, or set --trigger zqx" in found
    (place / "0.txt").write_text("a toy dog " * 2500)
    found = texts(check(configure(**{**RIGHT, "trigger": None}, instance_data_dir=str(place), use_captions=True)))
    assert "captions lack the trigger" in found and "so their end is cut off" in found
    assert max(map(len, found.splitlines())) < 400


def test_lost_captions_are_findings(configure: Configure, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "partial", 3)
    (folder / "0.txt").write_text("a zqx dog on grass")
    config = configure(**RIGHT, instance_data_dir=str(folder))
    (unread,) = check(config)
    assert (
        unread.text.startswith("Captions beside the photos are not read (0.txt): add --use_captions")
        and not unread.fatal
    )
    found = texts(check(replace(config, use_captions=True)))
    assert found.startswith("2 of 3 photos have no caption (1.png, 2.png) and get the prompt 'a photo of zqx dog'")
    (folder / "metadata.jsonl").write_text('{"file_name": "7.png", "text": "a zqx dog"}\n')
    found = texts(check(replace(config, use_captions=True)))
    assert "1 of 1 rows of metadata.jsonl name no photo of this folder (7.png)" in found and "2 of 3 photos" in found
    with pytest.raises(UserError, match="2 of 3 photos have no caption"):
        train(replace(config, use_captions=True, strict=True))
    assert not config.folder.exists()


def test_the_guessed_class_word_is_shown_before_the_first_step(
    configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_photos(tmp_path / "natural", 3)
    for number, text in enumerate(("a zqx dog jumping over a fence", "a zqx dog sleeps", "a zqx dog's face")):
        (folder / f"{number}.txt").write_text(text)
    config = configure(**RIGHT, instance_data_dir=str(folder), use_captions=True)
    with caplog.at_level(logging.INFO):
        check(config)
        assert "trigger word 'zqx', class word 'dog' (found in the instance prompt)" in caplog.text
        check(replace(config, instance_prompt=None))
        assert (
            "trigger word 'zqx', class word 'dog' (found in the captions); set another with --class_word" in caplog.text
        )
        caplog.clear()
        check(replace(config, class_word="dog"))
        assert "class word" not in caplog.text


def test_a_new_token_that_starts_from_noise_is_a_finding(configure: Configure, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "new", 3)
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"close up of <zqx>, outdoors {number}")
    values = {**RIGHT, "instance_data_dir": str(folder), "use_captions": True, "train_text_encoder_ti": True}
    for changes, concept in (
        ({"instance_prompt": "a photo of <zqx> dog"}, "dog"), ({"instance_prompt": "a photo of <zqx>"}, None),
        ({"instance_prompt": None}, None), ({"instance_prompt": None, "class_word": "cat"}, "cat"),
        ({"instance_prompt": None, "initializer_concept": "cat"}, "cat"),
    ):  # fmt: skip
        config = configure(**{**values, "trigger": "<zqx>", **changes})
        assert read_subject(config).new_tokens == {"<zqx>": concept}
        assert ("the new token '<zqx>' starts from noise: set --class_word" in texts(check(config))) == (
            concept is None
        )


def test_a_prompt_that_is_cut_off_is_said_once(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    config = configure(**{**RIGHT, "instance_prompt": "a photo of zqx dog" + " on a mat" * 30, "max_train_steps": 1})
    words = "1 of 1 prompts have more than"
    assert words in texts(check(config)) and "a mat': shorten them" in texts(check(config))
    train(config)
    assert caplog.text.count(words) == caplog.text.count("cut off") == 1


def test_long_captions_are_not_printed_in_full(
    configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_photos(tmp_path / "long", 3)
    (folder / "0.txt").write_text("a dog \x1b[31m " + "on a mat " * 3000)
    config = configure(instance_prompt="a dog", instance_data_dir=str(folder), use_captions=True, trigger=None)
    found = check(config) + check(replace(config, trigger="zqx", class_word="cat"))
    assert "prompts have more than" in texts(found) and all(len(finding.text) < 1300 for finding in found)
    assert "\x1b" not in texts(found) and len(caplog.text) < 3000


def test_an_instance_prompt_that_captions_replace(configure: Configure, tmp_path: Path) -> None:
    """The file then has a prompt that was trained, not the instance prompt that was not used."""
    place = write_photos(tmp_path / "own", 3)
    for number in range(3):
        (place / f"{number}.txt").write_text(f"a zqx cat on the beach {number}")
    changes = {"instance_data_dir": str(place), "use_captions": True, "trigger": None}
    for prompt, called in (("a zqx dog", "a zqx cat"), ("a photo of zqx cat", "a photo of zqx cat")):
        config = configure(**{**RIGHT, **changes, "instance_prompt": prompt}, overwrite_output_dir=True)
        found = texts(check(config))
        assert (f"The instance prompt '{prompt}' is not used" in found) == (prompt != called)
        assert called in found or prompt == called
        assert inspect_adapter(train(replace(config, max_train_steps=1)).adapter_path).instance_prompt == called


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 100_000}, "r=100000 is not allowed: give a whole number from 1 to 65536"),
        ({"license": "x" * 10_001}, r"The adapter file could not be loaded again \(license has an invalid value\)"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_before_the_first_step(
    changes: dict[str, Any], words: str, configure: Configure
) -> None:
    with pytest.raises(UserError, match=words):
        train(configure(**{**RIGHT, **changes}))
    assert not configure().folder.exists()


def test_the_usual_rates_know_every_method_and_hold_the_defaults() -> None:
    for low, high in map(usual_rates, PRESETS):
        assert low <= 5e-4 <= high and low <= 1e-4 and high < 0.1


def test_rare_words_of_the_embedded_base() -> None:
    tokenizer = load_base().tokenizer
    assert [is_known(tokenizer, word) for word in ("sks", "zwx", "qqqq", "dog", "beach")] == [False] * 3 + [True] * 2


def test_a_full_disk_is_fatal_and_a_small_one_a_warning(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pipe: Any
) -> None:
    config = configure(**RIGHT, checkpointing_steps=1)
    one = estimate(pipe, adapter_config(config), {"unet": pipe.unet}, 1, 16, torch.float32, False).checkpoint_bytes
    other = train(configure(output_dir=str(tmp_path / "other"))).adapter_path.parent
    assert one == pytest.approx(sum(f.stat().st_size for f in (other / "checkpoints/step-3").iterdir()), rel=0.2)
    usage = shutil.disk_usage("/")

    def found(checkpoints: float) -> list[Any]:
        free = SPARE_BYTES + int(checkpoints * one)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        return check(config)

    assert found(63) == []
    (warning,) = found(30)
    assert not warning.fatal and "60 checkpoints" in warning.text and "--checkpoints_total_limit 2" in warning.text
    (error,) = found(1.5)
    assert error.fatal and "free some space" in error.text
    with pytest.raises(UserError, match="free some space"):
        train(config)
    assert not config.folder.exists()


def test_memory_that_is_not_there(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nora_diffusion.training.planning.preflight.available", lambda device: 1000)
    found = texts(check(configure(**RIGHT)))
    assert "of memory on top of the base" in found and "use --train_batch_size 1, --gradient_checkpointing" in found


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({"strategy": "flat"}, 1),
        ({"strategy": "halora"}, 1),
        ({"optimizer": "lora_pro"}, 2),
        ({"optimizer": "lora_pro", "lora_pro_moments": "factors"}, 0),
    ],
)
def test_what_is_as_large_as_the_weights_is_counted(
    changes: dict[str, str], times: int, configure: Configure, pipe: Any
) -> None:
    """Noisy weights, and the moments of full gradients; all of this base is fp32."""
    plan = plan_of(configure(train_text_encoder=True), pipe)
    large = plan_of(configure(train_text_encoder=True, **changes), pipe)
    targets = targets_by_component(plan.components, plan.adapter)
    weights = sum(next(layer.parameters()).nbytes for layers in targets.values() for layer in layers.values())
    assert weights > 0
    assert _estimate(large).copy_bytes - _estimate(plan).copy_bytes == times * weights


def test_memory_that_a_lower_precision_gives_back_is_counted(configure: Configure, pipe: Any) -> None:
    plan = plan_of(configure(mixed_precision="bf16"), pipe)
    held = sum(p.nbytes for part in (pipe.unet, pipe.text_encoder) for p in part.parameters())
    cpu = torch.device("cpu")
    assert freed_by_casting(plan, cpu) == held / 2
    lower_precision(pipe, torch.bfloat16)
    assert freed_by_casting(plan, cpu) == 0


def test_a_base_that_rests_elsewhere_is_counted_where_the_run_will_be(
    configure: Configure, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app moves its base to the CPU while a training job uses the GPU."""
    asked = []
    monkeypatch.setattr(
        "nora_diffusion.training.planning.preflight.available", lambda device: asked.append(device) or 1000
    )
    monkeypatch.setattr("nora_diffusion.training.planning.preflight.capacity", lambda device: 2**40)
    found = texts(check_on(configure(**RIGHT, mixed_precision="bf16"), pipe, "cuda"))
    assert asked == [torch.device("cuda")] and "cuda has" in found
    held = sum(p.nbytes for part in (pipe.unet, pipe.text_encoder) for p in part.parameters())
    plan = plan_of(configure(mixed_precision="bf16"), pipe)
    assert freed_by_casting(plan, torch.device("cuda")) == -held / 2


@pytest.mark.parametrize(("method", "parts"), [("nora", ["unet"]), ("lora", ["unet", "text_encoder"])])
def test_the_outline_counts_what_autograd_keeps(method: str, parts: list[str], pipe: Any) -> None:
    """Compared with saved-tensor hooks on the real model with the real adapter."""
    config = PRESETS[method](r=4)
    counted = estimate(pipe, config, pick(components(pipe), parts), 3, 16, torch.float32, checkpointing=False)
    pipe.unet.requires_grad_(False)
    add_adapter(pipe, config, "x", parts)
    trained = trainable_parameters(pipe, "x")
    assert counted.trained == sum(p.numel() for p in trained.values())
    known = {v.untyped_storage().data_ptr() for v in (*pipe.unet.parameters(), *pipe.unet.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return value

    for parameter in trained.values():
        parameter.requires_grad_(True)
    pipe.unet.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        hidden = torch.randn(3, 77, 16)
        out = pipe.unet(torch.randn(3, 4, 8, 8), torch.zeros(3, dtype=torch.long), hidden, return_dict=False)
    assert out[0].requires_grad
    real = sum(storage.nbytes() for storage in kept.values())
    assert counted.activations == pytest.approx(real, rel=0.05)


def test_equal_runs_share_one_estimate_and_no_others(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate runs the model once; it depends on the adapter, its parts, the batch, the size and the precision."""
    passes: list[int] = []
    original = memory._estimate
    monkeypatch.setattr(memory, "_KNOWN", {})
    monkeypatch.setattr(memory, "_estimate", lambda *given: passes.append(1) or original(*given))
    config, unet, both = PRESETS["lora"](r=2), {"unet": pipe.unet}, pick(components(pipe), ["unet", "text_encoder"])
    runs = [
        (config, unet, 1, 16, torch.float32, False), (PRESETS["lora"](r=4), unet, 1, 16, torch.float32, False),
        (config, both, 1, 16, torch.float32, False), (config, unet, 2, 16, torch.float32, False),
        (config, unet, 1, 32, torch.float32, False), (config, unet, 1, 16, torch.bfloat16, False),
        (config, unet, 1, 16, torch.float32, True),
    ]  # fmt: skip
    first = [estimate(pipe, *run) for run in runs]
    assert len(passes) == len(runs) == len(set(first))
    assert [estimate(pipe, *run) for run in runs] == first and len(passes) == len(runs)


def test_copies_of_the_basis_in_the_dtype_of_the_pass_are_counted(pipe: Any) -> None:
    """Compared with what the chains hold after a step."""
    config = PRESETS["nora"](r=4, basis="svd")
    add_adapter(pipe, config, "x", ["unet"])
    pipe.unet.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = pipe.unet(torch.randn(1, 4, 8, 8), torch.zeros(1, dtype=torch.long), torch.randn(1, 77, 16)).sample
    out.sum().backward()
    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, NoraLayer)]
    held = sum(copy.nbytes for layer in layers for _, copy in layer.delta("x").copies._kept.values())
    counted = {
        dtype: estimate(pipe, config, {"unet": pipe.unet}, 1, 16, dtype, False).copy_bytes
        for dtype in (torch.float16, torch.bfloat16)
    }
    assert counted == {torch.float16: 0, torch.bfloat16: held} and held > 0


def test_gradient_checkpointing_is_counted(pipe: Any) -> None:
    config = PRESETS["lora"](r=4)
    sizes = [estimate(pipe, config, {"unet": pipe.unet}, 8, 16, torch.float32, on).memory for on in (False, True)]
    assert 0 < sizes[1] < 0.7 * sizes[0]


def test_half_precision_halves_the_activations(pipe: Any) -> None:
    config = PRESETS["lora"](r=4)
    full, half = (
        estimate(pipe, config, {"unet": pipe.unet}, 2, 16, t, False).activations
        for t in (torch.float32, torch.bfloat16)
    )
    assert 0.45 < half / full < 0.6


@pytest.mark.parametrize("architecture", ["sdxl", "sd3", "flux"])
def test_other_architectures_are_counted(architecture: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(architecture, tmp_path)
    side, adapted = native_resolution(pipe), pick(components(pipe), [denoiser_name(pipe)])
    one, two = (estimate(pipe, PRESETS["lora"](r=4), adapted, n, side, torch.float32, False) for n in (1, 2))
    assert 0 < one.activations < two.activations <= 2 * one.activations


def test_strict_makes_warnings_errors(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    odd = {**RIGHT, "learning_rate": 5e-6, "max_train_steps": 2}
    with pytest.raises(UserError, match="5e-06"):
        train(configure(**odd, strict=True))
    assert not configure().folder.exists()
    with caplog.at_level(logging.WARNING):
        train(configure(**odd))
    assert "5e-06" in caplog.text


def test_the_flag_only_looks(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    def run(**changes: Any) -> tuple[int, str]:
        config = configure(**{**RIGHT, **changes})
        code = main([*flags(replace(config, preflight_only=True))])
        return code, capsys.readouterr().out

    assert run() == (0, "no problems found\n")
    code, text = run(learning_rate=5e-6)
    assert code == 0 and text.startswith("warning: A --learning_rate of 5e-06")
    code, text = run(learning_rate=5e-6, strict=True)
    assert code == 2 and text.startswith("error: A --learning_rate")
    assert not configure().folder.exists()


def test_a_checkpoint_of_other_weights_is_refused(configure: Configure, tmp_path: Path) -> None:
    """The base has the same name but different weights."""
    base = tiny_random_pipeline(tmp_path / "base")
    config = configure(pretrained_model_name_or_path=str(base))
    train(config)
    before = _contents(config.folder)
    shutil.rmtree(base)
    tiny_random_pipeline(base, seed=1)
    with pytest.raises(UserError, match="was made for the base"):
        train(replace(config, resume_from_checkpoint="latest", max_train_steps=5))
    assert _contents(config.folder) == before


def _contents(folder: Path) -> dict[str, bytes]:
    names = (".lock",)
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in names}


def test_it_takes_seconds(configure: Configure, tiny_base: Path) -> None:
    pipe = open_pipeline(tiny_base)
    plan = plan_of(configure(**RIGHT), pipe)
    begun = time.process_time()  # not the wall clock, which counts other load
    preflight(plan)
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_is_counted(method: str, pipe: Any) -> None:
    config = adapter_config(with_defaults(TrainConfig(method=method, pretrained_model_name_or_path="elsewhere")))
    counted = estimate(pipe, config, {"unet": pipe.unet}, 1, 16, torch.float32, checkpointing=False)
    add_adapter(pipe, config, "x", ["unet"])
    assert counted.trained == sum(p.numel() for p in trainable_parameters(pipe, "x").values())
    assert counted.activations > 0


def test_what_cannot_fit_is_an_error_without_strict(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a warning while other programs could free the memory, and an error when the machine has not so much."""
    module = "nora_diffusion.training.planning.preflight"
    config = configure(**RIGHT)
    monkeypatch.setattr(f"{module}.available", lambda device: 1000)
    for most, fatal in ((2**50, False), (1000, True), (0, True)):
        monkeypatch.setattr(f"{module}.capacity", lambda device, most=most: most)
        (found,) = [finding for finding in check(config) if "of memory on top of the base" in finding.text]
        assert found.fatal == fatal
        assert ("at most" in found.text) == fatal and "use --train_batch_size 1" in found.text
    with pytest.raises(UserError, match="of memory on top of the base, and cpu has at most"):
        train(config)
    assert not config.folder.exists()


HUGE: dict[str, dict[str, Any]] = {
    "rows": {"train_batch_size": 10**9},
    "rows, checkpointing": {"train_batch_size": 2**40, "gradient_checkpointing": True},
    "rows beyond 64 bits of bytes": {"train_batch_size": 2**60},
    "pixels": {"resolution": 2**20},
    "pixels beyond 64 bits": {"resolution": 2**44},
    "rank": {"rank": 2**40, "inner_rank": 2, "basis": "orthogonal"},
    "rank beyond 64 bits of bytes": {"rank": 2**61, "inner_rank": 2, "basis": "orthogonal"},
    "experts": {"method": "mor", "inner_rank": None, "basis": None, "num_experts": 2**45},
}


@pytest.mark.parametrize("changes", HUGE.values(), ids=HUGE.keys())
def test_what_no_machine_has_is_refused(changes: dict[str, Any], configure: Configure) -> None:
    words = "on top of the base, and cpu has at most|more memory than 64 bits|give a whole number from 1 to 65536"
    with pytest.raises(UserError, match=words):
        train(configure(**{**RIGHT, **changes}))
    assert not configure().folder.exists()


def test_the_capacity_is_that_of_the_machine() -> None:
    from nora_diffusion.training.step.memory import available, capacity

    device = torch.device("cpu")
    assert available(device) <= capacity(device)
