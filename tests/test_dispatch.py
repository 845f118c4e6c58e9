"""Which kernel makes the steps: by device, by argument, by the environment."""

import importlib.util
import logging

import pytest
import torch

from sae.errors import UserError
from sae.kernels import dispatch
from sae.kernels.cpu import CpuKernel
from sae.kernels.dispatch import KERNELS, VARIABLE, Choice, choose_kernel, make_kernel, product_dtype
from sae.kernels.reference import ReferenceKernel

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as raised:
        choose_kernel(*arguments)
    return str(raised.value)


@pytest.mark.parametrize(("device", "name"), [(CPU, "cpu"), (GPU, "triton"), (OTHER, "reference")], ids=str)
def test_each_device_has_its_kernel(device, name):
    choice = choose_kernel(device)
    assert choice.name == name
    assert choose_kernel(device, "auto") == choice
    if name == "reference":
        assert choice.reason == "no kernel is written for mps: plain torch, slow and dense"


def test_a_gpu_without_triton_gets_the_reference_and_hears_why(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    choice = choose_kernel(GPU)
    assert choice.name == "reference"
    assert choice.reason.startswith("triton is not installed")
    assert choose_kernel(CPU).name == "cpu"


def test_an_argument_beats_the_environment_which_beats_the_device(monkeypatch):
    assert choose_kernel(CPU, "reference") == Choice("reference", "asked for")
    monkeypatch.setenv(VARIABLE, "reference")
    assert choose_kernel(CPU) == Choice("reference", f"{VARIABLE} asks for it")
    assert choose_kernel(CPU, "cpu") == Choice("cpu", "asked for")
    for nothing in ("", "auto"):
        monkeypatch.setenv(VARIABLE, nothing)
        assert choose_kernel(CPU).reason == "the device is a CPU: compiled by numba"


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_name_that_is_no_kernel_is_refused(monkeypatch, by_environment):
    if by_environment:
        monkeypatch.setenv(VARIABLE, "cuda")
    text = refusal(CPU) if by_environment else refusal(CPU, "cuda")
    assert all(name in text for name in KERNELS)
    assert "Found: 'cuda'. Choose one of them." in text


@pytest.mark.parametrize(
    ("device", "name", "found"),
    [
        (GPU, "cpu", "the device is no CPU"),
        (CPU, "triton", "the device is no GPU"),
        (OTHER, "triton", "the device is no GPU"),
    ],
    ids=str,
)
def test_a_kernel_that_cannot_run_on_the_device_is_refused(monkeypatch, device, name, found):
    expected = f"the {name} kernel must be able to run here. Found: {found}. Leave it at auto."
    assert refusal(device, name).startswith(expected)
    monkeypatch.setenv(VARIABLE, name)
    assert refusal(device).startswith(expected)


def test_triton_is_refused_where_it_is_missing_and_runs_on_a_cpu_when_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_kernel(CPU, "triton").name == "triton"
    assert choose_kernel(CPU).name == "cpu"
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    for device in (CPU, GPU):
        assert "Found: triton is not installed." in refusal(device, "triton")


def test_triton_is_looked_for_without_importing_it(monkeypatch):
    monkeypatch.undo()
    for spec in (None, object()):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert choose_kernel(GPU).name == ("reference" if spec is None else "triton")


@pytest.mark.parametrize(("name", "kernel"), [("cpu", CpuKernel), ("reference", ReferenceKernel)])
def test_the_kernel_is_made_and_the_log_says_which_and_why(caplog, name, kernel):
    caplog.set_level(logging.INFO, logger="sae.kernels.dispatch")
    made = make_kernel(choose_kernel(CPU, name))
    assert isinstance(made, kernel)
    assert made.name == name
    assert caplog.messages == [f"training steps by the {name} kernel: asked for"]


@pytest.mark.parametrize(
    ("bf16", "tiles", "dtype"),
    [(0, 0, torch.float32), (1, 0, torch.bfloat16), (0, 1, torch.bfloat16)],
)
def test_a_cpus_product_is_in_bfloat16_where_it_multiplies_it(monkeypatch, bf16, tiles, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(bf16), raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(tiles), raising=False)
    assert product_dtype(CPU) == dtype


def test_a_build_of_torch_that_cannot_tell_means_fp32(monkeypatch):
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, check, raising=False)
    assert product_dtype(CPU) == torch.float32


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_a_gpus_product_is_in_bfloat16_from_ampere_on(monkeypatch, major, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert product_dtype(GPU) == dtype
    assert product_dtype(OTHER) == torch.float32
