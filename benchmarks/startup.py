"""Times of whole commands, as a user waits for them.

python benchmarks/startup.py PROJECT            # a project in which 'dvc repro' has run
python benchmarks/startup.py PROJECT --write    # and keep the table in benchmarks/startup.md
python benchmarks/startup.py PROJECT --whole    # run the whole pipeline anew first
"""

import argparse
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="dvc repro --force, once")
    parser.add_argument("--write", action="store_true", help="keep the table in startup.md")
    options = parser.parse_args()
    text = report(options.project, options.repetitions, options.whole)
    print(text)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


def report(project: Path, repetitions: int, whole: bool) -> str:
    rows = [row(project, ["dvc", "repro", "--force"], 1, "under 300 s")] if whole else []
    rows += [
        row(project, ["fmce-ops", "--help"], repetitions, "under 0.5 s"),
        row(project, ["dvc", "repro"], repetitions, "under 3 s"),
    ]
    table = "\n".join(rows)
    return f"""# Commands

`python benchmarks/startup.py PROJECT --whole --write`; \
{platform.processor() or platform.machine()}, {os.cpu_count()} cores. Wall-clock, median; \
`dvc repro` with nothing to do, `dvc repro --force` walks all stages of the default once.

| command | repetitions | seconds | goal |
|---|---|---|---|
{table}
"""


def row(project: Path, words: list[str], repetitions: int, goal: str) -> str:
    seconds = statistics.median(timed(project, words) for _ in range(repetitions))
    return f"| `{' '.join(words)}` | {repetitions} | {seconds:.2f} | {goal} |"


def timed(project: Path, words: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(words, cwd=project, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
