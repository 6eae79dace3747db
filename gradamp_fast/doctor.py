"""What this machine, this torch and this build can do together: `python -m gradamp_fast doctor`."""

from __future__ import annotations

import os
import platform
import re
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import collect_env

from . import _extension, backends, optim
from ._version import __version__
from .amplifier import Amplifier

_PACKAGES = ("triton", "rich", "matplotlib", "tensorboard", "transformers", "accelerate",
             "lightning", "timm")  # fmt: skip
_VARIABLES = ("GRADAMP_BACKEND", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "GRADAMP_CUDA",
              "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDACXX")  # fmt: skip


def info(environment: bool = False) -> dict[str, Any]:
    """The facts, as plain values: versions, the build, the GPUs, which backends can run.

    ``environment`` adds what ``torch.utils.collect_env`` finds, which takes seconds.
    """
    extension = _extension.load()
    return {
        "gradamp_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in _PACKAGES},
        "built_with": _extension.built_with(),
        "extension_problem": _extension.reason(),
        "cpu_instructions": extension.instruction_set() if extension else None,
        "gpus": [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
            }
            for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        ],
        "backends": {
            str(device): {name: backends.unavailable(name, device) for name in backends.NAMES}
            for device in _devices()
        },
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        **({"environment": collect_env.get_env_info()._asdict()} if environment else {}),
    }


def diagnose(full: bool = False) -> tuple[str, bool]:
    """Runs a small step on every backend that can run, and says what is wrong: ten lines.

    Returns these lines, the verdict first, and whether nothing is wrong. ``full`` adds the whole
    environment, the build, and every backend on every device.
    """
    facts = info()
    problems = [*build_problems(facts), *variable_problems()]
    results: dict[str, dict[str, str]] = {name: {} for name in backends.NAMES}
    for device in _devices():
        for name in backends.NAMES:
            results[name][str(device)], wrong = _try(name, device)
            problems += [f"{name} on {device}: {results[name][str(device)]}"] if wrong else []
    lines = [f"{len(problems)} problem(s) found." if problems else "No problem found."]
    lines += [f"PROBLEM  {problem}" for problem in problems]
    if not full:
        lines += summary_lines(facts, results)
        lines += ["  All there is to know: python -m gradamp_fast doctor --full"]
        return "\n".join(lines), not problems
    lines += ["", "Build", *_indented(build_lines(facts))]
    lines += ["", "Backends, three steps of each against the reference"]
    lines += _indented(
        f"{f'{name} on {device}':<16} {result}"
        for name, of_devices in results.items()
        for device, result in of_devices.items()
    )
    lines += ["", "Environment, from torch.utils.collect_env"]
    lines += _indented(collect_env.pretty_str(collect_env.get_env_info()).strip().splitlines())
    return "\n".join(lines), not problems


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}".rstrip() for line in lines]


def _devices() -> list[torch.device]:
    """The CPU, and the current GPU where there is one."""
    gpu = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else []
    return [torch.device("cpu"), *gpu]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- the build ----------------------------------------------------------------------


def summary_lines(
    facts: Mapping[str, Any], results: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    """Versions, the build, the GPUs, and a line for each backend from its result by device."""
    built = facts["built_with"]
    versions = (f"{name} {facts[name]}" for name in ("gradamp_fast", "torch", "python"))
    yield f"  {', '.join(versions)}"
    yield f"  Build: {built.get('summary') or 'no compiled extension'}"
    gpus = Counter(f"{gpu['name']} ({gpu['capability']})" for gpu in facts["gpus"])
    named = ", ".join(f"{count} x {gpu}" if count > 1 else gpu for gpu, count in gpus.items())
    yield f"  GPU: {named or _no_gpu(facts)}"
    for name, of_devices in results.items():
        devices = [d for d in of_devices if facts["backends"][d][name] is None]
        said = dict.fromkeys(of_devices[d] for d in devices)
        where = [f"{r} on {', '.join(d for d in devices if of_devices[d] == r)}" for r in said]
        yield f"  {name:<7} {'; '.join(where) or list(of_devices.values())[-1]}"
    taken = [f"{automatic(device) or 'none'} on {device}" for device in _devices()]
    yield f'  backend="auto" takes {", ".join(taken)}'


def automatic(device: torch.device) -> str | None:
    """The backend that "auto" takes, by GRADAMP_BACKEND too; None if that cannot run there."""
    try:
        chosen: Any = backends.choose("auto", device)
    except (RuntimeError, ValueError):
        return None
    return str(chosen.name)


def variable_problems() -> Iterator[str]:
    """What is wrong with GRADAMP_BACKEND: what every step would raise."""
    if any(automatic(device) for device in _devices()):
        return
    try:
        backends.choose("auto", _devices()[-1])
    except (RuntimeError, ValueError) as error:
        yield f"{error}. Correct GRADAMP_BACKEND, or unset it"


def _no_gpu(facts: Mapping[str, Any]) -> str:
    if not facts["torch_cuda"]:
        return "none, because this torch is a build without CUDA"
    return "torch sees none; look at the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"


def build_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The build, what it runs on, and what is set in the environment."""
    built = facts["built_with"]
    yield f"gradamp_fast {facts['gradamp_fast']}, Python {facts['python']}"
    yield f"built with torch {built.get('torch') or '-'}, running torch {facts['torch']}"
    yield f"built with CUDA {built.get('cuda') or '-'}, torch's CUDA {facts['torch_cuda'] or '-'}"
    yield f"architectures in the binary: {built.get('archs') or '-'}"
    for gpu in facts["gpus"]:
        yield f"GPU: {gpu['name']}, architecture {gpu['capability']}"
    if not facts["gpus"]:
        yield f"GPU: {_no_gpu(facts)}"
    if facts["cpu_instructions"]:
        yield f"CPU kernels in use: {facts['cpu_instructions']}"
    if built.get("summary"):
        yield f"the build said: {built['summary']}"
    packages = [f"{name} {found or '-'}" for name, found in facts["packages"].items()]
    yield f"optional packages: {', '.join(packages)}"
    for name, value in facts["variables"].items():
        yield f"{name}={value}"


def build_problems(facts: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the build on this machine, with the fix."""
    if facts["extension_problem"]:
        yield facts["extension_problem"]
        return
    for device, reasons in facts["backends"].items():
        if device != "cpu" and reasons["cuda"] and reasons["triton"]:
            yield (
                f"only plain PyTorch serves {device}. cuda: {reasons['cuda']}. "
                f"triton: {reasons['triton']}"
            )
    built = facts["built_with"]
    for gpu in facts["gpus"]:
        if built.get("cuda") and not serves(built["archs"], gpu["capability"]):
            yield (
                f"the binary holds code for {built['archs']} and cannot run on {gpu['name']}, "
                f"architecture {gpu['capability']}: rebuild with "
                f'TORCH_CUDA_ARCH_LIST="{gpu["capability"]}"'
            )


def serves(archs: str, capability: str) -> bool:
    """Whether a binary for ``archs`` (such as "8.0 9.0+PTX") runs on a GPU (such as "9.0").

    Machine code runs on the same major architecture from its minor one on, PTX on all later ones;
    code for "9.0a" on exactly that.
    """
    gpu = tuple(int(part) for part in capability.split("."))
    for arch in archs.split():
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if found is None:
            continue
        own, specific, ptx = (int(found[1]), int(found[2])), found[3] == "a", found[4]
        if own == gpu or (not specific and own <= gpu and (ptx or own[0] == gpu[0])):
            return True
    return False


def backend_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Which backends can run, and why the others cannot."""
    for device, reasons in facts["backends"].items():
        for name, reason in reasons.items():
            yield f"{f'{name} on {device}':<16} {f'no: {reason}' if reason else 'available'}"


# ---- the step -----------------------------------------------------------------------


def _try(name: str, device: torch.device) -> tuple[str, bool]:
    """What became of a backend's steps, and whether that is a fault."""
    if reason := backends.unavailable(name, device):
        return f"not available: {reason}", False
    try:
        return compare(name, device)
    except Exception as error:  # whatever a broken build or driver raises
        return "".join(traceback.format_exception_only(error)).strip(), True


_ALL = ((torch.float32, 1009), (torch.float32, 131_101), (torch.bfloat16, 4099),
        (torch.float16, 300), (torch.float64, 65))  # fmt: skip
# Triton compiles the kernel here, which takes some seconds more for every dtype.
_OF_BACKEND = {"triton": _ALL[:2]}


class _Tensors(nn.Module):
    """One layer for each dtype and bucket length; no forward pass."""

    def __init__(self, device: torch.device, kinds: Iterable[tuple[torch.dtype, int]]) -> None:
        super().__init__()
        for dtype, size in kinds:
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
            self.add_module(f"{str(dtype).removeprefix('torch.')}_{size}", layer)


def compare(name: str, device: torch.device) -> tuple[str, bool]:
    """Three steps of a backend, and of each optimizer by it, and of the reference.

    In words, and whether they disagree.
    """
    kinds = _OF_BACKEND.get(name, _ALL)
    written, rows = _run(name, device, kinds)
    expected, reference = _run("torch", torch.device("cpu"), kinds)
    wrong = [layer for layer, tensor in written.items() if not torch.equal(tensor, expected[layer])]
    wrong += [
        layer
        for layer in reference
        if not torch.allclose(rows[layer], reference[layer], rtol=1e-4, atol=1e-4)
    ]
    if not wrong:
        ours = _updated(name, device, kinds)
        theirs = _updated("torch", torch.device("cpu"), kinds)
        wrong = [label for label in ours if not _alike(ours[label], theirs[label])]
    if wrong:
        return f"disagrees with the reference in {', '.join(dict.fromkeys(wrong))}", True
    return "agrees with the reference", False


def _run(
    name: str, device: torch.device, kinds: Iterable[tuple[torch.dtype, int]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients as written and the layers' numbers, on the CPU, after three steps."""
    model = _Tensors(device, kinds)
    amplifier = Amplifier(model, backend=name, min_steps=2, refresh=1, timing="exact", factor=1.7)
    generator = torch.Generator("cpu").manual_seed(0)
    steady = {n: _noise(p, generator) for n, p in model.named_parameters()}
    for step in range(3):
        for number, (label, parameter) in enumerate(model.named_parameters()):
            sign = -1 if number % 2 and step % 2 else 1
            gradient = sign * steady[label] + 0.3 * _noise(parameter, generator)
            parameter.grad = gradient.to(parameter.dtype).to(device)
        amplifier.step()
    written = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    rows = {
        layer.name: torch.tensor(
            [layer.variance, layer.score, layer.fluctuation, layer.direction, layer.factor],
            device="cpu",
        )
        for layer in amplifier.report().layers
    }
    return {n.removesuffix(".weight"): tensor for n, tensor in written.items()}, rows


def _updated(
    name: str, device: torch.device, kinds: Iterable[tuple[torch.dtype, int]]
) -> dict[str, Tensor]:
    """Parameters, on the CPU, after three steps of each fused optimizer with an amplifier."""
    out = {}
    for make in (partial(optim.SGD, momentum=0.9), optim.Adam, optim.AdamW):
        model = _Tensors(device, kinds)
        amplifier = Amplifier(model, backend=name, min_steps=1, refresh=1, factor=1.7)
        optimizer = make(model.parameters(), 0.01)
        amplifier.attach(optimizer)
        generator = torch.Generator("cpu").manual_seed(1)
        for _ in range(3):
            for parameter in model.parameters():
                gradient = _noise(parameter, generator)
                parameter.grad = gradient.to(parameter.dtype).to(device)
            optimizer.step()
        for label, parameter in model.named_parameters():
            layer = label.removesuffix(".weight")
            out[f"optim.{type(optimizer).__name__} of {layer}"] = parameter.detach().cpu()
    return out


def _alike(a: Tensor, b: Tensor) -> bool:
    """To the rounding of three updates of a hundredth and less."""
    tolerance = 4 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=tolerance, atol=0.1 * tolerance)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device="cpu")
