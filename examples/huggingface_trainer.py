"""transformers' Trainer, watched by a callback. `python examples/huggingface_trainer.py out/trainer`."""

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from foreshock.integrations.huggingface import ForeshockCallback


def main(out: str) -> None:
    """Train a small GPT-2, built from its config without any download, on the bytes of this file."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4))
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    pieces = [text[start : start + 64] for start in range(0, len(text) - 64, 16)]
    arguments = TrainingArguments(
        output_dir=f"{out}-checkpoints",
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": piece, "labels": piece} for piece in pieces],
        callbacks=[ForeshockCallback(out, every=10)],
    ).train()


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "out/huggingface_trainer")
