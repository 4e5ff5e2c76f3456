"""Watching on a CUDA device: the host waits for it at logged steps alone."""

from pathlib import Path

import pytest
import torch

import foreshock
from foreshock.core.run_folder import RunFolder
from tests.watched_models import NanoGPT, batch_of, loss_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing was run on a GPU")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_unlogged_steps_never_wait_for_the_device(tmp_path: Path, compiled: bool) -> None:
    """bf16 autocast, fused kernels, clipping; and the logits are those of the same model on the CPU."""
    torch.manual_seed(0)
    model = NanoGPT().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    called = torch.compile(model) if compiled else model
    batches = [batch_of(step).pin_memory().cuda(non_blocking=True) for step in range(12)]
    with foreshock.watch(called, optimizer, tmp_path / "run", every=5, budget=None) as w:
        for step, tokens in enumerate(batches, 1):
            torch.cuda.set_sync_debug_mode("error" if step > 6 and step % 5 else "default")
            try:
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = loss_of(called, tokens)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                w.step(loss)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    rows = {row["step"]: row for row in RunFolder(tmp_path / "run").metrics()}
    assert list(rows)[:3] == [1, 5, 10]
    torch.manual_seed(0)
    twin = NanoGPT()
    first = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    with foreshock.watch(twin, first, tmp_path / "cpu", every=5) as w:
        loss = loss_of(twin, batch_of(0))
        loss.backward()
        first.step()
        w.step(loss)
    expected = RunFolder(tmp_path / "cpu").metrics()[0]["attention_logits/max/h.0.attn"]
    assert rows[1]["attention_logits/max/h.0.attn"] == pytest.approx(expected, rel=2**-6)  # bf16 has eight bits
