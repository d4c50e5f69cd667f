"""The `stepengine` command. Everything heavy is imported inside the command that needs it."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from stepengine import doctor as _doctor
from stepengine.errors import InvalidSetting, StepEngineError

if TYPE_CHECKING:
    import typer

BAD_INPUT = 2
DEFAULT_MODEL = "smollm2-135m"
DAMPING = 0.03  # of `stage5_gptq.gptq.Method`, which is not imported before it is needed


def main(argv: list[str] | None = None) -> None:
    """Run the command line. What stepengine raises on purpose ends as its sentence on stderr and exit status 2."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        app = _app()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        if arguments[:1] == ["doctor"]:  # must work precisely where something is missing
            _print_report("--json" in arguments)
            return
        sys.exit(f"stepengine: the command line needs {error.name}; `pip install typer rich` brings it.")
    try:
        app(args=arguments, prog_name="stepengine")
    except StepEngineError as error:
        print(f"stepengine: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `stepengine ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _app() -> "typer.Typer":
    import typer

    app = typer.Typer(
        help="An LLM inference engine that grows by one optimisation per stage.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    Json = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
    Model = Annotated[str, typer.Argument(metavar="MODEL", help="Catalogue name, local folder or hub id.")]

    @app.callback(invoke_without_command=True)
    def version(show: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
        if show:
            from stepengine import __version__

            typer.echo(__version__)
            raise typer.Exit()

    @app.command()
    def doctor(as_json: Json = False) -> None:
        """What this machine has, and what will therefore run how."""
        _print_report(as_json)

    @app.command()
    def models(
        as_json: Json = False,
        fetch: Annotated[str | None, typer.Option(metavar="MODEL", help="Fetch this model now.")] = None,
    ) -> None:
        """The catalogue of models, and what of it is on this machine."""
        from stepengine.model.catalog import entries, resolve

        if fetch is not None:
            resolve(fetch)
            return
        if as_json:
            _print_json([{**vars(entry), "folder": str(entry.folder)} for entry in entries()])
        else:
            _print_models(entries())

    @app.command()
    def generate(
        model: Model,
        prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads stdin.")],
        stage: Annotated[str, typer.Option(help="0, 1, 1a, 1b, ... or a stage's folder.")] = "1",
        max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
        temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
        top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")] = 1.0,
        top_k: Annotated[int, typer.Option(help="The k most likely tokens only; 0 is off.")] = 0,
        seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
        chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
        trace: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Record every step here, for `stepengine player`.")
        ] = None,
        as_json: Json = False,
    ) -> None:
        """Go on from a text, printing it as it comes."""
        from stepengine import LLM, SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        text = sys.stdin.read() if prompt == "-" else prompt
        _check_folder(trace)
        _quiet_transformers()
        llm = LLM(model, stage=stage, device=device, dtype=dtype, trace=trace is not None)
        given = llm.chat_prompt([{"role": "user", "content": text}]) if chat else text
        if as_json:
            _print_json(_generated(llm, given, text, params))
        else:
            for piece in llm.stream(given, params):
                print(piece.outputs[0].text, end="", flush=True)
            print()
        if trace is not None and llm.trace is not None:
            from stepengine.trace import save

            save(llm.trace, trace)

    @app.command()
    def quantize(
        model: Model,
        out: Annotated[Path, typer.Option(help="The folder to write: a GPTQ checkpoint that other engines load, too.")],
        bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
        group_size: Annotated[int, typer.Option(help="Columns that share a scale; -1: whole rows.")] = 64,
        symmetric: Annotated[bool, typer.Option("--symmetric", help="The zero point is the middle code.")] = False,
        rtn: Annotated[bool, typer.Option("--rtn", help="Round to nearest: no GPTQ, no text.")] = False,
        clip: Annotated[
            bool | None, typer.Option("--clip/--no-clip", help="Search for narrower ranges; default: with GPTQ only.")
        ] = None,
        act_order: Annotated[bool, typer.Option(help="Round the columns with the largest inputs first.")] = True,
        damping: Annotated[float, typer.Option(help="Of the Hessian's diagonal, as a part of its mean.")] = DAMPING,
        text: Annotated[
            Path | None, typer.Option(help="Calibration text, a file or a folder; default: Python's own help texts.")
        ] = None,
        samples: Annotated[int, typer.Option(help="Pieces of calibration text.")] = 32,
        length: Annotated[int, typer.Option(help="Tokens of a piece.")] = 512,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    ) -> None:
        """Quantise a model's linear layers and write the result; interrupted, the same command goes on."""
        from stepengine.llm import device_named
        from stepengine.model.catalog import resolve
        from stepengine.stage5_gptq.calibrate import Recipe
        from stepengine.stage5_gptq.gptq import Method
        from stepengine.stage5_gptq.grid import Grid
        from stepengine.stage5_gptq.loader import quantize_folder

        _quiet_transformers()
        method = None if rtn else Method(damping, act_order)
        recipe = Recipe(
            Grid(bits, group_size, symmetric, not rtn if clip is None else clip), method, samples, length, text
        )
        work = out.absolute().parent / f".{out.name}.partial"
        runs_on = device_named(device)
        quantize_folder(resolve(model), out, recipe, work, runs_on)
        print(f"{out}: {bits} bits, {_size(out)}; run it with LLM({str(out)!r}, stage=5)")

    @app.command()
    def ladder(
        model: Annotated[str, typer.Option(help="Catalogue name, local folder or hub id.")] = DEFAULT_MODEL,
        fast: Annotated[bool, typer.Option("--fast", help="Small request sets; in under a minute.")] = False,
        stage: Annotated[
            list[str] | None, typer.Option(help="Only rows for stage 0 and this one; may be repeated.")
        ] = None,
        out: Annotated[Path | None, typer.Option(help="Folder for ladder.json and ladder.html.")] = None,
        as_json: Json = False,
    ) -> None:
        """Every stage on the same requests: what each one exists for, before and after."""
        from stepengine.bench import ladder as bench_ladder

        _quiet_transformers()
        result = bench_ladder.run(model, fast, out, stage or None)
        if as_json:
            _print_json(result)
        else:
            from rich.console import Console

            bench_ladder.render(result, Console())

    @app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def bench(context: typer.Context) -> None:
        """Measure one stage, or compare it with a peer; `stepengine bench --help` lists the options."""
        from stepengine.bench.run import main as run_bench

        raise typer.Exit(run_bench(context.args) or 0)

    @app.command()
    def player(
        trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A saved trace: .jsonl or .jsonl.gz.")],
        output: Annotated[
            Path, typer.Option("--output", "-o", help="The page to write; a file that is there is overwritten.")
        ],
        size: Annotated[str, typer.Option(help="page, or room: for a projector.")] = "page",
        step: Annotated[int, typer.Option(help="The step that is shown first; -1 is the last.")] = 0,
        compare: Annotated[
            Path | None, typer.Option(metavar="OTHER", help="Another trace of the same requests, to show beside it.")
        ] = None,
    ) -> None:
        """Write a trace as one page that plays offline, in any browser.

        `stepengine generate ... --trace FILE` saves a trace, as does stepengine.trace.save(llm.trace, FILE) in Python.
        """
        _check_folder(output)
        try:
            from stepengine.viz.compare import Compare
            from stepengine.viz.player import StepPlayer
        except ModuleNotFoundError as error:
            raise InvalidSetting(
                f"The player needs {error.name}; `pip install anywidget ipywidgets` brings it."
            ) from None
        if compare is None:
            shown: Any = StepPlayer(trace, size=size, step=step)
        else:
            shown = Compare(trace, compare, names=_names(trace, compare), step=step, size=size)
        print(f"{shown.save_html(output)}: {shown!r}")

    @app.command("strip-solutions")
    def strip_solutions(
        out: Annotated[Path, typer.Option("--output", "-o", help="The folder to write, outside of FOLDER.")],
        folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The series.")] = Path("notebooks"),
        no_answers: Annotated[bool, typer.Option("--no-answers", help="Also drop what to say when asked.")] = False,
        force: Annotated[bool, typer.Option("--force", help="Write over copies that were changed.")] = False,
    ) -> None:
        """Copies of the notebooks to hand out: no outputs, no guesses, no solutions."""
        try:
            from stepengine import handouts
        except ModuleNotFoundError as error:
            raise InvalidSetting(f"Reading notebooks needs {error.name}; `pip install nbformat` brings it.") from None
        for line in handouts.strip_solutions(folder, out, answers=not no_answers, force=force):
            print(line)
        print(f"{out}: {len(list(out.glob('*.ipynb')))} notebooks to hand out")

    @app.command()
    def diff(
        a: Annotated[str, typer.Argument(metavar="A", help="A stage: 0, 1a, 1b, 2, ...")],
        b: Annotated[str | None, typer.Argument(metavar="[B]", help="Another one; by default the next.")] = None,
        part: Annotated[str | None, typer.Option(help="One part only, such as scheduler or cache.")] = None,
        output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a page, side by side.")] = None,
    ) -> None:
        """What changed from one stage to another, part by part, from the files themselves."""
        from stepengine.diff import stage_diff

        found = stage_diff(a, b, part)
        print(found.unified() if output is None else f"{found}\nWritten: {found.save_html(output)}")

    return app


def _print_report(as_json: bool) -> None:
    report = _doctor.examine()
    if as_json:
        _print_json(report.as_dict())
    else:
        print(_doctor.as_text(report))


def _check_folder(file: Path | None) -> None:
    if file is not None and not file.absolute().parent.is_dir():
        raise InvalidSetting(f"There is no folder {file.parent} to write {file.name} to: make it, or name another.")
    if file is not None and file.is_dir():
        raise InvalidSetting(f"{file} is a folder: name a file to write.")


def _names(one: Path, other: Path) -> tuple[str, str]:
    """What two trace files are called beside each other: as much of their paths as tells them apart."""
    names = [
        (path.name.split(".")[0] or path.name, f"{path.parent.name}/{path.name}", str(path)) for path in (one, other)
    ]
    return next((pair for pair in zip(*names, strict=True) if pair[0] != pair[1]), ("A", "B"))  # type: ignore[return-value]


def _size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_models(entries: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "on disk", "download", "here", "what it is", box=None, pad_edge=False)
    for entry in entries:
        download = f"{entry.download / 1e6:.0f} MB" if entry.download else "none"
        table.add_row(
            entry.name, f"{entry.size / 1e6:.3g} MB", download, "yes" if entry.cached else "no", entry.description
        )
    console = Console()
    console.print(table)
    console.print("A local folder or a hub id (org/name) of the Llama, Mistral, Qwen2 and Qwen3 families works, too.")


def _generated(llm: Any, given: Any, text: str, params: Any) -> dict[str, Any]:
    output = llm.generate(given, params)[0]
    sample = output.outputs[0]
    return {
        "model": llm.name,
        "stage": llm.stage.name,
        "prompt": text,
        "prompt_tokens": len(output.prompt_token_ids),
        "text": sample.text,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason,
        "ttft_ms": output.ttft_ms,
        "e2e_ms": output.e2e_ms,
    }


def _quiet_transformers() -> None:
    """Keep advice for transformers' own users out of our output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
