"""The `stepengine` command. Everything heavy is imported inside the command that needs it."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from stepengine import doctor as _doctor
from stepengine.errors import StepEngineError

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
        as_json: Json = False,
    ) -> None:
        """Go on from a text, printing it as it comes."""
        from stepengine import LLM, SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        text = sys.stdin.read() if prompt == "-" else prompt
        _quiet_transformers()
        llm = LLM(model, stage=stage, device=device, dtype=dtype)
        given = llm.chat_prompt([{"role": "user", "content": text}]) if chat else text
        if as_json:
            _print_json(_generated(llm, given, text, params))
            return
        for piece in llm.stream(given, params):
            print(piece.outputs[0].text, end="", flush=True)
        print()

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

    return app


def _print_report(as_json: bool) -> None:
    report = _doctor.examine()
    if as_json:
        _print_json(report.as_dict())
    else:
        print(_doctor.as_text(report))


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
