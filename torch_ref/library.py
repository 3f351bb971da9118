"""The logits of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from mlx_moe.training.backend import Logits, Tokens


def logits(folder: Path, tokens_BT: Tokens) -> Logits:
    """Of the model in a folder, (B, T, V), in float32 on the CPU."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT).long()).logits.numpy()
