"""``python -m benchmarks`` lists the benchmarks; ``python -m benchmarks all`` runs each in a process of its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

_PACKAGE = Path(__file__).parent


def benchmark_names() -> list[str]:
    """Returns the modules of this package that can be run: those that define ``main``."""
    return sorted(path.stem for path in _PACKAGE.glob("[!_]*.py") if _defines_main(path))


def _defines_main(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def _summary(name: str) -> str:
    docstring = ast.get_docstring(ast.parse((_PACKAGE / f"{name}.py").read_text())) or ""
    return docstring.partition("\n")[0]


def main(argv: list[str]) -> int:
    """Lists, or with ``all`` runs; further arguments go to every benchmark. Returns 1 when one of them failed."""
    names = benchmark_names()
    if argv[:1] != ["all"]:
        for name in names:
            print(f"  python -m benchmarks.{name:<14} {_summary(name)}")
        print("  python -m benchmarks all [--quick] [--check]")
        return 0
    failed = []
    for name in names:
        print(f"\n=== {name}: {_summary(name)}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *argv[1:]], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
