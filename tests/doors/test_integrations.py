"""What holds for all integrations: they are imported alone, and say what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIBRARIES = ("transformers", "accelerate", "lightning", "pytorch_lightning", "timm")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_none_is_imported_unasked() -> None:
    code = "import sys, gradamp_fast.integrations; print(sorted(sys.modules))"
    loaded = run(code)
    assert "gradamp_fast.integrations" in loaded
    assert not [name for name in LIBRARIES if f"'{name}'" in loaded]


@pytest.mark.parametrize(("module", "extra"), [("huggingface", "hf"), ("lightning", "lightning")])
def test_a_missing_library_is_named_with_its_extra(module: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({LIBRARIES}))\n"
        f"import gradamp_fast.integrations.{module}"
    )
    assert f"ImportError: gradamp_fast.integrations.{module} needs " in (printed := run(code))
    assert f"pip install 'gradamp_fast[{extra}]'" in printed
