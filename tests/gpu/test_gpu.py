"""The same laws on a GPU: run with `make test-gpu` on a machine with CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from potstill.losses import HeadTerm, distillation_loss
from potstill.types import Head, States

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

TERMS = [HeadTerm("forward_kl", 0.5, 2.0), HeadTerm("reverse_kl", 0.2), HeadTerm("cross_entropy", 0.3)]


def _gradients(device: str, dtype: torch.dtype, compiled: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student_ND = torch.randn(300, 64, generator=generator).to(device, dtype).requires_grad_()
    weight_VD = torch.randn(5003, 64, generator=generator).mul(0.2).to(device).requires_grad_()
    teacher_ND = torch.randn(300, 96, generator=generator).to(device, dtype)
    head = Head(torch.randn(5003, 96, generator=generator).mul(0.2).to(device, dtype))
    targets_N = torch.randint(0, 5003, (300,), generator=generator).to(device)
    student, teacher = States(student_ND, Head(weight_VD)), States(teacher_ND, head)
    result = distillation_loss(student, targets_N, TERMS, teacher=teacher, compiled=compiled)
    result.total.backward()
    assert student_ND.grad is not None
    assert weight_VD.grad is not None
    return [result.total.detach().cpu().double(), student_ND.grad.cpu().double(), weight_VD.grad.cpu().double()]


@pytest.mark.parametrize("compiled", [False, True])
def test_loss_on_a_gpu_equals_the_float64_oracle(compiled: bool) -> None:
    expected = _gradients("cpu", torch.float64, compiled=False)
    for found, right in zip(_gradients("cuda", torch.float32, compiled), expected, strict=True):
        assert float((found - right).norm() / right.norm()) < 1e-4


def test_bfloat16_states_keep_the_gradient_within_half_a_percent() -> None:
    expected = _gradients("cpu", torch.bfloat16, compiled=False)
    for found, right in zip(_gradients("cuda", torch.bfloat16, compiled=True), expected, strict=True):
        assert float((found - right).norm() / right.norm()) < 5e-3


def test_a_whole_run_on_a_gpu(tiny_llama: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    from potstill.pipeline.run import run_recipe
    from potstill.recipes.schema import Recipe

    recipe = Recipe.model_validate(
        {
            "name": "gpu",
            "run_dir": tmp_path / "run",
            "data": {"source": str(tiny_corpus), "sequence_length": 32, "splits": {"validation": 0.1, "test": 0.2}},
            "teacher": {"kind": "local", "model": str(tiny_llama), "device": "cuda"},
            "student": {"kind": "layers", "keep": "greedy", "count": 2},
            "losses": [{"kind": "forward_kl"}, {"kind": "hidden_mse", "weight": 0.1}],
            "training": {"steps": 10, "device": "cuda", "micro_batch_rows": 4},
        }
    )
    folder = run_recipe(recipe)
    assert (folder / "report" / "index.html").exists()
