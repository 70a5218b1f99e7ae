"""One small test for each internal of PEFT, diffusers and transformers that this package depends on.

If an upgrade changes one of them, the error names the library, the internal and the code that depends on it.
docs/compatibility.md lists them, with the tested releases.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from nora_diffusion.adapters import AdapterConfig, NoraLayer, lora
from nora_diffusion.adapters.tuner.register import NORA, PREFIX

VERSIONS = {"peft": peft.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}


@contextmanager
def canary(library: str, internal: str, needed_by: str) -> Iterator[None]:
    """Turn any exception into a failure that names the internal."""
    try:
        yield
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        pytest.fail(f"{library} {VERSIONS[library]} changed {internal}; {needed_by} depends on it ({detail})")


def test_documented_releases_include_the_pinned_ones() -> None:
    root = Path(__file__).parents[2]
    documented = (root / "docs" / "compatibility.md").read_text()
    pinned = (root / "constraints.txt").read_text()
    pins = dict(re.findall(r'^(\w+)==([\d.]+)(?:; python_version >= "3.11")?$', pinned, re.M))
    for library in ("peft", "diffusers", "transformers", "torch"):
        assert re.search(rf"^\| {library} \|.*\*\*{re.escape(pins[library])}\*\*", documented, re.M), library


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)


def stacked(ours_first: bool) -> Holder:
    """One projection with a LoRA and one of our adapters."""
    model, plain = Holder(), LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    for ours in (ours_first, not ours_first):
        if ours:
            inject_adapter_in_model(lora(r=2, target_modules=["to_q"]), model, "mine")
        else:
            inject_adapter_in_model(plain, model, "plain")
    return model


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), cross_attention_dim=8, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def test_peft_tables_of_methods() -> None:
    with canary("peft", "peft.mapping.PEFT_TYPE_TO_{CONFIG,TUNER,PREFIX}_MAPPING", "adapters/tuner/register.py"):
        from peft import mapping

        assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[NORA] is AdapterConfig
        assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[NORA].prefix == PREFIX
        assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[NORA] == PREFIX == f"{NORA.lower()}_"


def test_peft_finds_the_method_by_name() -> None:
    with canary("peft", "get_peft_config / PeftConfig.from_peft_type by name", "loading by PEFT"):
        assert isinstance(peft.get_peft_config(lora(r=2, target_modules=["to_q"]).to_dict()), AdapterConfig)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_peft_nests_tuner_layers(ours_first: bool) -> None:
    with canary(
        "peft", "how a second tuner wraps a projection (base_layer)", "adapters/tuner/model.py (ours is innermost)"
    ):
        layer = stacked(ours_first).to_q
        assert type(layer).__module__.startswith("peft.tuners.lora")
        assert isinstance(layer.base_layer, NoraLayer)
        assert type(layer.get_base_layer()) is nn.Linear
        assert set(vars(layer)["_modules"]) >= {"lora_A", "lora_B", "base_layer"}


@pytest.mark.skipif(VERSIONS["peft"] < "0.21", reason="PEFT saves unknown methods since 0.21")
def test_peft_strips_adapter_names_from_keys() -> None:
    with canary("peft", "BaseTuner._remove_adapter_name_from_key", "PEFT's own saving of our adapters"):
        from peft.utils import get_peft_model_state_dict

        model = stacked(True)
        found = get_peft_model_state_dict(model, adapter_name="mine")
        assert set(found) == {"to_q.nora_delta.A", "to_q.nora_delta.B"}


def test_peft_layer_interface() -> None:
    with canary("peft", "BaseTunerLayer's attributes", "adapters/tuner/layer.py"):
        for name in ("adapter_layer_names", "other_param_names", "merged_adapters", "_disable_adapters"):
            assert hasattr(BaseTunerLayer, name), name
        assert "inference_mode" in inspect.signature(BaseTunerLayer.set_adapter).parameters
        layer = stacked(True).to_q
        assert layer.active_adapters == ["plain"] and layer.base_layer.active == ["mine"]
        assert {"merge", "unmerge", "set_scale", "scale_layer", "unscale_layer"} <= set(dir(layer))


def test_peft_hooks_of_the_tuner() -> None:
    with canary("peft", "BaseTuner._post_injection_hook", "adapters/tuner/model.py (qkv guard, rank mask)"):
        unet = tiny_unet()
        unet.add_adapter(lora(r=2), "mine")
        assert "fuse_qkv_projections" in vars(unet)
    with canary(
        "peft", "BaseTuner._unload_and_optionally_merge", "adapters/tuner/model.py (merge_and_unload is refused)"
    ):
        assert "_unload_and_optionally_merge" in vars(BaseTuner)
    with canary("peft", "PeftModel._enable_peft_forward_hooks", "adapters/tuner/model.py (adapter_names: one per row)"):
        assert "_enable_peft_forward_hooks" in inspect.getsource(peft.PeftModel)


@pytest.mark.filterwarnings("ignore")
def test_peft_lora_ignores_live_adapters_beside_merged_ones() -> None:
    with canary("peft", "lora.Linear.forward with a merged adapter", "docs/compatibility.md (fusing)"):
        model = Holder()
        for name in ("one", "two"):
            config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
            inject_adapter_in_model(config, model, name)
        model.to_q.set_adapter(["one", "two"])
        model.to_q.merge(adapter_names=["one"])
        x = torch.randn(3, 4)
        assert torch.equal(model.to_q(x), model.to_q.get_base_layer()(x))


def test_peft_merge_helpers() -> None:
    with canary("peft", "peft.tuners.tuners_utils.check_adapters_to_merge", "adapters/tuner/layer.py (merge)"):
        from peft.tuners.tuners_utils import check_adapters_to_merge

        assert check_adapters_to_merge(stacked(True).to_q, ["plain"]) == ["plain"]
    with canary("peft", "peft.tuners.tuners_utils.check_target_module_exists", "adapters/axes.py (selects)"):
        from peft.tuners.tuners_utils import check_target_module_exists

        assert check_target_module_exists(lora(r=2, target_modules=["to_q"]), "block.to_q")
        assert not check_target_module_exists(lora(r=2, target_modules=["to_q"]), "block.to_k")


@pytest.mark.parametrize(
    "internal",
    ["set_adapter_layers", "set_weights_and_activate_adapters", "scale_lora_layers", "unscale_lora_layers",
     "delete_adapter_layers", "recurse_remove_peft_layers"],
)  # fmt: skip
def test_diffusers_treats_all_tuner_layers_alike(internal: str) -> None:
    with canary(
        "diffusers", f"diffusers.utils.peft_utils.{internal}", "pipe.set_adapters, fuse, delete, unload on ours"
    ):
        import diffusers.utils.peft_utils as utils

        source = inspect.getsource(getattr(utils, internal))
        assert "BaseTunerLayer" in source
        assert not source.count("LoraLayer") or internal == "recurse_remove_peft_layers"


@pytest.mark.filterwarnings("ignore")
def test_diffusers_model_functions() -> None:
    with canary("diffusers", "PeftAdapterMixin (add, set, disable, fuse, delete, unload)", "everything on a UNet"):
        unet = tiny_unet()
        unet.add_adapter(lora(r=2), "mine")
        unet.set_adapters(["mine"], [0.5])
        layers = [layer for layer in unet.modules() if isinstance(layer, NoraLayer)]
        assert {layer.scaling["mine"] for layer in layers} == {0.5}
        unet.disable_lora()
        assert all(layer.disable_adapters for layer in layers)
        unet.enable_lora()
        unet.fuse_lora()
        assert all(layer.merged for layer in layers)
        unet.unfuse_lora()
        unet.delete_adapters("mine")
        assert not any(layer.nora_delta for layer in layers)
        unet.unload_lora()
        assert not any(isinstance(layer, NoraLayer) for layer in unet.modules())


def test_diffusers_refuses_keys_without_lora() -> None:
    with canary(
        "diffusers", "load_lora_weights refuses keys that lack 'lora'", "formats/adapter_file.py (names of keys)"
    ):
        pipe_class = diffusers.StableDiffusionPipeline
        state: dict[str, Any] = {"unet.to_q.nora_A_in": torch.zeros(2, 4)}
        with pytest.raises(ValueError):
            pipe_class.load_lora_weights(pipe_class.__new__(pipe_class), state)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_fuse_qkv_reads_the_base_weight() -> None:
    with canary("diffusers", "fuse_qkv_projections reads to_q.weight and flags fused_projections", "guards.py"):
        from nora_diffusion.adapters.tuner.guards import FUSE, refuse_fused

        unet = tiny_unet()
        assert hasattr(UNet2DConditionModel, FUSE)
        refuse_fused(unet)
        unet.fuse_qkv_projections()
        with pytest.raises(ValueError, match="unfuse_qkv_projections"):
            refuse_fused(unet)
        unet.unfuse_qkv_projections()
        refuse_fused(unet)


def test_diffusers_attention_interface() -> None:
    with canary("diffusers", "Attention / AttnProcessor2_0", "attention.py"):
        from diffusers.models.attention_processor import Attention, AttnProcessor2_0

        attention = Attention(query_dim=8, heads=2, dim_head=4, processor=AttnProcessor2_0())
        projections = "to_q to_k to_v to_out heads scale norm_q norm_k norm_cross"
        rest = "group_norm spatial_norm residual_connection rescale_output_factor prepare_attention_mask"
        for name in (projections + " " + rest).split():
            assert hasattr(attention, name), name


def test_offloading_hooks() -> None:
    with canary("diffusers", "hooks of group offloading", "adapters/tuner/offloading.py, loaders/active.py"):
        from diffusers.hooks import apply_group_offloading
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        model, cpu = Holder(), torch.device("cpu")
        apply_group_offloading(model, cpu, cpu, offload_type="leaf_level")
        model.add_module("more", nn.Linear(4, 4))
        _maybe_remove_and_reapply_group_offloading(model)
        for layer in (model.to_q, model.get_submodule("more")):
            hook: Any = layer._diffusers_hook.get_hook("group_offloading")  # type: ignore[operator, union-attr]
            assert callable(hook.pre_forward) and callable(hook.post_forward)
    with canary("diffusers", "cast_input_dtype_enabled of tuner layers", "layerwise casting: adapters/tuner/layer.py"):
        from peft.helpers import disable_input_dtype_casting

        with disable_input_dtype_casting(stacked(ours_first=True)):
            pass
    with canary("peft", "accelerate's _hf_hook on offloaded layers", "adapters/tuner/offloading.py"):
        from accelerate import cpu_offload

        offloaded = cpu_offload(Holder(), cpu)
        assert offloaded.to_q.weight.is_meta
        offloaded.to_q._hf_hook.pre_forward(offloaded.to_q)
        assert not offloaded.to_q.weight.is_meta


def test_transformers_stores_adapter_configs() -> None:
    with canary("transformers", "PreTrainedModel.peft_config / _hf_peft_config_loaded", "loaders (text encoders)"):
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(
            vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        model = CLIPTextModel(config)
        assert model._hf_peft_config_loaded is False
        model.add_adapter(lora(r=2), "mine")
        assert isinstance(model.peft_config["mine"], AdapterConfig)
        assert model.active_adapters() == ["mine"]
        model.delete_adapter("mine")
        assert not any(layer.nora_delta for layer in model.modules() if isinstance(layer, NoraLayer))


def test_transformers_paths_of_clip() -> None:
    with canary("transformers", "module paths of CLIPTextModel", "components.canonical and exports (text_model.)"):
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        from nora_diffusion.pipelines.components import canonical

        with torch.device("meta"):
            for kind in (CLIPTextModel, CLIPTextModelWithProjection):
                model = kind(CLIPTextConfig(num_hidden_layers=1))
                paths = [canonical(name) for name, _ in model.named_modules() if name.endswith("q_proj")]
                assert paths == ["encoder.layers.0.self_attn.q_proj"]
