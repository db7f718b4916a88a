"""A Python as a user has it before any install."""

import subprocess
import sys


def bare_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python without any installed package."""
    return subprocess.run([sys.executable, "-I", "-S", *arguments], capture_output=True, text=True, timeout=60)
