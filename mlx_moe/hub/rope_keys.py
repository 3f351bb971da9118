"""RoPE in a config.json, in both spellings.

Transformers 5 writes everything under `rope_parameters`; transformers 4 and mlx-lm use `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

from typing import Any

from mlx_moe.config import ModelConfig
from mlx_moe.hub.config_keys import Keys

# Parameters of each kind of scaling, in their names and ours.
SCALINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_context_length",
    },
}


def read_rope(keys: Keys, default_theta: float) -> dict[str, Any]:
    """Return the fields of ModelConfig. Values given in both spellings must agree."""
    thetas: dict[str, float] = {}
    if not keys.is_null("rope_theta"):
        thetas["rope_theta"] = keys.number("rope_theta")
    scalings: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        section = keys.section(name)
        if section is None:
            continue
        if "rope_theta" in section:
            thetas[f"{name}.rope_theta"] = section.number("rope_theta")
        kinds = [section.one_of(key, SCALINGS) for key in ("rope_type", "type") if key in section] or ["default"]
        if kinds[-1] != kinds[0]:
            section.refuse("type", kinds[-1], f"rope_type is {kinds[0]}; make them equal")
        scalings[name] = {"rope_type": kinds[0]} | {key: section.number(key) for key in SCALINGS[kinds[0]]}
        section.refuse_the_rest()
    for values in (thetas, scalings):
        for name, value in values.items():
            first = next(iter(values))
            if value != values[first]:
                keys.refuse(name, value, f"{first} is {values[first]}; make them equal")
    scaling = next(iter(scalings.values()), {"rope_type": "default"})
    ours = {name: scaling[key] for key, name in SCALINGS[scaling["rope_type"]].items()}
    return {"rope_theta": next(iter(thetas.values()), default_theta), "rope_scaling": ours or None}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json, in both spellings."""
    scaling = None
    if config.rope_scaling:
        ours = config.rope_scaling.model_dump()
        parameters = {key: ours[name] for key, name in SCALINGS[config.rope_scaling.rope_type].items()}
        scaling = {"rope_type": config.rope_scaling.rope_type, **parameters}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta},
    }
