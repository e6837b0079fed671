"""On a CUDA device every part gives what it gives on the CPU, in float64; and bfloat16 stays finite."""

from __future__ import annotations

import pytest
import torch

from tevo.catalogue.rows import rows
from tevo.testing.checks import compare_gradients
from tevo.testing.subject import Subject, subjects

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SUBJECTS = [subject for row in rows().values() if row.card for subject in subjects(row)]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_equals_the_cpu(subject: Subject) -> None:
    n = subject.sizes()[0]
    here, there = subject.make(), subject.make().cuda()
    x = subject.inputs(2, n)
    a, b = x.clone().requires_grad_(), x.cuda().requires_grad_()
    ours, theirs = subject.call(there, b), subject.call(here, a)
    assert ours.device.type == "cuda"
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-9)
    ours.sum().backward()
    theirs.sum().backward()
    assert a.grad is not None and b.grad is not None
    torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_bfloat16_autocast_is_finite_and_near_float32(subject: Subject) -> None:
    module = subject.make(dtype=torch.float32).cuda()
    x = subject.inputs(2, subject.sizes()[0], dtype=torch.float32).cuda().requires_grad_()
    wide = subject.call(module, x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        narrow = subject.call(module, x)
    narrow.float().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert float((narrow.float() - wide).norm()) <= 5e-2 * float(wide.norm()) + 1e-3


def test_compiled_softmax_equals_eager() -> None:
    subject = next(s for s in SUBJECTS if s.part == "softmax")
    module = subject.make(dtype=torch.float32).cuda()
    x = subject.inputs(2, 13, dtype=torch.float32).cuda().requires_grad_()
    compiled = torch.compile(module, fullgraph=True)(x)
    compare_gradients("compiled", module, [x], compiled, module(x), 1e-4)
