"""Settings as flags, YAML and Python; errors suggest the closest valid name."""

from __future__ import annotations

from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from runs import flags

from nora_diffusion.adapters import PRESETS
from nora_diffusion.errors import UserError
from nora_diffusion.training import TrainConfig
from nora_diffusion.training.planning.adapter import adapter_config
from nora_diffusion.training.settings.arguments import build_parser, parse
from nora_diffusion.training.settings.checks import BOUNDS, check_config
from nora_diffusion.training.settings.config import Tag, settings
from nora_diffusion.training.settings.defaults import TUNED, usual_rates, with_defaults
from nora_diffusion.training.settings.methods import parameters_of
from nora_diffusion.training.settings.values import OTHER_NAMES

# fmt: off
DIFFUSERS_FLAGS = [
    "pretrained_model_name_or_path", "revision", "variant", "tokenizer_name", "instance_data_dir",
    "class_data_dir", "instance_prompt", "class_prompt", "validation_prompt", "num_validation_images",
    "validation_epochs", "with_prior_preservation", "prior_loss_weight", "num_class_images", "output_dir",
    "seed", "resolution", "center_crop", "train_text_encoder", "train_batch_size", "sample_batch_size",
    "num_train_epochs", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "gradient_accumulation_steps", "gradient_checkpointing", "learning_rate",
    "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "dataloader_num_workers",
    "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
    "push_to_hub", "hub_token", "hub_model_id", "logging_dir", "allow_tf32", "report_to", "mixed_precision",
    "prior_generation_precision", "local_rank", "enable_xformers_memory_efficient_attention",
    "pre_compute_text_embeddings", "tokenizer_max_length", "text_encoder_use_attention_mask",
    "validation_images", "class_labels_conditioning", "rank", "image_interpolation_mode", "lora_dropout",
]
# fmt: on
DATA = {"instance_data_dir": "photos", "instance_prompt": "a photo of sks dog"}


def test_every_flag_of_diffusers_is_accepted() -> None:
    known = {option.lstrip("-") for action in build_parser()._actions for option in action.option_strings}
    assert set(DIFFUSERS_FLAGS) <= known
    assert {f.name for f in fields(TrainConfig)} <= known


def test_flags_round_trip() -> None:
    config = TrainConfig(
        **DATA, learning_rate=1e-4, center_crop=True, target_modules=["attn", "ff"], mixed_precision="no", dropout=0.25,
        hub_token="secret", max_train_steps=12, class_word="toy dog", alpha=16.0,
    )  # fmt: skip
    assert parse(flags(config)) == config


def test_yaml_round_trip_and_flags_win(tmp_path: Path) -> None:
    config = TrainConfig(**DATA, learning_rate=1e-4, seed=3, mixed_precision="no")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert parse(["--config", str(file)]) == config
    assert parse(["--config", str(file), "--seed", "4"]).seed == 4
    file.write_text("learning_rate: 1e-4\nmixed_precision: no\nlora_dropout: 0.1\n")
    read = parse(["--config", str(file)])
    assert (read.learning_rate, read.mixed_precision, read.dropout) == (1e-4, "no", 0.1)


def test_the_type_of_a_setting_decides_what_yaml_means(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "trigger: 007\nclass_word: no\ninstance_prompt: 12:30\nlicense: 2024-01-01\nmixed_precision: no\nrank: 010\n"
        "use_captions: yes\nseed: 9007199254740993\ntoken_abstraction: [0010, on]\nlearning_rate: 1e-4\n"
        "validation_prompts: 0123\nmax_train_steps: 1e3\ncheckpoints_total_limit: ~\n"
    )
    read = parse(["--config", str(file)])
    assert (read.trigger, read.class_word, read.instance_prompt, read.license) == ("007", "no", "12:30", "2024-01-01")
    assert (read.mixed_precision, read.rank, read.use_captions, read.seed) == ("no", 10, True, 9007199254740993)
    assert (read.token_abstraction, read.validation_prompts) == (["0010", "on"], ["0123"])
    assert (read.learning_rate, read.max_train_steps, read.checkpoints_total_limit) == (1e-4, 1000, None)
    file.write_text(yaml.safe_dump(read.to_dict()))
    assert parse(["--config", str(file)]) == read


@pytest.mark.parametrize("value", ["12:30", "0x10", "0b1", "0o7", "1,5", "true", "2024-01-01", "[1]", "{a: 1}", "1.5"])
def test_numbers_are_decimal_or_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"seed: {value}")
    with pytest.raises(UserError, match=r"seed=.* is not valid: give a whole number"):
        parse(["--config", str(tmp_path / "run.yaml")])


def test_an_alias_in_yaml_gives_way_to_its_flag(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora_dropout: 0.1\n")
    assert parse(["--config", str(file), "--dropout", "0.2"]).dropout == 0.2


def test_secrets_are_not_written() -> None:
    assert "hub_token" not in TrainConfig(hub_token="secret").to_dict()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--learning_rat", "1"], "unknown flag '--learning_rat': did you mean --learning_rate?"),
        (["--lr", "1"], "did you mean --learning_rate or --text_encoder_lr or --token_lr?"),
        (["--train_data_dir", "x"], "unknown flag '--train_data_dir': did you mean --instance_data_dir?"),
        (["--reg_data_dir=x"], "did you mean --class_data_dir?"),
        (["--network_dim", "4"], "did you mean --rank?"),
        (["--epochs", "1"], "did you mean --num_train_epochs or"),
        (["--frobnicate"], "unknown flag '--frobnicate': no flag has a similar name; see"),
        (["--instance_prompt", "a", "sks", "dog"], "unknown argument 'sks': quote a value that has spaces; see"),
        (["--rank", "four"], "rank='four' is not valid: give a whole number"),
        (["--rank", "4.5"], "give a whole number"),
        (["--method", "nore"], "did you mean 'nora'"),
        (["--mixed_precision", "bf17"], "choose one of no, fp16, bf16"),
        (["--center_crop", "maybe"], "give true or false"),
        (["--rank"], "expected one argument"),
        (["stray"], "unknown argument 'stray'"),
        (["--config", "absent.yaml"], "cannot read the config"),
    ],
)
def test_mistyped_flags(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        parse(words)
    assert sentence in str(error.value)


def test_every_number_has_one_bound() -> None:
    for setting in settings():
        number = {"int", "float"} & set(str(setting.type).split())
        bounds = [tag for tag in setting.metadata["tags"] if tag in BOUNDS]
        assert len(bounds) == bool(number) or setting.name == "local_rank", setting.name
        assert {*setting.metadata["tags"]} <= {*get_args(Tag)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rte: 1", "unknown setting 'learning_rte' in .*: did you mean 'learning_rate'"),
        ("- 1", "must contain 'key: value' lines"),
        ("a: [", "run.yaml, line 1 is not valid YAML: the brackets are not closed"),
        ("seed: 1\nrank: 4\nseed: 2", "run.yaml, line 3: 'seed' is also in line 1: keep one of them"),
        ("dropout: 0.1\nlora_dropout: 0.2", "run.yaml has dropout under two names"),
        ("trigger: [a]", "trigger=.* is not valid: give text"),
        ("output_dir: null", "output_dir needs a value"),
    ],
)
def test_mistyped_yaml(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        parse(["--config", str(file)])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"instance_data_dir": None}, "no photos"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"learning_rate": float("nan")}, "must be above 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"method": "lora", "inner_rank": 4}, "--inner_rank has no effect with --method lora: it is a setting of nora"),
        ({"rank": 4, "inner_rank": 8}, "--inner_rank 8 exceeds --rank 4"),
        ({"method": "lora_mini", "inner_rank": 64}, "--inner_rank 64 exceeds --rank 32"),
        ({"method": "dora", "magnitude": True}, "--magnitude has no effect with --method dora"),
        ({"method": "mor", "blocks": 2}, "--blocks has no effect with --method mor: it is a setting of melora"),
        ({"train_text_encoder": True, "pre_compute_text_embeddings": True}, "--train_text_encoder exclude each other"),
        ({"with_prior_preservation": True}, "needs --class_prompt"),
        ({"use_captions": True, "caption_column": "text"}, "exclude each other"),
        ({"use_8bit_adam": True}, "needs the package bitsandbytes"),
        ({"enable_xformers_memory_efficient_attention": True}, "needs the package xformers"),
        ({"report_to": "wandb"}, "needs the package wandb"),
        ({"report_to": "carrier pigeon"}, "report_to='carrier pigeon' is unknown"),
        ({"validation_images": ["a.png"]}, "--validation_images is for image-to-image pipelines"),
        ({"class_labels_conditioning": "words"}, "only 'timesteps' is"),
        ({"text_encoder_lr": 1e-4}, "needs --train_text_encoder"),
        ({"trigger": " "}, "the trigger is empty"),
        ({"calibration": "subject", "basis": "svd"}, "--calibration needs --basis awsvd, not svd"),
        ({"calibration_prompts": ["a dog"], "method": "lora"}, "--calibration_prompts needs --basis awsvd, not None"),
        ({"calibration": "subject", "calibration_prompts": ["a dog"]}, "leave out --calibration_prompts"),
        ({"calibration": "subject", "basis_from": "out/dog"}, "leave out --calibration"),
        ({"instance_prompt": "a \ud83d dog"}, r"instance_prompt has the character '\ud83d', which is not text"),
        ({"class_prompt": "caf\udce9"}, r"class_prompt has the character '\udce9', which is not text"),
        ({"trigger": "s\0ks"}, r"trigger has the character '\x00', which is not text"),
        ({"validation_prompts": ["a dog", "\udc15"]}, "validation_prompts has the character"),
        ({"output_dir": "out\0"}, "output_dir has the character"),
        ({"pretrained_model_name_or_path": "base\0"}, "pretrained_model_name_or_path has the character"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused(
    change: dict[str, object], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nora_diffusion.training.settings.checks.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        check_config(TrainConfig(**{**DATA, **change}))  # type: ignore[arg-type]
    assert sentence in str(error.value)


def test_paths_need_not_be_utf8() -> None:
    check_config(TrainConfig(**{**DATA, "instance_data_dir": "caf\udce9", "output_dir": "caf\udce9"}))


def test_defaults_fill_gaps_only() -> None:
    embedded = with_defaults(TrainConfig(rank=5))
    other = with_defaults(TrainConfig(pretrained_model_name_or_path="some/model", method="lora"))
    assert embedded.rank == 5 and embedded.inner_rank is not None and embedded.max_train_steps is not None
    assert (other.rank, other.inner_rank, other.learning_rate, other.train_batch_size) == (4, None, 5e-4, 4)
    rates = {method: with_defaults(TrainConfig(method=method)).learning_rate for method in ("nora", "lora_xs", "lora")}
    assert rates == {"nora": 9.6e-3, "lora_xs": 4.8e-3, "lora": 4.8e-3}, "docs/benchmark.md says why"
    alone, joint = (with_defaults(TrainConfig(joint=joint)).max_train_steps for joint in (False, True))
    assert (alone, joint) == (100, 300)
    assert with_defaults(TrainConfig(num_train_epochs=3)).max_train_steps is None


def test_a_small_rank_limits_the_default_inner_rank() -> None:
    for changes in ({}, {"method": "lora_mini"}, {"pretrained_model_name_or_path": "some/model"}):
        config = TrainConfig(**DATA, **changes, rank=2)  # type: ignore[arg-type]
        check_config(config)
        assert with_defaults(config).inner_rank == 2


def test_help_names_every_setting() -> None:
    text = build_parser("x").format_help()
    joined = " ".join(text.split())
    assert "adapter method; one of nora, nora_input, mor, moe_lora, malora," in joined
    assert "; one of token, prompt, timestep," in joined
    assert all(f"--{f.name}" in text for f in fields(TrainConfig))


def test_the_documentation_has_every_setting() -> None:
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    table = text.split("\n## Settings\n")[1].split("\n## ")[0]
    assert [f.name for f in fields(TrainConfig) if table.count(f"\n| `{f.name}`") != 1] == []
    other = with_defaults(TrainConfig(pretrained_model_name_or_path="some/model"))
    assert f"| `learning_rate` | {other.learning_rate} |" in text


@pytest.mark.parametrize("method", PRESETS)
def test_a_method_has_the_parameters_of_its_preset(method: str) -> None:
    """Flags set exactly the parameters of the preset."""
    flags = parameters_of(method)
    assert set(flags.values()) == set(signature(PRESETS[method]).parameters) - {"axes"}
    config = with_defaults(TrainConfig(method=method))
    adapter = adapter_config(config)
    assert (adapter.method, adapter.r) == (method, config.rank)
    others = {"placement": "none", "power": 0.0, "core": "diagonal", "router": "prompt", "magnitude": True, "blocks": 2}
    for flag, parameter in flags.items():
        if flag in ("target_modules", "alpha", "dropout", "inner_rank"):
            continue
        given = others.get(flag, getattr(config, flag))
        assert getattr(adapter_config(replace(config, **{flag: given})), parameter) == given


def test_every_preset_is_a_method() -> None:
    """Flags, choices and defaults of a method follow from its preset."""
    assert TUNED.keys() <= PRESETS.keys()
    assert "one of " + ", ".join(PRESETS) in " ".join(build_parser("x").format_help().split())
    for method in PRESETS:
        assert with_defaults(TrainConfig(method=method)).rank
        assert usual_rates(method)[0] < 1e-3 < usual_rates(method)[1]
        rate, (low, high) = with_defaults(TrainConfig(method=method)).learning_rate, usual_rates(method, embedded=True)
        assert rate is not None and low <= rate <= high
    with pytest.raises(UserError, match="method='nore' is unknown: choose one of nora"):
        check_config(TrainConfig(method="nore", instance_data_dir="x"))


def test_a_router_gets_no_convolutions_by_default() -> None:
    assert "conv" not in (with_defaults(TrainConfig(method="mor")).target_modules or [])


def test_names_of_other_trainers_lead_to_settings() -> None:
    known = {setting.name for setting in settings()}
    assert not known & set(OTHER_NAMES) and set(OTHER_NAMES.values()) <= known


SEEDS = (0, 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_is_read_exactly(seed: int, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"seed: {seed}\n")
    found = [
        parse(["--seed", str(seed)]), parse([f"--seed={seed}"]), parse(["--config", str(file)]),
        TrainConfig.from_mapping({"seed": seed}), TrainConfig.from_mapping({"seed": str(seed)}),
    ]  # fmt: skip
    file.write_text(yaml.safe_dump(found[0].to_dict()))
    found.append(parse(["--config", str(file)]))
    assert [config.seed for config in found] == [seed] * len(found)
    for config in found:
        check_config(replace(config, instance_data_dir="photos"))


@pytest.mark.parametrize("seed", ["-1", str(2**64), "1" + "0" * 400, "1e400", "0.5", "nan", "inf", "", "0x10"])
def test_no_seed_is_rounded_or_a_traceback(seed: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed") as refused:
        check_config(replace(parse(["--instance_data_dir", "photos", "--seed", seed])))
        assert seed == ""  # the default, which is drawn
        raise UserError("no seed")
    assert seed == "" or "whole number" in str(refused.value) or "at least 0" in str(refused.value)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**400])
def test_a_seed_from_python_has_the_same_bounds(seed: int) -> None:
    with pytest.raises(UserError, match=r"must be at least 0 and below 2\^64"):
        check_config(TrainConfig(instance_data_dir="photos", seed=seed))


@pytest.mark.parametrize("name", ["text_encoder_lr", "token_lr"])
def test_a_rate_of_0_says_how_to_leave_the_weights_alone(name: str) -> None:
    both: dict[str, Any] = {"train_text_encoder": True, "train_text_encoder_ti": True, "instance_data_dir": "photos"}
    flag = {"text_encoder_lr": "--train_text_encoder", "token_lr": "--train_text_encoder_ti"}[name]
    with pytest.raises(UserError, match=f"^{name}=0.0 must be above 0: to leave these weights .* leave out {flag}$"):
        check_config(TrainConfig(**both, **{name: 0.0}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"^{name}=-1.0 must be above 0$"):
        check_config(TrainConfig(**both, **{name: -1.0}))  # type: ignore[arg-type]
