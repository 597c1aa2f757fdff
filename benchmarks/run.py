"""Run every benchmark beside this file and write RESULTS.md.

python benchmarks/run.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
_NOT_RUN = {"run.py", "recipes.py"}  # the latter is a search, of hours


def main() -> None:
    lines = ["# Results", "", "Written by `make bench`. Ratios are against the peer in the same run.", ""]
    for script in sorted(_FOLDER.glob("[!_]*.py")):
        if script.name in _NOT_RUN:
            continue
        print(f"== {script.name}", flush=True)
        done = subprocess.run([sys.executable, str(script), "--json"], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{script.name} ended with {done.returncode}")
        result = json.loads(done.stdout)
        lines += [
            f"## `python benchmarks/{script.name}`",
            "",
            f"{result['machine']}; {result['versions']}",
            "",
        ]
        lines += ["| | measured | asked | holds |", "|---|---|---|---|"]
        for name, row in result["rows"].items():
            limits = ((row.get("at_least"), "≥"), (row.get("at_most"), "≤"))
            asked = " ".join(f"{sign} {limit:g} {row['unit']}" for limit, sign in limits if limit is not None)
            holds = "" if row["holds"] is None else "yes" if row["holds"] else "**no**"
            lines.append(f"| {name} | {row['value']:.3g} {row['unit']} | {asked} | {holds} |")
        lines.append("")
    (_FOLDER / "RESULTS.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
