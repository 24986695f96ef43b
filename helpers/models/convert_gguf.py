"""Convert a GGUF file to a checkpoint: `python -m helpers.models.convert_gguf FILE FOLDER float32`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, folder: str, dtype: str) -> None:
    """Write a safetensors checkpoint, its numbers de-quantised to `dtype`, and the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype)
    )
    # transformers 5.23 refuses to save what was read from GGUF until it forgets that.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), *sys.argv[2:])
