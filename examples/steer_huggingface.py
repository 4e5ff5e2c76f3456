"""Steer a causal language model of transformers from one file of prompts towards another.

Run it as `python examples/steer_huggingface.py path/to/model source.txt target.txt "an opening"`. The model and its
tokenizer are read from a local folder; the files hold a prompt a line, 32 of each are a good start. With toxic and
harmless sentences this is the paper's experiment (2503.10679) but for its judges and its models, which are not here.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from foreshock import steer

LONGEST = 64
"""Tokens of a prompt that are read."""
BATCH = 8
"""Prompts that go through the model at once."""


def batches(tokenizer: Any, file: Path) -> list[dict[str, torch.Tensor]]:
    """The lines of a file as batches with a mask; padding does not count in the fit."""
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    encoded = [
        tokenizer(lines[at : at + BATCH], return_tensors="pt", padding=True, truncation=True, max_length=LONGEST)
        for at in range(0, len(lines), BATCH)
    ]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in encoded]


def steered(folder: str, source: Path, target: Path, opening: str, method: str = "lineas") -> tuple[str, str]:
    """What the model makes of an opening, without and with maps from the source's prompts to the target's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompt = tokenizer(opening, return_tensors="pt")

    def written() -> str:
        torch.manual_seed(0)
        ids = model.generate(**prompt, max_new_tokens=40, do_sample=True, pad_token_id=tokenizer.pad_token_id)
        return str(tokenizer.decode(ids[0], skip_special_tokens=True))

    before = written()
    with steer.fit(model, batches(tokenizer, source), batches(tokenizer, target), method=method) as steering:
        print(steering)
        return before, written()


def main() -> None:
    """Print both texts."""
    folder, source, target, opening = sys.argv[1:5]
    method = sys.argv[5] if sys.argv[5:] else "lineas"
    for name, text in zip(
        ("as it is", "steered"), steered(folder, Path(source), Path(target), opening, method), strict=True
    ):
        print(f"--- {name}\n{text}")


if __name__ == "__main__":
    main()
