"""The command line: parse, call one stage or service, show. ``fmce-ops --help`` tells the rest."""

import contextlib
import gc
import json
import logging
import os
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from fmce_ops.errors import FmceError
from fmce_ops.files import is_disk_full

if TYPE_CHECKING:
    from fmce_ops.stages.score import Scored
    from fmce_ops.training.reporter import Reporter

app = typer.Typer(
    help="How mature is each functional module of a network? Feature map convergence evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
shards = typer.Typer(help="Look at and check a store of feature maps.", no_args_is_help=True)
app.add_typer(shards, name="shards")
paths = typer.Typer(help="Look at the paths that images take.", no_args_is_help=True)
app.add_typer(paths, name="paths")
USER_ERROR, INTERRUPTED, FELL_SHORT = 2, 130, 1
_debug = False


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global _debug
    _debug = debug


def main() -> None:
    """Run a command; what a user can cause is one sentence on standard error and exit 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except FmceError as error:
        if _debug:
            raise
        _fail(str(error))
    except Exception as error:
        if _debug or not is_disk_full(error):
            raise
        _fail("the disk is full: free some space, then run the same command again.")


def _fail(sentence: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"error: {sentence}", markup=False, highlight=False)
    sys.exit(USER_ERROR)


def _run_stage(name: str, *arguments: str) -> None:
    from fmce_ops.stages.params import load_params

    _import_from_here()
    params = load_params(Path("params.yaml"))
    try:
        with _progress() as progress:
            _stage(name).run(params, progress, *arguments)
    except KeyboardInterrupt:
        typer.echo(
            "stopped; what was done is kept: run the same command again to go on from there.",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None


def _stage(name: str) -> ModuleType:
    """Its module; nobody looks for garbage among the many objects that importing it makes."""
    gc.disable()
    try:
        return import_module(f"fmce_ops.stages.{name}")
    finally:
        gc.enable()


def _import_from_here() -> None:
    """Let model.backbone name a module of the project; installed modules come first."""
    sys.path.append(str(Path.cwd()))


@contextlib.contextmanager
def _progress() -> Iterator["Reporter | None"]:
    """A bar on a terminal, plain lines elsewhere; only the first of several processes shows it."""
    if os.environ.get("RANK", "0") != "0":
        yield None
        return
    from fmce_ops.progress import PlainProgress, RichProgress

    with RichProgress() if sys.stdout.isatty() else PlainProgress() as progress:
        yield progress


@app.command()
def prepare() -> None:
    """Write the data set of params.yaml as one file of images."""
    _run_stage("prepare")


@app.command()
def train() -> None:
    """Train the classifier and record losses and weights at every point."""
    _run_stage("train")


@app.command()
def markers() -> None:
    """Find the epoch markers and keep the checkpoint of each phase."""
    _run_stage("markers")


@app.command()
def features() -> None:
    """Write the feature maps of every phase as shards."""
    _run_stage("features")


@app.command()
def fmce() -> None:
    """Train FMCE-Net on the shards, judge it on the test split and register it."""
    _run_stage("fmce")


@app.command()
def posttrain() -> None:
    """Train modules on their own targets, beside their controls, and register the best."""
    _run_stage("posttrain")


@app.command()
def pathways() -> None:
    """Train gates on the filters, judge what the paths are good for, and register the best."""
    _run_stage("pathways")


@app.command()
def study(
    run: Annotated[str, typer.Argument(help="A run of maturity.runs in params.yaml.")],
) -> None:
    """Train a run and describe its modules for the judge of maturity."""
    _run_stage("study", run)


@app.command()
def maturity() -> None:
    """Train a judge of maturity on the studied runs, each left out in turn, and register it."""
    _run_stage("maturity")


@app.command()
def report() -> None:
    """Put everything that the pipeline found on one page."""
    _run_stage("report")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="An existing git repository.")] = Path(),
    force: Annotated[bool, typer.Option(help="Overwrite files that exist.")] = False,
) -> None:
    """Set the pipeline up in a git repository: dvc.yaml, params.yaml, ignore entries."""
    from fmce_ops.stages.scaffold import scaffold

    for line in scaffold(folder, force=force):
        typer.echo(line)


@app.command()
def evaluate(
    model_uri: Annotated[
        str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/NAME, a folder.")
    ],
    minimum: Annotated[
        list[str] | None,
        typer.Option("--min", help="FIGURE=VALUE, for example accuracy=0.9; exit 1 if it is less."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and no more.")] = False,
) -> None:
    """Judge a model on the test split of the data that it belongs to."""
    from fmce_ops.stages.evaluate import evaluate as judge
    from fmce_ops.stages.evaluate import parse_minimum, shortfalls

    _import_from_here()
    least = parse_minimum(minimum or [])
    with contextlib.redirect_stdout(sys.stderr):
        result = judge(model_uri, Path("params.yaml"))
    missed = shortfalls(result, least)
    if as_json:
        typer.echo(json.dumps(result.as_json(), allow_nan=False))
    else:
        from fmce_ops.progress import show_evaluation

        show_evaluation(result)
    for sentence in missed:
        typer.echo(sentence, err=True)
    if missed:
        raise typer.Exit(FELL_SHORT)


@app.command()
def score(
    model_uri: Annotated[str | None, typer.Option(help="A logged classifier.")] = None,
    network: Annotated[
        str | None,
        typer.Option(help="A torchvision name or package.module:factory; else params.yaml's."),
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="That --network is made with.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="safetensors, or a state_dict that torch saved.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder of pictures, or a file of 'prepare'.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=4, help="Side in px that --network sees.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many images are taken.")] = 256,
    module: Annotated[
        list[str] | None, typer.Option(help="A submodule to score; may be repeated.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="URI of a judge; else the one that comes with fmce-ops.")
    ] = None,
    watch: Annotated[
        Path | None, typer.Option(help="Score each file of weights as it appears in this folder.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Stop --watch after so many.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a network.")] = False,
) -> None:
    """How mature is each module of a network, and which should be trained next?"""
    from fmce_ops.stages.score import Asked, score_network, watch_folder

    _import_from_here()
    if model_uri and (network or classes or size):
        raise typer.BadParameter(
            "a logged classifier knows --network, --classes and --size: leave them out."
        )
    if watch and weights:
        raise typer.BadParameter("--watch finds its files of weights itself: leave out --weights.")
    modules = tuple(module) if module else None
    asked = Asked(model_uri, network, classes, weights, data, size, images, modules, judge)

    params, answers = Path("params.yaml"), sys.stdout

    def results() -> Iterator["Scored"]:
        if watch is None:
            yield score_network(asked, params)
        else:
            told = partial(typer.echo, err=True)
            yield from watch_folder(asked, watch, count, params, told)

    try:
        with contextlib.redirect_stdout(sys.stderr):
            for found in results():
                with contextlib.redirect_stdout(answers):
                    _show_scores(found, as_json)
    except KeyboardInterrupt:
        typer.echo("stopped watching; what was scored is in the run.", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _show_scores(found: "Scored", as_json: bool) -> None:
    from fmce_ops.progress import show_scores

    if as_json:
        typer.echo(json.dumps(found.as_json(), allow_nan=False))
    else:
        show_scores(found)


_Store = Annotated[Path, typer.Argument(help="The folder of the store.")]


@shards.command("info")
def shards_info(store: _Store = Path("data/fmcs")) -> None:
    """Show what a store holds."""
    from fmce_ops.progress import show_store
    from fmce_ops.shards import describe

    show_store(store, describe(store))


@shards.command("verify")
def shards_verify(store: _Store = Path("data/fmcs")) -> None:
    """Check every byte of a store against its manifest; exit 2 with the shard and the reason."""
    from fmce_ops.shards import verify

    found = verify(store)
    typer.echo(f"{store}: {found.shards} shards, {found.maps} maps, all as the manifest says")


@paths.command("explain")
def paths_explain(
    image: Annotated[Path, typer.Argument(help="A picture that Pillow can read.")],
    model_uri: Annotated[
        str, typer.Option(help="A model that the stage pathways made.")
    ] = "models:/fmce-pathways@champion",
    out: Annotated[
        Path | None, typer.Option(help="Where to draw it; else beside the working folder's files.")
    ] = None,
) -> None:
    """Show the path of one image, and the classes whose paths are nearest."""
    from fmce_ops.progress import show_path
    from fmce_ops.stages.explain import explain

    _import_from_here()
    show_path(explain(image, model_uri, out or Path(f"path-{image.stem}.png"), Path("params.yaml")))


if __name__ == "__main__":
    main()
