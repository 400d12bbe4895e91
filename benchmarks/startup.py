"""Times of whole commands, as a user waits for them.

python benchmarks/startup.py PROJECT            # a project in which 'dvc repro' has run
python benchmarks/startup.py PROJECT --write    # and keep the table in benchmarks/startup.md
python benchmarks/startup.py PROJECT --stages   # run each stage of the pipeline anew first
"""

import argparse
import statistics
import subprocess
import time
from pathlib import Path

from machine import cores

GOALS = {  # of what stands beside feature map convergence evaluation
    "posttrain": "under 90 s",
    "pathways": "under 90 s",
    "study, maturity": "under 120 s",
}
REST = "feature map convergence evaluation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--stages", action="store_true", help="dvc repro --force of each, once")
    parser.add_argument("--write", action="store_true", help="keep the table in startup.md")
    options = parser.parse_args()
    text = report(options.project, options.repetitions, options.stages)
    print(text)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


def report(project: Path, repetitions: int, stages: bool) -> str:
    rows = stage_rows(project) if stages else []
    rows += [
        row(project, ["fmce-ops", "--help"], repetitions, "under 0.5 s"),
        row(project, ["dvc", "repro"], repetitions, "under 3 s"),
    ]
    table = "\n".join(rows)
    return f"""# Commands

`python benchmarks/startup.py PROJECT --stages --write`; \
{cores()}. Wall-clock, median; \
`dvc repro` with nothing to do. A stage is run anew by `dvc repro --single-item --force`; \
feature map convergence evaluation is all but {", ".join(GOALS)}.

| command | repetitions | seconds | goal |
|---|---|---|---|
{table}
"""


def stage_rows(project: Path) -> list[str]:
    """A row for each stage that is part of something, and one for each part of the pipeline."""
    listed = ["dvc", "stage", "list", "--name-only"]
    names = subprocess.check_output(listed, cwd=project, text=True).split()
    seconds = {
        name: timed(project, ["dvc", "repro", "--single-item", "--force", name]) for name in names
    }
    rows = [f"| {n} | 1 | {taken:.2f} | |" for n, taken in seconds.items() if n not in GOALS]
    parts = dict.fromkeys(GOALS, 0.0) | {REST: 0.0}
    for name, taken in seconds.items():
        kind = name.partition("@")[0]
        parts[next((part for part in GOALS if kind in part.split(", ")), REST)] += taken
    goals = GOALS | {REST: "under 300 s"}
    return [
        *rows,
        *(f"| {part} | 1 | {taken:.2f} | {goals[part]} |" for part, taken in parts.items()),
    ]


def row(project: Path, words: list[str], repetitions: int, goal: str) -> str:
    seconds = statistics.median(timed(project, words) for _ in range(repetitions))
    return f"| `{' '.join(words)}` | {repetitions} | {seconds:.2f} | {goal} |"


def timed(project: Path, words: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(words, cwd=project, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
