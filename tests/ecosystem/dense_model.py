"""A pipeline with adapters and a dense fp64 reference model, driven by seeded random operations."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nora_diffusion import delete_adapter, load_adapter, set_adapters
from nora_diffusion.adapters import mor, nora
from nora_diffusion.pipelines.components import canonical, projections

COMPONENTS = ("unet", "text_encoder")
OURS = {
    "nest": (nora(r=4, inner_r=2), COMPONENTS),
    "wide": (nora(r=6, inner_r=3, alpha=9.0, basis="svd", target_modules=["attn", "ff"]), ("unet",)),
    "mix": (mor(r=4, num_experts=3, alpha=2.0), COMPONENTS),
}
FOREIGN = {
    "plain": (3, ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")),
    "few": (2, ("to_q", "to_v", "v_proj")),
}
BLOCKS = [("down_blocks.0", "down"), ("mid_block", "mid"), ("up_blocks.1", "up")]
Delta = Callable[[Tensor], Tensor]
Key = tuple[str, str]
"""Component and path of a projection."""


def chain(factors: dict[str, Tensor], scale: float) -> Delta:
    """``scale * B_out B_in A_in A_out``."""
    dense = scale * factors["B_out"] @ factors["B_in"] @ factors["A_in"] @ factors["A_out"]
    return lambda x: x @ dense.T


def mixture(factors: dict[str, Tensor], scale: float) -> Delta:
    """``scale * sum_i softmax(W_g x)_i diag(b_i) B diag(a_i) A x``."""
    experts = zip(factors["a"], factors["b"], strict=True)
    dense = [b[:, None] * (factors["B"] @ (a[:, None] * factors["A"])) for a, b in experts]
    return lambda x: (
        scale
        * sum(
            g.unsqueeze(-1) * (x @ d.T)
            for g, d in zip((x @ factors["W_g"].T).softmax(-1).unbind(-1), dense, strict=True)
        )
    )


@dataclass
class World:
    """The base, an fp64 copy of it, files of our adapters, LoRA state dicts, and the formula of each adapter."""

    base: Any
    exact: Any
    files: dict[str, Path] = field(default_factory=dict)
    loras: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    deltas: dict[str, dict[Key, Delta]] = field(default_factory=dict)

    def fresh(self, dtype: torch.dtype = torch.float32) -> Any:
        components = {name: copy.deepcopy(component) for name, component in self.base.components.items()}
        return type(self.base)(**components, requires_safety_checker=False).to(dtype=dtype)


def random_lora(pipe: Any, r: int, suffixes: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for component in COMPONENTS:
        for path, layer in projections(getattr(pipe, component)).items():
            if path.endswith(suffixes):
                d_out, d_in = layer.weight.shape
                tensors[f"{component}.{path}.lora_A.weight"] = 0.4 * torch.randn(r, d_in, generator=generator)
                tensors[f"{component}.{path}.lora_B.weight"] = 0.4 * torch.randn(d_out, r, generator=generator)
    return tensors


def formulas(tensors: dict[str, Tensor], scale: float) -> dict[Key, Delta]:
    grouped: dict[Key, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        component, rest = key.split(".", 1)
        path, factor = rest.removesuffix(".weight").rsplit(".", 1)
        grouped.setdefault((component, canonical(path)), {})[factor.removeprefix("nora_")] = value.double()
    found = {}
    for key, factors in grouped.items():
        if "lora_A" in factors:
            dense = factors["lora_B"] @ factors["lora_A"]
            found[key] = lambda x, dense=dense: x @ dense.T
        else:
            found[key] = (mixture if "W_g" in factors else chain)(factors, scale)
    return found


def outputs(components: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The outputs of one call of the UNet and one of the text encoder."""
    generator = torch.Generator().manual_seed(5)
    x, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return {
            "unet": components["unet"](x.to(dtype), 3, states.to(dtype)).sample,
            "text_encoder": components["text_encoder"](torch.arange(12).view(2, 6)).last_hidden_state,
        }


class Machine:
    """A pipeline under test and its reference: the active and merged weight of each adapter at each projection."""

    def __init__(
        self, world: World, seed: int, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = (*OURS, *FOREIGN)
    ) -> None:
        self.world, self.random, self.dtype, self.names = world, random.Random(seed), dtype, names
        self.pipe = world.fresh(dtype)
        self.original_weights = {component: self.weights_of(component) for component in COMPONENTS}
        self.original_outputs = outputs(self.components, dtype)
        self.weight: dict[str, dict[Key, float]] = {}
        self.merged: dict[str, dict[Key, float]] = {}
        self.active: list[str] = []
        self.disabled = False
        self.foreign_was_fused = False
        self.log: list[str] = []

    @property
    def components(self) -> dict[str, Any]:
        return {component: getattr(self.pipe, component) for component in COMPONENTS}

    def weights_of(self, component: str) -> dict[str, Tensor]:
        found = getattr(self.pipe, component).state_dict().items()
        return {k.replace(".base_layer", ""): v.clone() for k, v in found if "lora_" not in k and "nora_" not in k}

    # Operations; each is applied to the pipeline and to the reference.

    def load(self, name: str) -> None:
        self.weight[name] = dict.fromkeys(self.world.deltas[name], 1.0)
        if name in OURS:
            if self.random.random() < 0.3:
                load_adapter(self.pipe, self.world.files[name], name, activate=False)
                return
            value = self.random.choice([1.0, 0.6])
            load_adapter(self.pipe, self.world.files[name], name, weight=value)
            self.weight[name] = dict.fromkeys(self.weight[name], value)
            self.active.append(name)
        else:
            self.pipe.load_lora_weights(dict(self.world.loras[name]), adapter_name=name)
            self.active = [name]

    def set_weights(self) -> None:
        names = self.random.sample(sorted(self.weight), self.random.randint(1, len(self.weight)))
        values = [round(self.random.uniform(-0.5, 1.5), 2) for _ in names]
        if self.random.random() < 0.5:
            (set_adapters if self.random.random() < 0.5 else type(self.pipe).set_adapters)(self.pipe, names, values)
        self.pipe.set_adapters(names, values)
        self.active = names
        for name, value in zip(names, values, strict=True):
            self.weight[name] = dict.fromkeys(self.weight[name], value)

    def set_block_weights(self) -> None:
        names = self.random.sample(sorted(self.weight), self.random.randint(1, len(self.weight)))
        values = {name: {b: self.random.choice([0.0, 0.5, 2.0]) for _, b in BLOCKS} for name in names}
        dicts = [{"unet": values[n], **({"text_encoder": 0.25} if self.in_text(n) else {})} for n in names]
        (set_adapters if self.random.random() < 0.5 else type(self.pipe).set_adapters)(self.pipe, names, dicts)
        self.active = names
        for name in names:
            for key in self.weight[name]:
                block = next((b for prefix, b in BLOCKS if key[1].startswith(prefix)), None)
                self.weight[name][key] = values[name][block] if block else 0.25

    def in_text(self, name: str) -> bool:
        return any(component == "text_encoder" for component, _ in self.weight[name])

    def toggle(self) -> None:
        (self.pipe.enable_lora if self.disabled else self.pipe.disable_lora)()
        self.disabled = not self.disabled

    def fuse(self) -> None:
        names = [n for n in self.active if n in self.weight]
        scale = self.random.choice([1.0, 0.5])
        chosen = self.random.sample(names, self.random.randint(1, len(names))) if self.random.random() < 0.4 else None
        self.pipe.fuse_lora(lora_scale=scale, adapter_names=chosen)
        for name in names:
            self.weight[name] = {key: scale * value for key, value in self.weight[name].items()}
        for name in names if chosen is None else chosen:
            if name != "mix":
                self.merged.setdefault(name, dict(self.weight[name]))
                self.foreign_was_fused |= name in FOREIGN

    def unfuse(self) -> None:
        self.pipe.unfuse_lora()
        self.merged.clear()

    def delete(self, name: str) -> None:
        theirs = self.random.random() < 0.5
        self.pipe.delete_adapters(name) if theirs else delete_adapter(self.pipe, name)
        del self.weight[name]
        self.merged.pop(name, None)
        self.active = [n for n in self.active if n != name]
        if theirs and self.weight:  # PEFT may have activated another LoRA instead of the deleted one
            self.set_weights()

    def unload(self) -> None:
        self.pipe.unload_lora_weights()
        self.weight.clear()
        self.active, self.disabled = [], False

    def choices(self) -> list[Callable[[], None]]:
        """The operations that are possible now. PEFT's LoRA breaks if its weight changes while it is fused."""
        absent = [n for n in self.names if n not in self.weight]
        if any(name in FOREIGN for name in self.merged):
            return [self.unfuse, self.unfuse, self.toggle]
        operations: list[Callable[[], None]] = []
        if self.merged:
            operations += [self.unfuse]
        elif not self.disabled:
            operations += [lambda: self.load(self.random.choice(absent))] * 3 if absent else []
        if self.weight:
            operations += [self.set_weights, self.set_block_weights, self.toggle]
            operations += [lambda: self.delete(self.random.choice(sorted(self.weight)))]
            operations += [self.unload] if not self.merged else []
            operations += [self.fuse] * 2 if self.active and not self.disabled else []
        return operations or [self.toggle]

    # Checks

    def factor(self, name: str, key: Key) -> float:
        """The current effective weight of an adapter at one projection."""
        if name in self.merged:
            return self.merged[name][key]
        hidden = name in FOREIGN and any(n in FOREIGN and key in self.merged[n] for n in self.merged)
        return self.weight[name][key] if name in self.active and not self.disabled and not hidden else 0.0

    @contextmanager
    def dense(self) -> Iterator[dict[str, Any]]:
        """The fp64 components with hooks that add the formula of each adapter."""
        handles = []
        for component, module in self.world.exact.items():
            for path, layer in projections(module).items():
                key = (component, canonical(path))
                terms = [
                    (self.factor(name, key), deltas[key])
                    for name, deltas in self.world.deltas.items()
                    if name in self.weight and key in deltas
                ]

                def hook(_: Any, args: tuple[Tensor], y: Tensor, terms: Any = terms) -> Tensor:
                    return y + sum(weight * delta(args[0]) for weight, delta in terms)

                handles += [layer.register_forward_hook(hook)] if terms else []
        try:
            yield self.world.exact
        finally:
            for handle in handles:
                handle.remove()

    def check(self) -> None:
        if self.disabled:
            self.merged.clear()  # a disabled layer unmerges itself when called
        found = outputs(self.components, self.dtype)
        with self.dense() as components:
            wanted = outputs(components, torch.float64)
        for component in COMPONENTS:
            error = (found[component].double() - wanted[component]).norm() / wanted[component].norm()
            assert error < 1e-5, f"{component} is off by {error:.2e} after {' > '.join(self.log)}"

    def check_restored(self) -> None:
        for component in COMPONENTS:
            for key, value in self.weights_of(component).items():
                assert torch.equal(value, self.original_weights[component][key]), f"{key} after {' > '.join(self.log)}"
        after = outputs(self.components, self.dtype)
        assert all(torch.equal(after[component], self.original_outputs[component]) for component in COMPONENTS), (
            self.log
        )

    def step(self) -> None:
        operation = self.random.choice(self.choices())
        self.log.append(getattr(operation, "__name__", "?"))
        operation()
        self.log[-1] += f"({','.join(sorted(self.weight))}; active {','.join(self.active)})"
