"""The CUDA step without a GPU: its source compiled for the host, as a backend of CPU tensors."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradamp_fast.backends.compiled import for_kernel
from gradamp_fast.backends.stepping import Measuring
from gradamp_fast.call import Call, Hyper, Outcome, Updated
from gradamp_fast.model.gradients import DTYPES, GradientReader
from gradamp_fast.model.plan import Plan
from gradamp_fast.options import Rules
from gradamp_fast.reference.state import State

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
ORDER = ("measure", "threshold", "threshold_value", "select", "exact", "match_norm", "max_norm")
ORDER += ("decay", "min_steps", "refresh", "schedule_unit", "seed", "grow", "max_factor")

# Assembly, and shared memory whose size the launch says, in what the host's compiler takes. The
# memory orders are those that stand in the assembly.
REPLACED = (
    (r'asm\("mov.u32 %0, %%laneid;"[^;]*;', "lane = threadIdx.x % 32;"),
    (r'asm volatile\("atom\.(\w+)\.gpu\.global\.inc\.u32[^;]*;"[^;]*;',
     r"old = emulator::increment<std::memory_order_\1>(ticket, count - 1);"),
    (r'asm volatile\("fence\.(\w+)\.gpu;"[^;]*;',
     r"emulator::fence<std::memory_order_\1>(ticket);"),
    (r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = emulator::shared_memory<\1>();"),
)  # fmt: skip
# Tables of three tensors and groups of four tiles, so that small models have several.
SMALL = (
    (r"constexpr int kSmallTable = \d+;", "constexpr int kSmallTable = 3;"),
    (r"constexpr int kMinGroupTiles = \d+;", "constexpr int kMinGroupTiles = 4;"),
)
SOURCES = ("tiles.cpp", "cuda/engine.cpp", "cuda/memory.cpp", "cuda/tables.cpp", "cuda/updates.cpp")


def replace_once(folder: Path, rules: Sequence[tuple[str, str]]) -> None:
    """Replaces what each pattern matches, once in all files of a folder."""
    counts = dict.fromkeys(rules, 0)
    for path in folder.iterdir():
        text = path.read_text()
        for rule in rules:
            text, count = re.subn(*rule, text)
            counts[rule] += count
        path.write_text(text)
    assert set(counts.values()) <= {1}, counts


def compile_copy(
    compiler: str,
    folder: Path,
    target: Path,
    flags: Sequence[str],
    changes: Sequence[tuple[str, str]] = (),
    main: Path = HERE / "emulator.cpp",
) -> None:
    """Compiles a copy of the CUDA step's sources, changed, for the host, with the emulator around.

    Each change, a pattern and what takes its place, must match once.
    """
    source = folder / "csrc"
    shutil.copytree(CSRC, source)
    replace_once(source / "cuda", [*changes, *REPLACED])
    assert not [path.name for path in (source / "cuda").iterdir() if "asm" in path.read_text()]
    files = [main, *(source / name for name in SOURCES)]
    includes = [f"-I{HERE / 'shim'}", f"-I{source / 'cuda'}"]
    built_with = ['-DGRADAMP_CUDA="13.0"', '-DGRADAMP_ARCHS="9.0"']
    common = ["-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-w", "-x", "c++", *built_with]
    command = [compiler, *common, *flags, *includes, *map(str, files), "-o", str(target)]
    subprocess.run(command, check=True)


def compiled(compiler: str, folder: Path) -> ctypes.CDLL:
    """The library of emulator.cpp, built in an empty folder; its tables and groups are small."""
    library = folder / "emulated.so"
    compile_copy(compiler, folder, library, ["-shared", "-fPIC"], SMALL)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_new.restype = loaded.runtime_begin_capture.restype = ctypes.c_void_p
    loaded.emulated_problem.restype = loaded.runtime_log.restype = ctypes.c_char_p
    loaded.runtime_stream.argtypes = loaded.runtime_begin_capture.argtypes = [ctypes.c_long]
    loaded.runtime_destroy_graph.argtypes = [ctypes.c_void_p]
    return loaded


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


class HyperStruct(ctypes.Structure):
    """``Hyper`` of csrc/rules/update.h."""

    INTEGERS = ("rule", "maximize", "nesterov", "amsgrad", "decoupled", "rate_is_double")
    DOUBLES = ("lr", "weight_decay", "beta1", "beta2", "eps")
    _fields_ = (
        *((name, ctypes.c_int32) for name in INTEGERS),
        ("rate", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in DOUBLES),
    )

    @classmethod
    def of(cls, hyper: Hyper) -> HyperStruct:
        given = hyper._asdict()
        given["rule"] = int(hyper.rule != "sgd")
        if isinstance(hyper.lr, Tensor):
            given |= {"rate": pointer(hyper.lr), "lr": 0.0}
            given["rate_is_double"] = int(hyper.lr.dtype == torch.float64)
        return cls(**given)


class UpdateStruct(ctypes.Structure):
    """``UpdateTensor`` of csrc/engine.h."""

    _fields_ = (
        ("parameter", ctypes.c_void_p),
        ("states", ctypes.c_void_p * 3),
        ("steps", ctypes.c_void_p),
        ("group", ctypes.c_int32),
    )

    @classmethod
    def of(cls, updated: Updated, group: int) -> UpdateStruct:
        states = (ctypes.c_void_p * 3)(*(pointer(state).value for state in updated.states))
        return cls(pointer(updated.parameter), states, pointer(updated.steps), group)


class EmulatedBackend(Measuring):
    """CudaBackend's engine and kernel; tests set what a step must not depend on."""

    name: ClassVar[str] = "emulated"
    library: ClassVar[ctypes.CDLL]
    large_table: ClassVar[bool] = True
    blocks: ClassVar[int] = 2
    cooperative: ClassVar[bool] = True
    seed: ClassVar[int] = 0
    log: ClassVar[list[str]] = []  # what the last step asked of the runtime

    def __init__(self, plan: Plan, state: State, rules: Rules) -> None:
        self.reader = GradientReader(plan, state.device, state.members, rules.needs_norm)
        self.plan, self.state = plan, state
        numbers: dict[str, Any] = for_kernel(rules)
        values = [float(numbers[name]) for name in ORDER] + [float(len(numbers["windows"]))]
        windows = [number for window in numbers["windows"] for number in window]
        count = len(plan.slots)
        self.library.runtime_answer(b"driver", 13000 if self.large_table else 12000)
        self.engine = ctypes.c_void_p(
            self.library.emulated_new(
                (ctypes.c_int32 * count)(*(slot.layer for slot in plan.slots)),
                (ctypes.c_int64 * count)(*(slot.numel for slot in plan.slots)),
                (ctypes.c_int32 * count)(*(slot.bucket_log2 for slot in plan.slots)),
                (ctypes.c_int64 * count)(*(slot.first_bucket for slot in plan.slots)),
                (ctypes.c_uint32 * count)(*(slot.first_word for slot in plan.slots)),
                ctypes.c_int64(count),
                ctypes.c_int64(len(plan.layers)),
                (ctypes.c_double * len(values))(*values),
                (ctypes.c_double * max(len(windows), 1))(*windows),
                pointer(state.values),
                pointer(state.sketch),
                ctypes.c_int64(plan.buckets),
                pointer(state.parity),
            )
        )

        self.check(self.engine.value is not None)

    def __del__(self) -> None:
        self.library.emulated_delete(self.engine)

    def check(self, succeeded: bool) -> None:
        if not succeeded:
            raise RuntimeError(self.library.emulated_problem().decode())

    def step(self, call: Call) -> Outcome:
        gradients = self.reader.read(call)
        if isinstance(gradients, Outcome):
            return gradients
        self.state.heed_members(self.plan)
        self.launch(gradients, call, None, self.reader.updated(call))
        self.reader.write_back(call)
        return Outcome.DONE

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        call: Call,
        sums: Tensor,
        updated: Sequence[Updated | None] | None = None,
    ) -> None:
        self.launch(gradients, call, sums, updated)

    def launch(
        self,
        gradients: Sequence[Tensor | None],
        call: Call,
        sums: Tensor | None,
        updated: Sequence[Updated | None] | None,
    ) -> None:
        given = [g if g is not None and g.numel() else None for g in gradients]
        tensors, hypers = self.structs(call, given, updated)
        dtypes = [DTYPES.index(g.dtype) if g is not None else 0 for g in given]
        written = (ctypes.c_uint8 * len(given))()
        self.library.runtime_log()
        succeeded = self.library.emulated_step(
            self.engine,
            (ctypes.c_void_p * len(given))(*(pointer(g).value for g in given)),
            (ctypes.c_int32 * len(given))(*dtypes),
            pointer(call.grad_scale),
            pointer(call.found_inf),
            int(call.unscale),
            int(call.begins_round),
            int(call.decides),
            pointer(sums),
            tensors,
            hypers,
            len(hypers or ()),
            written,
            self.blocks,
            int(self.cooperative),
            self.seed,
        )
        type(self).log = self.library.runtime_log().decode().splitlines()
        self.check(succeeded)
        self.mark(written, updated)

    def structs(
        self, call: Call, given: Sequence[Tensor | None], updated: Sequence[Updated | None] | None
    ) -> tuple[Any, Any]:
        """What is updated, and by what, as the engine takes it; updates of no element are counted.

        That is what csrc/updater.cpp does.
        """
        if updated is None or call.update is None:
            return None, None
        groups = call.update.groups([slot.parameter for slot in self.plan.slots])
        tensors = (UpdateStruct * len(updated))()
        for index, (of, gradient) in enumerate(zip(updated, given, strict=True)):
            if of is not None and gradient is not None:
                tensors[index] = UpdateStruct.of(of, groups[index])
            elif of is not None:
                of.steps.add_(1.0 if call.found_inf is None else (call.found_inf == 0).reshape(()))
        self.hypers = call.update.hypers()  # holds learning rates that are tensors
        return tensors, (HyperStruct * len(self.hypers))(*map(HyperStruct.of, self.hypers))

    @staticmethod
    def mark(written: Sequence[int], updated: Sequence[Updated | None] | None) -> None:
        """Versions of what was updated, as csrc/updater.cpp has them."""
        for flag, of in zip(written, updated or (), strict=False):
            if flag and of is not None:
                for tensor in (of.parameter, of.steps, *of.states):
                    torch._C._autograd._unsafe_set_version_counter(
                        (tensor,), (tensor._version + 1,)
                    )

    def settle(self) -> list[str]:
        """What that asks of the runtime."""
        self.library.runtime_log()
        self.library.emulated_settle(self.engine)
        return self.library.runtime_log().decode().splitlines()

    def follow(self, restored: bool = False) -> None:
        self.library.emulated_written(self.engine)

    @classmethod
    def launches(cls) -> int:
        return sum("launch on" in line for line in cls.log)

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        return None if device.type == "cpu" else "emulated on the CPU"
