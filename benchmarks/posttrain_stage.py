"""What the stage posttrain gains with several settings, over checkpoints of several seeds.

    python benchmarks/posttrain_stage.py PROJECT            # prints the table
    python benchmarks/posttrain_stage.py PROJECT --write    # keeps it in posttrain_stage.md

PROJECT is a folder that `fmce-ops init` made and whose params.yaml says what to train; the stages
prepare, train and posttrain run there as a user runs them, train once for each seed, posttrain once
for each seed and setting. What is in PROJECT/posttrain_stage already is not run again.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from fmce_ops.files import write_text
from fmce_ops.training.comparison import paired

from machine import commit, processor

TAUGHT = {"epochs": 10, "batch_size": 64, "lr": 0.001, "weight_decay": 0.01, "seeds": 1}
SOFT = {**TAUGHT, "mode": "soft", "folds": 2}
MIXED = {**TAUGHT, "mode": "mixed"}
PUBLISHED = {"lr": 5e-5, "schedule": "constant", "weight_decay": 0.05, "batch_size": 256}
SETTINGS = {
    "all modules, soft, folds 2": {**SOFT, "modules": ["conv1..head"]},
    "stage4..head, soft, folds 2": {**SOFT, "modules": ["stage4..head"]},
    "conv5, mixed, folds 2": {**MIXED, "modules": ["conv5"], "folds": 2},
    "conv5, mixed, published steps": {**MIXED, "modules": ["conv5"], "folds": 0, **PUBLISHED},
}
CONTROLS = ("untouched", "ce", "anchor")
Arms = dict[str, list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the table in the .md file")
    given = parser.parse_args()
    base = yaml.safe_load((given.project / "params.yaml").read_text())
    found: dict[str, list[Arms]] = {name: [] for name in SETTINGS}
    for seed in range(given.seeds):
        params = {**base, "train": {**base["train"], "seed": seed}}
        for name, settings in SETTINGS.items():
            found[name].append(outcome(given.project, params, name, settings))
    write_params(given.project, base)
    text = page(base, found)
    print(text)
    if given.write:
        write_text(Path(__file__).with_suffix(".md"), text)


def outcome(project: Path, params: dict[str, Any], name: str, settings: dict[str, Any]) -> Arms:
    """Every arm of one seed and setting."""
    kept = project / "posttrain_stage" / f"{params['train']['seed']} {name}.json"
    if not kept.exists():
        write_params(project, {**params, "posttrain": settings})
        for stage in ("prepare", "train", "posttrain"):  # what is there is not done again
            subprocess.run(["fmce-ops", stage], cwd=project, check=True)
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(project / "results" / "posttrain.json", kept)
    arms: Arms = json.loads(kept.read_text())["arms"]
    return arms


def write_params(project: Path, params: dict[str, Any]) -> None:
    write_text(project / "params.yaml", yaml.safe_dump(params))


def page(base: dict[str, Any], found: dict[str, list[Arms]]) -> str:
    """Markdown."""
    given = {name: base[name] for name in ("data", "model", "train")}
    rows = [row(name, split, seeds) for name, seeds in found.items() for split in ("val", "test")]
    return f"""# Post-training: the stage

`OMP_NUM_THREADS=1 python benchmarks/posttrain_stage.py PROJECT --write`; {processor()}, commit \
{commit()}. \
{len(next(iter(found.values())))} seeds, each with a checkpoint of its own; accuracy in %, paired \
gains of the targets in points with their 95 % intervals. The epoch and alpha are chosen on \
validation. `{json.dumps(given)}`

| setting | split | untouched | labels alone | anchor | targets | over untouched | over the labels \
| over anchor |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def row(name: str, split: str, seeds: list[Arms]) -> str:
    """One line: the mean accuracy of every arm, and what the targets gain."""
    values = {
        arm: [100 * arms[arm][0][split]["accuracy"] for arms in seeds] for arm in (*CONTROLS, "frp")
    }
    gains = [paired(values["frp"], values[control]) for control in CONTROLS]
    means = [f"{sum(found) / len(found):.2f}" for found in values.values()]
    told = [f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})" for gain in gains]
    return f"| {name} | {split} | {' | '.join([*means, *told])} |"


if __name__ == "__main__":
    main()
