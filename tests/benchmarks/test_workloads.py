"""Shapes of the named workloads and the bytes that one pass over them must move."""

import pytest
import torch

from benchmarks.workloads import CI, WORKLOADS, bytes_in_two_passes, bytes_per_element


def test_workloads_have_the_latents_of_their_backbones():
    latents = {name: workload.latent for name, workload in WORKLOADS.items()}
    assert latents == {
        "ci": (4096, 64),
        "sd35_512": (16, 512 // 8, 512 // 8),
        "sd35_1024": (16, 1024 // 8, 1024 // 8),
        "flux_512": ((512 // 16) ** 2, 64),
        "flux_1024": ((1024 // 16) ** 2, 64),
        "qwen_image_1328": ((1328 // 16) ** 2, 64),
        "wan21_480p": (16, (81 - 1) // 4 + 1, 480 // 8, 832 // 8),
        "wan21_720p": (16, (81 - 1) // 4 + 1, 720 // 8, 1280 // 8),
        "hunyuan_720p": (16, (129 - 1) // 4 + 1, 720 // 8, 1280 // 8),
    }


# Counted by hand: what each form reads, and the gradient.
@pytest.mark.parametrize(
    "form, fp32, bf16",
    [("mean", 20, 12), ("noise", 16, 8), ("seeded", 12, 6), ("velocity", 20, 10)],
)
def test_floor_reads_every_operand_once_and_writes_the_gradient(form, fp32, bf16):
    assert bytes_per_element(form, torch.float32) == fp32
    assert bytes_per_element(form, torch.bfloat16) == bf16
    assert CI.floor_bytes(form, torch.float32) == fp32 * 8 * 4096 * 64


@pytest.mark.parametrize(
    "form, fp32, bf16",
    [("mean", 32, 18), ("noise", 28, 14), ("seeded", 20, 10), ("velocity", 32, 16)],
)
def test_a_second_pass_reads_what_the_gradient_needs(form, fp32, bf16):
    assert bytes_in_two_passes(form, torch.float32) == fp32
    assert bytes_in_two_passes(form, torch.bfloat16) == bf16


def test_float64_mean_is_not_narrowed():
    assert bytes_per_element("mean", torch.float64) == 40
