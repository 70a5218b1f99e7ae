"""NoRA, MoR and ordinary LoRAs on the same projections, compared with a dense reference model.

Seeded random sequences of diffusers' functions and ours. After each step the outputs of UNet and text encoder are
compared with an fp64 copy of the base, to which hooks add the formula of each adapter.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ecosystem.dense_model import COMPONENTS, FOREIGN, OURS, Machine, World, formulas, outputs, random_lora
from safetensors.torch import load_file

from nora_diffusion import (
    UserError,
    add_adapter,
    delete_adapter,
    load_adapter,
    open_pipeline,
    save_adapter,
    set_adapters,
)
from nora_diffusion.adapters import nora
from nora_diffusion.formats.adapter_file import FILE_NAME
from nora_diffusion.loaders import active_adapters, trainable_parameters


@pytest.fixture(scope="module")
def world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    pipe = open_pipeline(tiny_base)
    world = World(pipe, {component: copy.deepcopy(getattr(pipe, component)).double() for component in COMPONENTS})
    for seed, (name, (config, components)) in enumerate(OURS.items()):
        maker = world.fresh()
        torch.manual_seed(seed)
        add_adapter(maker, config, name, components)
        for parameter in trainable_parameters(maker, name).values():
            parameter.data.normal_(std=0.4)
        world.files[name] = save_adapter(maker, tmp_path_factory.mktemp(name), name).parent
        scale = 1.0 if config.alpha is None else config.alpha / config.r
        world.deltas[name] = formulas(load_file(world.files[name] / FILE_NAME), scale)
    for seed, (name, (r, suffixes)) in enumerate(FOREIGN.items()):
        world.loras[name] = random_lora(pipe, r, suffixes, seed)
        world.deltas[name] = formulas(world.loras[name], 1.0)
    return world


def remove_all(machine: Machine) -> None:
    machine.unfuse()
    if machine.random.random() < 0.5:
        machine.unload()
    for name in list(machine.weight):
        delete_adapter(machine.pipe, name)
    machine.weight.clear()
    machine.active = []


# The fast tests run the original_outputs 16 seeds, the slow ones all.
SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 16 else []) for seed in range(60)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_random_sequences_equal_the_dense_sum(world: World, seed: int) -> None:
    machine = Machine(world, seed)
    for _ in range(8):
        machine.step()
        machine.check()
    remove_all(machine)
    machine.check()
    if not machine.foreign_was_fused:
        machine.check_restored()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_base_is_restored_bit_for_bit(world: World, dtype: torch.dtype, seed: int) -> None:
    """Our adapters are fused, weighted and deleted while fused; a LoRA is loaded and deleted, but not fused."""
    machine = Machine(world, 100 + seed, dtype, tuple(OURS))
    machine.pipe.load_lora_weights(dict(world.loras["few"]), adapter_name="few")
    delete_adapter(machine.pipe, "few")
    for name in OURS:
        machine.load(name)
    for _ in range(10):
        machine.step()
        outputs(machine.components, dtype)
    remove_all(machine)
    machine.check_restored()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fused_lora_leaves_only_its_own_rounding(world: World, dtype: torch.dtype) -> None:
    """PEFT adds and subtracts a LoRA in the weight's dtype; our adapter must not add to that rounding error."""
    machine = Machine(world, 0, dtype)
    for name in ("nest", "plain"):
        machine.load(name)
    machine.pipe.set_adapters(["nest", "plain"])
    for _ in range(2):
        machine.pipe.fuse_lora()
        machine.pipe.unfuse_lora()
    delete_adapter(machine.pipe, "nest")
    machine.pipe.unload_lora_weights()
    largest = max(float(w.abs().max()) for component in COMPONENTS for w in machine.weights_of(component).values())
    for component in COMPONENTS:
        for key, value in machine.weights_of(component).items():
            drift = (value.float() - machine.original_weights[component][key].float()).abs().max()
            assert drift <= 16 * torch.finfo(dtype).eps * max(largest, 4.0), key


def test_fusing_then_unloading_keeps_the_fused_weights(world: World) -> None:
    """As diffusers documents for LoRAs: a way to remove the overhead of the adapter."""
    pipe = world.fresh()
    load_adapter(pipe, world.files["nest"], "nest")
    wanted = outputs({component: getattr(pipe, component) for component in COMPONENTS}, torch.float32)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    found = outputs({component: getattr(pipe, component) for component in COMPONENTS}, torch.float32)
    assert all(torch.allclose(found[component], wanted[component], atol=1e-5) for component in COMPONENTS)
    assert not [name for name, _ in pipe.unet.named_modules() if "nora_" in name]


def test_loading_keeps_a_pipeline_disabled(world: World) -> None:
    machine = Machine(world, 0)
    load_adapter(machine.pipe, world.files["nest"], "nest")
    machine.pipe.disable_lora()
    load_adapter(machine.pipe, world.files["wide"], "wide")  # adapts projections that had no adapter before
    after = outputs(machine.components, torch.float32)
    assert all(torch.equal(after[component], machine.original_outputs[component]) for component in COMPONENTS)
    machine.pipe.enable_lora()
    assert not torch.allclose(outputs(machine.components, torch.float32)["unet"], machine.original_outputs["unet"])


def test_deleting_the_active_adapter_activates_no_other(world: World) -> None:
    pipe = world.fresh()
    for name in FOREIGN:
        pipe.load_lora_weights(dict(world.loras[name]), adapter_name=name)
    load_adapter(pipe, world.files["nest"], "nest")
    set_adapters(pipe, "few")
    delete_adapter(pipe, "few")
    assert active_adapters(pipe.unet) == []
    pipe.set_adapters("plain")
    pipe.fuse_lora()
    with pytest.raises(UserError, match="unfuse_lora"):
        delete_adapter(pipe, "plain")


@pytest.mark.parametrize("names", [("nest", "plain"), ("plain", "nest"), ("mix",)], ids="-".join)
def test_merge_and_unload_is_refused(world: World, names: tuple[str, ...]) -> None:
    """PEFT's function, which removes a nested adapter together with the outer one, merged or not."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    pipe = world.fresh()
    for name in names:
        if name in OURS:
            load_adapter(pipe, world.files[name], name)
        else:
            pipe.load_lora_weights(dict(world.loras[name]), adapter_name=name)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING["NORA"].__new__(PEFT_TYPE_TO_TUNER_MAPPING["NORA"])
    torch.nn.Module.__init__(tuner)
    tuner.model = pipe.unet
    with pytest.raises(UserError, match=r"wraps this one|routed"):
        tuner.merge_and_unload()


@pytest.mark.parametrize("name", ["nora", "a b", "delta", "my_lora_1", ""])
def test_reserved_names_are_refused(world: World, name: str) -> None:
    pipe = world.fresh()
    with pytest.raises(UserError, match="is not allowed"):
        add_adapter(pipe, nora(r=2, inner_r=1, basis="svd"), name)


def test_set_lora_device_moves_all_adapters(world: World) -> None:
    pipe = world.fresh()
    name = next(iter(OURS))
    load_adapter(pipe, world.files[name], name)
    pipe.load_lora_weights(dict(world.loras[next(iter(FOREIGN))]), adapter_name="plain")

    def devices() -> set[str]:
        found = {p.device.type for p in trainable_parameters(pipe, name).values()}
        return found | {p.device.type for key, p in pipe.unet.named_parameters() if key.endswith("lora_A.plain.weight")}

    assert devices() == {"cpu"}
    pipe.set_lora_device([name, "plain"], "meta")
    assert devices() == {"meta"}


def test_saving_beside_a_fused_lora_is_refused(world: World, tmp_path: Path) -> None:
    """The fingerprints would be those of the fused weights, and the base would refuse the file."""
    pipe = world.fresh()
    name = next(iter(OURS))
    load_adapter(pipe, world.files[name], name)
    pipe.load_lora_weights(dict(world.loras[next(iter(FOREIGN))]), adapter_name="plain")
    pipe.fuse_lora(adapter_names=["plain"])
    with pytest.raises(UserError, match="unfuse_lora"):
        save_adapter(pipe, tmp_path / "again", name)
    assert not (tmp_path / "again").exists()
    pipe.unfuse_lora()
    load_adapter(pipe, save_adapter(pipe, tmp_path / "again", name), "again")


def test_module_names_are_refused(world: World) -> None:
    pipe = world.fresh()
    for taken in ("to_q", "0", "mid_block"):
        with pytest.raises(UserError, match="the name of a module"):
            add_adapter(pipe, nora(r=4, inner_r=2, basis="svd"), taken)
